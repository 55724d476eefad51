//! `streamgate connect`: points a Stream app at this gateway, and leaves other receivers' settings untouched.
//!
//! Stream replaces the list of hooks as a whole at each update, and has no version for optimistic locking. So the
//! settings are read, the plan is shown, the settings are read again right before the update, and every hook is
//! compared afterwards.

mod address;
mod drift;
mod event_types;
mod goal;
mod hook;
mod plan;
mod session;
mod settings;
mod step;
mod stream_api;
mod tree;
mod update;

use crate::exit::BadUsage;
use crate::global::Global;
use crate::{output, prompt};
use address::BaseUrl;
use anyhow::Context;
use clap::Args;
pub(crate) use drift::{Drift, look};
use goal::{Goal, HookUrl, Wanted};
use session::{Session, report_of_failure};
use settings::Settings;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;
use stream_api::StreamApi;
use streamgate_service::config::{AppConfig, Config, STREAM_LONGEST, Source};

/// Stream's API for apps of any region.
pub(crate) const STREAM_URL: &str = "https://chat.stream-io-api.com";
/// How much longer than our deadline Stream waits: the round trip. Chosen from the difference of both defaults, 1.5 s
/// and 1.2 s.
const MARGIN: Duration = Duration::from_millis(300);

#[derive(Debug, Args)]
pub struct Connect {
    /// Where Stream reaches this gateway: its public base URL
    #[arg(long)]
    url: String,
    /// The app of the configuration to use [default: the only one]
    #[arg(long, value_name = "NAME")]
    app: Option<String>,
    /// Only events of these types, with globs: message.*,reaction.new [default: every event]
    #[arg(long, value_name = "TYPE,…", value_delimiter = ',', conflicts_with = "remove")]
    event_types: Vec<String>,
    /// Custom events too
    #[arg(long, conflicts_with = "remove")]
    custom_events: bool,
    /// Set the URLs of before-message-send and custom commands, whatever the configuration answers
    #[arg(long, conflicts_with = "remove")]
    hooks: bool,
    /// Do not set these URLs, and remove them where they lead here
    #[arg(long, conflicts_with_all = ["hooks", "remove"])]
    no_hooks: bool,
    /// Have Stream compress bodies, for every receiver of the app; cannot be read back
    #[arg(long, conflicts_with = "remove")]
    compress: bool,
    /// Show what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask; without a terminal nothing is asked anyway
    #[arg(long)]
    yes: bool,
    /// Remove what leads to this gateway, and nothing else
    #[arg(long)]
    remove: bool,
    /// Write even if Stream does not show a foreign hook's secret, or foreign receivers would get compressed bodies
    #[arg(long)]
    force: bool,
    /// Replace a URL that leads to another receiver
    #[arg(long)]
    replace: bool,
    /// Stream's API
    #[arg(long, value_name = "URL", default_value = STREAM_URL)]
    stream_url: String,
    /// Skip the check of the public URL
    #[arg(long)]
    no_verify: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub async fn command(global: &Global, args: &Connect) -> anyhow::Result<ExitCode> {
    let result = run(global, args).await;
    if let (true, Err(error)) = (args.json, &result) {
        output::line(report_of_failure(error))?;
    }
    result
}

async fn run(global: &Global, args: &Connect) -> anyhow::Result<ExitCode> {
    let is_asked = !args.yes && !args.dry_run && std::io::stdin().is_terminal();
    if is_asked && (args.json || !std::io::stdout().is_terminal() || !prompt::is_possible()) {
        let what =
            "the plan would not be shown on this terminal, so nothing can be asked about it: add --yes or --dry-run";
        return Err(BadUsage(what.to_owned()).into());
    }
    let base = BaseUrl::parse(&args.url, "--url")?;
    let stream = BaseUrl::parse(&args.stream_url, "--stream-url")?;
    let source = global.source();
    let loaded = global.load_from(&Source { environment: source.environment.without_route_secrets(), ..source })?;
    let app = app(&loaded.config.apps, args.app.as_deref())?;
    if !args.remove {
        let is_this_machine = args.no_verify && base.is_loopback() && stream.is_loopback();
        if let Some(why) = base.unreachable().filter(|_| !is_this_machine) {
            return Err(BadUsage(format!("--url: {why}")).into());
        }
        if !args.no_verify {
            base.try_it().await.map_err(anyhow::Error::msg)?;
        }
    }
    let (api, settings) = sign_in(&stream, app).await?;
    let wanted = wanted(args, base, &loaded.config, &api).await?;
    Session { args, api, wanted }.run(settings).await
}

/// The named app, or the only one.
fn app<'a>(apps: &'a [AppConfig], name: Option<&str>) -> Result<&'a AppConfig, BadUsage> {
    let names = || AppConfig::names(apps).join(", ");
    match (apps, name) {
        ([], _) => {
            let what =
                "no app is configured: set STREAM_API_KEY and STREAM_API_SECRET, or name a --config with [[apps]]";
            Err(BadUsage(what.to_owned()))
        }
        ([app], None) => Ok(app),
        (_, None) => Err(BadUsage(format!("--app names which: {}", names()))),
        (apps, Some(name)) => {
            let found = apps.iter().find(|app| app.name == name);
            found.ok_or_else(|| BadUsage(format!("--app: the configuration has no app {name:?}; it has {}", names())))
        }
    }
}

/// Signs in with the first key and secret that Stream accepts: during a rotation some are not valid yet, or no longer.
async fn sign_in(stream: &BaseUrl, app: &AppConfig) -> anyhow::Result<(StreamApi, Settings)> {
    let mut refused = None;
    for key in &app.keys {
        // A secret may be absent on a host that verifies no webhooks.
        for secret in key.secrets.iter().filter(|secret| !secret.expose().is_empty()) {
            let api = StreamApi::new(stream, &key.api_key, secret)?;
            let api = api.ok_or_else(|| {
                BadUsage("--stream-url must be https: the token in each request is as good as the secret".to_owned())
            })?;
            match api.app().await {
                Ok(app) => return Ok((api, Settings::of(&app).map_err(anyhow::Error::msg)?)),
                Err(error) if error.is_auth() => {
                    tracing::debug!(api_key = key.api_key, %error, "Stream does not take this secret");
                    refused.get_or_insert(error);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    Err(refused.context("the app's secret is not here: run this where the gateway's secrets are")?.into())
}

async fn wanted(args: &Connect, base: BaseUrl, config: &Config, api: &StreamApi) -> anyhow::Result<Wanted> {
    let timeout =
        u64::try_from((moderation_deadline(config) + MARGIN).min(STREAM_LONGEST).as_millis()).unwrap_or_default();
    let goal = if args.remove {
        Goal::Remove { timeout }
    } else {
        Goal::Connect {
            event_types: event_types::expand(&args.event_types, api).await?,
            custom_events: args.custom_events,
            before_message_send: hook_url(args, &base, answers_moderation(config)),
            custom_commands: hook_url(args, &base, answers_commands(config)),
            timeout,
            compress: args.compress,
        }
    };
    let remarks = if args.remove { Vec::new() } else { remarks(args, &base, config).await };
    Ok(Wanted { base, goal, remarks, may_replace: args.replace, is_forced: args.force })
}

/// Remarks that do not depend on the app's settings.
async fn remarks(args: &Connect, base: &BaseUrl, config: &Config) -> Vec<String> {
    let mut remarks = Vec::new();
    if !base.is_tls() {
        remarks.push("http: what users write goes to the gateway unencrypted".to_owned());
    }
    if !base.is_loopback() && base.is_private_from_here().await {
        remarks.push(
            "every address that this name has here is of a private network: Stream refuses the URL unless it finds a public one".to_owned(),
        );
    }
    let answers_hooks = answers_moderation(config) || answers_commands(config);
    if let Some(tunnel) = base.tunnel().filter(|_| answers_hooks && !args.hooks && !args.no_hooks) {
        remarks.push(format!(
            "{tunnel} is a tunnel: the URLs of synchronous hooks are left alone, since every message would wait for a laptop (--hooks \
             sets them)"
        ));
    }
    let deadline = moderation_deadline(config);
    let is_set = hook_url(args, base, answers_moderation(config)) == HookUrl::Set;
    if is_set && deadline + MARGIN > STREAM_LONGEST {
        remarks.push(format!(
            "Stream waits {STREAM_LONGEST:?} for before-message-send at the most, and this gateway may take {deadline:?}, without the \
             way there and back: set hooks.before_message_send.deadline to {:?} or less",
            STREAM_LONGEST.saturating_sub(MARGIN)
        ));
    }
    remarks
}

/// The latest time at which before-message-send is answered.
fn moderation_deadline(config: &Config) -> Duration {
    config.hooks.before_message_send.policy.deadline.min(config.gateway.answer_deadline)
}

fn answers_moderation(config: &Config) -> bool {
    let moderation = &config.hooks.before_message_send;
    moderation.handler.is_some() || !moderation.rules.is_empty()
}

fn answers_commands(config: &Config) -> bool {
    let commands = &config.hooks.custom_commands;
    commands.handler.is_some() || !commands.commands.is_empty()
}

/// Sets the URL only where a hook is answered, since an unanswered one delays every message by Stream's timeout; and
/// not on a tunnel, which closes one day.
fn hook_url(args: &Connect, base: &BaseUrl, is_answered: bool) -> HookUrl {
    match (args.hooks, args.no_hooks) {
        (true, _) => HookUrl::Set,
        (_, true) => HookUrl::Clear,
        (false, false) if is_answered && base.tunnel().is_none() => HookUrl::Set,
        (false, false) => HookUrl::Keep,
    }
}
