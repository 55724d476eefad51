//! `streamgate send`: signs and sends test webhooks, as Stream would.

mod edit;
mod key;
mod report;
mod samples;
mod target;
mod webhook;

use crate::exit::BadUsage;
use crate::global::Global;
use crate::output;
use clap::{Args, ValueEnum};
use edit::Edit;
use key::Key;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use report::{Answer, Report};
use samples::Cast;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use streamgate_core::envelope::PENDING;
use streamgate_core::event_types;
use streamgate_core::fields::Fields;
use streamgate_core::path;
use streamgate_service::config::reader::nearest;
use streamgate_service::http_client::{HttpClient, exchange};
use target::Target;
use tokio::task::JoinSet;
use webhook::Webhooks;

/// Stream hangs up on a push after this long.
const TIMEOUT: Duration = Duration::from_secs(6);
/// Most bytes read of an answer.
const MAX_ANSWER: usize = 8 << 20;
/// Sent without --type.
const EVENT: &str = "message.new";
const COMMAND: &str = "ticket";
/// Characters of a command's name that are escaped in a query.
const COMMAND_NAME: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

#[derive(Debug, Args)]
pub struct Send {
    /// Where to send: the gateway's base URL, or the whole URL of a webhook [default: gateway.listen of the
    /// configuration]
    #[arg(long)]
    url: Option<String>,
    /// The kind of webhook
    #[arg(long, value_enum, default_value = "push")]
    kind: KindArg,
    /// The event's type, or the command's name [default: message.new, ticket]. With --file it replaces the body's type
    #[arg(long = "type", value_name = "TYPE")]
    event_type: Option<String>,
    /// Print the event types that Stream documents, one a line (with --json as a JSON array), and send nothing
    #[arg(long)]
    list_types: bool,
    /// Send this body, byte for byte; - reads it from stdin. With --count each event gets its own created_at
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The message's text
    #[arg(long, value_name = "TEXT", conflicts_with = "file")]
    text: Option<String>,
    /// The id of the user who writes, reacts or joins
    #[arg(long, value_name = "ID", conflicts_with = "file")]
    user: Option<String>,
    /// The channel: TYPE:ID, or an id for the type messaging
    #[arg(long, value_name = "CHANNEL", conflicts_with = "file")]
    channel: Option<String>,
    /// The command's arguments
    #[arg(long, value_name = "ARGS", conflicts_with = "file")]
    args: Option<String>,
    /// form_data of a command: the button that was clicked, or an input. May be repeated
    #[arg(long, value_name = "NAME=VALUE", conflicts_with = "file", value_parser = pair)]
    form: Vec<(String, String)>,
    /// Put this JSON into the body, like 'message.text="hello"' or 'message.attachments[0]={"type":"image"}'. May be repeated
    #[arg(long, value_name = "PATH=JSON", value_parser = Edit::parse)]
    set: Vec<Edit>,
    /// How many webhooks to send
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// Start at most this many a second; without it, as fast as the answers come
    #[arg(long, value_name = "R")]
    rate: Option<f64>,
    /// Most concurrent requests
    #[arg(long, value_name = "N", default_value = "16", value_parser = clap::value_parser!(u64).range(1..=4096))]
    concurrency: u64,
    /// Compress the body, as Stream does when hook payload compression is on
    #[arg(long)]
    gzip: bool,
    /// X-Webhook-Attempt
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    attempt: u32,
    /// X-Webhook-Id, the same for every webhook; the body is then the same too, so it has no date. By default each
    /// webhook has its own
    #[arg(long, value_name = "ID", value_parser = header_value)]
    id: Option<String>,
    /// Sign for this API key, if the configuration has several or none
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// A PEM file of certificates to trust in addition to the system's authorities: authorities, or the gateway's own
    /// certificate
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Put a PROXY header in front of each connection, as a balancer does when gateway.proxy_protocol is on
    ///
    /// The default is the configuration's setting for its own gateway, and false for any other URL.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    proxy_header: Option<bool>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn header_value(text: &str) -> Result<String, String> {
    let is_fit = !text.trim().is_empty() && hyper::header::HeaderValue::from_str(text).is_ok();
    if is_fit { Ok(text.to_owned()) } else { Err("expected a text that is valid in a header".to_owned()) }
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or("takes NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

impl Send {
    /// Rejects options that do not fit the kind of webhook.
    fn judge(&self) -> Result<(), BadUsage> {
        let is_command = self.kind == KindArg::CustomCommand;
        let what = if self.rate.is_some_and(|rate| !(0.001..=1e6).contains(&rate)) {
            "--rate takes a number from 0.001 to 1000000"
        } else if self.kind == KindArg::BeforeMessageSend && self.event_type.is_some() {
            "--type is for pushes and commands: before-message-send has no type"
        } else if !is_command && (self.args.is_some() || !self.form.is_empty()) {
            "--args and --form need --kind custom-command"
        } else if is_command && self.text.is_some() {
            "--text is for messages: a command has --type and --args"
        } else if self.event_type.as_deref().is_some_and(|name| name.trim_start_matches('/').is_empty()) {
            "--type takes the type of an event, or the name of a command"
        } else {
            return Ok(());
        };
        Err(BadUsage(what.to_owned()))
    }

    fn cast(&self) -> Result<Cast, BadUsage> {
        let channel = self.channel.as_deref().unwrap_or("streamgate-test");
        let (channel_type, id) = channel.split_once(':').unwrap_or(("messaging", channel));
        if channel_type.is_empty() || id.is_empty() {
            return Err(BadUsage(format!("--channel takes TYPE:ID, like messaging:general, not {channel:?}")));
        }
        let otherwise = |given: &Option<String>, default: &str| given.as_deref().unwrap_or(default).to_owned();
        let event_type = match self.kind {
            KindArg::Push => otherwise(&self.event_type, EVENT),
            KindArg::BeforeMessageSend => String::new(),
            KindArg::CustomCommand => self.command().to_owned(),
        };
        Ok(Cast {
            user: otherwise(&self.user, "streamgate-test"),
            channel: (channel_type.to_owned(), id.to_owned()),
            text: otherwise(&self.text, "A test message from streamgate send"),
            event_type,
            args: otherwise(&self.args, "from streamgate send"),
            form: self.form.iter().map(|(name, value)| (name.clone(), value.as_str().into())).collect(),
        })
    }

    fn command(&self) -> &str {
        self.event_type.as_deref().unwrap_or(COMMAND).trim_start_matches('/')
    }

    /// The edits of a given body. A callback of a pending message has its type in its path; a command's name is taken
    /// from the URL if the message has none.
    fn edits_of_file(&self, body: &[u8]) -> Vec<Edit> {
        let named = self.event_type.as_deref().and_then(|name| match self.kind {
            KindArg::Push => (!name.starts_with(PENDING)).then(|| Edit::of(&["type"], name)),
            KindArg::CustomCommand => {
                let message = Fields::parse(body).and_then(|body| body.object("message"))?;
                message.get("command").map(|_| Edit::of(&["message", "command"], self.command()))
            }
            KindArg::BeforeMessageSend => None,
        });
        named.into_iter().chain(self.set.clone()).collect()
    }

    /// Warns about a type that Stream does not document and that looks like a typo.
    fn doubt_type(&self) {
        let Some(name) = self.event_type.as_deref().filter(|_| self.kind == KindArg::Push) else { return };
        let is_known = event_types::CHAT.contains(&name)
            || event_types::OTHER_PRODUCTS.iter().any(|product| name.starts_with(product));
        if let (false, Some(meant)) = (is_known, nearest(name, event_types::CHAT.into_iter())) {
            tracing::warn!(
                "Stream documents no event type {name:?}; did you mean {meant:?}? It is sent as a custom event"
            );
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum KindArg {
    Push,
    BeforeMessageSend,
    CustomCommand,
}

impl KindArg {
    /// Path and query, as in Stream's settings.
    fn path(self, event_type: Option<&str>) -> String {
        match (self, event_type) {
            (KindArg::Push, Some("pending_message.passed_on")) => path::PASS_ON_PENDING_MESSAGE.to_owned(),
            (KindArg::Push, Some("pending_message.deleted")) => path::DELETED_PENDING_MESSAGE.to_owned(),
            (KindArg::Push, _) => path::PUSH.to_owned(),
            (KindArg::BeforeMessageSend, _) => path::BEFORE_MESSAGE_SEND.to_owned(),
            (KindArg::CustomCommand, name) => {
                let name = name.unwrap_or(COMMAND).trim_start_matches('/');
                format!("{}?type={}", path::CUSTOM_COMMANDS, utf8_percent_encode(name, COMMAND_NAME))
            }
        }
    }
}

pub async fn command(global: &Global, args: &Send) -> anyhow::Result<ExitCode> {
    if args.list_types {
        let types = event_types::CHAT;
        output::line(if args.json { serde_json::to_string(&types[..])? } else { types.join("\n") })?;
        return Ok(ExitCode::SUCCESS);
    }
    args.judge()?;
    args.doubt_type();
    let loaded = key::load(global)?;
    let Target { url, client } = Target::of(args, &loaded.config)?;
    let Key { api_key, secret } = Key::find(global, &loaded, args.api_key.as_deref())?;
    let webhooks = Webhooks::new(args, url.clone(), api_key, &secret)?;
    let started = Instant::now();
    let answers = send_all(args, client, webhooks).await?;
    let report = Report::new(answers, started.elapsed());
    if args.json {
        output::line(report.json()?)?;
    } else {
        output::line(report.text(&url))?;
    }
    Ok(if report.all_taken() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Keeps `concurrency` senders busy, at the given rate at most; returns when all webhooks are answered.
async fn send_all(args: &Send, client: HttpClient, webhooks: Webhooks) -> anyhow::Result<Vec<Answer>> {
    let bar = output::bar(args.count, "webhooks", args.json);
    let shared = Arc::new((client, webhooks, AtomicU64::new(0)));
    let pace = args.rate.map(|rate| Duration::from_secs_f64(1.0 / rate));
    let (count, started) = (args.count, tokio::time::Instant::now());
    let mut senders = JoinSet::new();
    for _ in 0..args.concurrency.min(count) {
        let (shared, bar) = (Arc::clone(&shared), bar.clone());
        senders.spawn(async move {
            let (client, webhooks, next) = &*shared;
            let mut answers = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return answers;
                }
                if let Some(pace) = pace {
                    tokio::time::sleep_until(started + pace.mul_f64(number as f64)).await;
                }
                answers.push(send_one(client, webhooks, number).await);
                bar.inc(1);
            }
        });
    }
    let mut answers = Vec::new();
    while let Some(sent) = senders.join_next().await {
        answers.extend(sent?);
    }
    bar.finish_and_clear();
    Ok(answers)
}

async fn send_one(client: &HttpClient, webhooks: &Webhooks, number: u64) -> Answer {
    let (id, request) = match webhooks.request() {
        Ok(made) => made,
        Err(error) => return Answer::failed(String::new(), error.to_string()),
    };
    let started = Instant::now();
    match exchange(client, request, TIMEOUT, MAX_ANSWER).await {
        Ok(response) => {
            let (parts, body) = response.into_parts();
            Answer::new(id, &parts, &body.unwrap_or_default(), started.elapsed())
        }
        Err(error) => Answer::failed(id, format!("webhook {}: {error}", number + 1)),
    }
}
