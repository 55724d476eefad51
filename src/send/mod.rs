//! `streamgate send`: signs and sends test webhooks, as Stream would.

mod report;
mod webhook;

use crate::cli::Global;
use crate::exit::BadUsage;
use crate::{dev, output};
use clap::{Args, ValueEnum};
use http_body_util::{BodyExt, Limited};
use hyper::Uri;
use report::{Answer, Report};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use streamgate_service::config::KeyConfig;
use streamgate_service::http_client::{self, CallError, HttpClient, causes};
use tokio::task::JoinSet;
use webhook::Webhooks;

/// Stream hangs up on a push after this long.
const TIMEOUT: Duration = Duration::from_secs(6);
/// Bytes of an answer that are looked at.
const MAX_ANSWER: usize = 8 << 20;

#[derive(Debug, Args)]
pub struct Send {
    /// Where to: the gateway's base URL, or the whole URL of a webhook
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Which kind of webhook
    #[arg(long, value_enum, default_value = "push")]
    kind: KindArg,
    /// The event's type, or the command's name, in a body made for it [default: message.new, ticket]
    #[arg(long = "type", value_name = "TYPE", conflicts_with = "file")]
    event_type: Option<String>,
    /// Send this body, byte for byte; - reads it from stdin. With --count each event gets a created_at of its own
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// How many webhooks to send
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// Start at most this many a second; without it, as fast as the answers come
    #[arg(long, value_name = "R")]
    rate: Option<f64>,
    /// Most requests at a time
    #[arg(long, value_name = "N", default_value = "16", value_parser = clap::value_parser!(u64).range(1..=4096))]
    concurrency: u64,
    /// Compress the body, as Stream does where hook payload compression is on
    #[arg(long)]
    gzip: bool,
    /// X-Webhook-Attempt
    #[arg(long, value_name = "N", default_value = "1")]
    attempt: u32,
    /// X-Webhook-Id, the same for every webhook; without it each has one of its own
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Sign as the app with this API key, where the configuration has several
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// A PEM file of certificate authorities to trust beside the system's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum KindArg {
    Push,
    BeforeMessageSend,
    CustomCommand,
}

impl KindArg {
    /// Path and query, as Stream's settings would have them.
    fn path(self, event_type: Option<&str>) -> String {
        match self {
            KindArg::Push => "/webhooks/stream/push".to_owned(),
            KindArg::BeforeMessageSend => "/webhooks/stream/before-message-send".to_owned(),
            KindArg::CustomCommand => {
                format!("/webhooks/stream/custom-commands?type={}", event_type.unwrap_or(webhook::COMMAND))
            }
        }
    }
}

pub async fn command(global: &Global, args: &Send) -> anyhow::Result<ExitCode> {
    let key = key(global, args.api_key.as_deref())?;
    if args.rate.is_some_and(|rate| !(0.001..=1e6).contains(&rate)) {
        return Err(BadUsage("--rate takes a number from 0.001 to 1000000".into()).into());
    }
    if args.kind == KindArg::BeforeMessageSend && args.event_type.is_some() {
        return Err(BadUsage("--type goes with pushes and commands: before-message-send has no type".into()).into());
    }
    let url = url(&args.url, &args.kind.path(args.event_type.as_deref()))?;
    let webhooks = Webhooks::new(args, url.clone(), &key)?;
    let client = http_client::client(args.ca.as_deref())?;
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

/// The key to sign with: of the configuration, else of the development app that `up` made.
fn key(global: &Global, api_key: Option<&str>) -> anyhow::Result<KeyConfig> {
    let loaded = global.load()?;
    let mut apps = loaded.config.apps;
    if apps.is_empty() {
        apps.extend(dev::existing(&loaded.config.store.data_dir)?);
    }
    let mut keys = apps.into_iter().flat_map(|app| app.keys);
    let found = match api_key {
        Some(named) => keys.find(|key| key.api_key == named),
        None => keys.next(),
    };
    let missing = || match api_key {
        Some(named) => BadUsage(format!("no app in the configuration has the API key {named:?}")),
        None => BadUsage(format!(
            "there is no secret to sign with: set STREAM_API_KEY and STREAM_API_SECRET, name a --config with an app, \
             or name the --data-dir of a running `streamgate up` (looked in {})",
            loaded.config.store.data_dir.display()
        )),
    };
    Ok(found.ok_or_else(missing)?)
}

/// A base URL gets the path of the kind; a URL that has a path is taken as it is.
fn url(text: &str, path: &str) -> Result<Uri, BadUsage> {
    let wrong = || BadUsage(format!("--url takes a URL like http://127.0.0.1:8080, not {text:?}"));
    if text.contains('@') {
        return Err(BadUsage("--url takes no user and password".to_owned()));
    }
    let url: Uri = text.parse().map_err(|_| wrong())?;
    if !matches!(url.scheme_str(), Some("http" | "https")) || url.host().is_none_or(str::is_empty) {
        return Err(wrong());
    }
    if url.path() != "/" || url.query().is_some() {
        return Ok(url);
    }
    let mut parts = url.into_parts();
    parts.path_and_query = Some(path.parse().map_err(|_| BadUsage(format!("no URL can carry --type: {path:?}")))?);
    Uri::from_parts(parts).map_err(|_| wrong())
}

/// Keeps `concurrency` senders busy, at most at the rate; ends when all are answered.
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
    let answer = async {
        let response = client.request(request).await?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        Ok::<_, CallError>((parts, body))
    };
    match tokio::time::timeout(TIMEOUT, answer).await {
        Ok(Ok((parts, body))) => Answer::new(id, &parts, &body, started.elapsed()),
        Ok(Err(error)) => Answer::failed(id, causes(&error)),
        Err(_) => Answer::failed(id, format!("no answer within {TIMEOUT:?} to webhook {}", number + 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_gets_the_path() {
        let path =
            |text| url(text, &KindArg::Push.path(None)).map(|url| url.to_string()).map_err(|error| error.to_string());
        assert_eq!(path("http://127.0.0.1:8080").unwrap(), "http://127.0.0.1:8080/webhooks/stream/push");
        assert_eq!(path("https://host/").unwrap(), "https://host/webhooks/stream/push");
        assert_eq!(path("http://host/other?x=1").unwrap(), "http://host/other?x=1");
        let command = url("http://h", &KindArg::CustomCommand.path(Some("giphy"))).unwrap();
        assert_eq!(command.to_string(), "http://h/webhooks/stream/custom-commands?type=giphy");
        assert!(path("127.0.0.1:8080").is_err() && path("ftp://host").is_err() && path("").is_err());
    }
}
