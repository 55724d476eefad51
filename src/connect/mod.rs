//! `streamgate connect`: points a Stream app at this gateway, and touches nothing of anybody else's.
//!
//! Stream replaces the list of hooks whole at each update and has no version to hold an update against. So the settings are read, the
//! plan is shown, they are read again right before the update, and every hook is compared afterwards.

mod address;
mod drift;
mod event_types;
mod hook;
mod plan;
mod settings;
mod stream_api;

use crate::cli::Global;
use crate::exit::{self, BadUsage};
use crate::{ask, output};
use address::BaseUrl;
use anyhow::{Context, bail};
use clap::Args;
pub(crate) use drift::{Drift, look};
use plan::{Goal, HookUrl, Mark, Plan, Step, Wanted};
use serde_json::json;
use settings::Settings;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;
use stream_api::{ApiError, StreamApi};
use streamgate_service::config::{AppConfig, Config, Source};
use tokio_util::sync::CancellationToken;

/// Stream's API for apps of any region.
pub(crate) const STREAM_URL: &str = "https://chat.stream-io-api.com";
/// What Stream waits longer than our deadline: the way there and back. Chosen, as between the defaults of both: 1.5 s and 1.2 s.
const MARGIN: Duration = Duration::from_millis(300);
/// The longest that Stream can be told to wait.
const LONGEST: Duration = Duration::from_secs(5);
/// What was written is read back so many times, a second apart, as Stream's own SDKs do: reads lag behind.
const READS: u32 = 5;
const BETWEEN_READS: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct Connect {
    /// Where Stream reaches this gateway: its public base URL
    #[arg(long)]
    url: String,
    /// Which app of the configuration [default: the only one]
    #[arg(long, value_name = "NAME")]
    app: Option<String>,
    /// Only events of these types, with globs: message.*,reaction.new [default: every event]
    #[arg(long, value_name = "TYPE,…", value_delimiter = ',', conflicts_with = "remove")]
    event_types: Vec<String>,
    /// Events of the app's own types too
    #[arg(long, conflicts_with = "remove")]
    custom_events: bool,
    /// Set the URLs of before-message-send and custom commands, whatever the configuration answers
    #[arg(long, conflicts_with = "remove")]
    hooks: bool,
    /// Leave them out, and take them out where they lead here
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
    /// Take out what leads to this gateway, and nothing else
    #[arg(long)]
    remove: bool,
    /// Write although a foreign hook's secret is not shown by Stream, or foreign receivers would get compressed bodies
    #[arg(long)]
    force: bool,
    /// Replace a URL that leads to somebody else
    #[arg(long)]
    replace: bool,
    /// Stream's API
    #[arg(long, value_name = "URL", default_value = STREAM_URL)]
    stream_url: String,
    /// Leave out the try of the public URL
    #[arg(long)]
    no_verify: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    NothingToDo,
    WouldChange,
    Refused,
    Written,
    /// Stream took it, and still shows the settings before it.
    NotYetVisible,
}

pub async fn command(global: &Global, args: &Connect) -> anyhow::Result<ExitCode> {
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
    let mut session = Session { args, api, wanted };
    session.run(settings).await
}

/// The app that is named, or the only one.
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

/// With the first key and secret that Stream takes: during a rotation some are not valid yet, or no longer.
async fn sign_in(stream: &BaseUrl, app: &AppConfig) -> anyhow::Result<(StreamApi, Settings)> {
    let mut refused = None;
    for key in &app.keys {
        // A host that verifies no webhook need not have them.
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
    let timeout = u64::try_from((moderation_deadline(config) + MARGIN).min(LONGEST).as_millis()).unwrap_or_default();
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
    Ok(Wanted { base, goal, may_replace: args.replace, is_forced: args.force })
}

/// When before-message-send is answered at the latest.
fn moderation_deadline(config: &Config) -> Duration {
    config.hooks.before_message_send.policy.deadline.min(config.gateway.answer_deadline)
}

fn answers_moderation(config: &Config) -> bool {
    let moderation = &config.hooks.before_message_send;
    moderation.forward.is_some() || !moderation.rules.is_empty()
}

fn answers_commands(config: &Config) -> bool {
    let commands = &config.hooks.custom_commands;
    commands.forward.is_some() || !commands.commands.is_empty()
}

/// A hook that nobody answers costs every message Stream's timeout, and a tunnel is closed one evening.
fn hook_url(args: &Connect, base: &BaseUrl, is_answered: bool) -> HookUrl {
    match (args.hooks, args.no_hooks) {
        (true, _) => HookUrl::Set,
        (_, true) => HookUrl::Clear,
        (false, false) if is_answered && base.tunnel().is_none() => HookUrl::Set,
        (false, false) => HookUrl::Keep,
    }
}

/// One run: from settings to settings.
struct Session<'a> {
    args: &'a Connect,
    api: StreamApi,
    wanted: Wanted,
}

impl Session<'_> {
    async fn run(&mut self, mut settings: Settings) -> anyhow::Result<ExitCode> {
        let mut plan = self.plan(&settings);
        self.show(&settings, &plan)?;
        if !plan.refusals.is_empty() {
            return self.end(&settings, &plan, Outcome::Refused);
        }
        if !plan.changes_anything() {
            return self.end(&settings, &plan, Outcome::NothingToDo);
        }
        if self.args.dry_run {
            return self.end(&settings, &plan, Outcome::WouldChange);
        }
        self.ask().await?;
        // Somebody else may have changed them since they were read; nothing but a look right before the update can tell.
        let again = self.read().await?;
        if !again.says_same(&settings) {
            settings = again;
            plan = self.plan(&settings);
            self.note("! the settings were changed meanwhile; planned anew:")?;
            self.show(&settings, &plan)?;
            if !plan.refusals.is_empty() {
                return self.end(&settings, &plan, Outcome::Refused);
            }
            self.ask().await?;
            if !self.read().await?.says_same(&settings) {
                bail!(
                    "somebody else changes this app's settings right now; nothing was written: try again when they are done"
                );
            }
        }
        let outcome = self.write(&settings, &plan).await?;
        self.end(&settings, &plan, outcome)
    }

    fn plan(&self, settings: &Settings) -> Plan {
        Plan::of(settings, &self.wanted)
    }

    async fn read(&self) -> anyhow::Result<Settings> {
        Settings::of(&self.api.app().await?).map_err(anyhow::Error::msg)
    }

    async fn ask(&self) -> anyhow::Result<()> {
        if !self.args.yes && std::io::stdin().is_terminal() && (self.args.json || !std::io::stderr().is_terminal()) {
            return Err(BadUsage(
                "nothing can be asked like this, and nothing was written: add --yes or --dry-run".to_owned(),
            )
            .into());
        }
        if self.args.yes || ask::agreed("Write this to the app's settings?", &CancellationToken::new()).await? {
            return Ok(());
        }
        bail!("nothing was written")
    }

    /// The list of hooks first, and the rest once it is there: Stream refuses an update as a whole.
    async fn write(&self, before: &Settings, plan: &Plan) -> anyhow::Result<Outcome> {
        let mut outcome = Outcome::NothingToDo;
        let bodies = plan.bodies();
        let count = bodies.len();
        for (number, body) in bodies.iter().enumerate() {
            if outcome == Outcome::NotYetVisible {
                bail!("written in part, and Stream does not show it yet: the same command in a minute writes the rest");
            }
            if number == 1 && plan.begins_with_hooks() && self.read().await?.plain() != before.plain() {
                bail!(
                    "the event hooks were written; then somebody else changed the URLs: the same command plans them anew"
                );
            }
            self.api.update_app(body).await.map_err(|error| unsure(error, number > 0))?;
            outcome = self.read_back(before, plan, number + 1 == count).await?;
        }
        Ok(outcome)
    }

    /// Waits until Stream shows what was written. `is_all`: else only the webhooks.
    async fn read_back(&self, before: &Settings, plan: &Plan, is_all: bool) -> anyhow::Result<Outcome> {
        let mut seen = None;
        for read in 0..READS {
            if read > 0 {
                tokio::time::sleep(BETWEEN_READS).await;
            }
            let now = self.read().await.context("written, but it cannot be read back")?;
            let is_there = if is_all { now.holds(&plan.expected) } else { now.webhooks.holds(&plan.expected.webhooks) };
            if is_there {
                return Ok(Outcome::Written);
            }
            seen = Some(now);
        }
        match seen {
            Some(now) if !now.is_between(before, &plan.expected) => {
                bail!(
                    "written, and Stream shows something else:\n{}\ncompare with the app's dashboard, or run the same command again",
                    differences(&plan.expected, &now).join("\n")
                )
            }
            Some(_) | None => Ok(Outcome::NotYetVisible),
        }
    }

    fn show(&self, settings: &Settings, plan: &Plan) -> anyhow::Result<()> {
        self.note(&settings.app)?;
        for Step { mark, what } in self.remarks().iter().chain(&plan.steps) {
            self.note(format!("{} {what}", mark.sign()))?;
        }
        Ok(())
    }

    /// What is worth a thought, whatever the settings are.
    fn remarks(&self) -> Vec<Step> {
        let attention = |what: String| Step { mark: Mark::Attention, what };
        let is_plain = !self.args.remove && !self.wanted.base.is_tls();
        let plain = is_plain.then(|| attention("http: what users write goes to the gateway unencrypted".to_owned()));
        let tunnel = self.wanted.base.tunnel().filter(|_| !self.args.remove && !self.args.hooks && !self.args.no_hooks);
        let tunnel = tunnel.map(|tunnel| {
            attention(format!(
                "{tunnel} is a tunnel: the URLs of synchronous hooks are left alone, since every message would wait for a laptop \
                 (--hooks sets them)"
            ))
        });
        plain.into_iter().chain(tunnel).collect()
    }

    /// A line for people.
    fn note(&self, text: impl std::fmt::Display) -> anyhow::Result<()> {
        if !self.args.json {
            output::line(text)?;
        }
        Ok(())
    }

    fn end(&self, settings: &Settings, plan: &Plan, outcome: Outcome) -> anyhow::Result<ExitCode> {
        if self.args.json {
            output::line(self.report(settings, plan, outcome))?;
        } else {
            for refusal in &plan.refusals {
                output::line(format!("refused: {refusal}"))?;
            }
            let done = if self.args.remove { "what led here is taken out" } else { "the app is connected" };
            output::line(match outcome {
                Outcome::NothingToDo => "nothing to change".to_owned(),
                Outcome::WouldChange => "nothing was written (--dry-run)".to_owned(),
                Outcome::Refused => "nothing was written".to_owned(),
                Outcome::Written => format!("written and read back; {done}"),
                Outcome::NotYetVisible => {
                    "written, not yet visible: look again in a minute with the same command".to_owned()
                }
            })?;
        }
        Ok(match outcome {
            Outcome::Refused => ExitCode::from(exit::FAILED),
            Outcome::NothingToDo | Outcome::WouldChange | Outcome::Written | Outcome::NotYetVisible => {
                ExitCode::SUCCESS
            }
        })
    }

    fn report(&self, settings: &Settings, plan: &Plan, outcome: Outcome) -> serde_json::Value {
        let app = &settings.app;
        let remarks = self.remarks();
        let steps = remarks.iter().chain(&plan.steps);
        let steps: Vec<_> = steps.map(|step| json!({ "mark": step.mark.name(), "what": step.what })).collect();
        json!({
            "ok": outcome != Outcome::Refused,
            "app": { "id": app.id, "name": app.name, "region": app.region, "suspended": app.is_suspended },
            "plan": steps,
            "refused": plan.refusals,
            "changes": plan.changes_anything(),
            "written": matches!(outcome, Outcome::Written | Outcome::NotYetVisible),
            "visible": outcome == Outcome::Written,
        })
    }
}

/// What did not come back as it was written, both sides of it. Hooks hold secrets: of them only which.
fn differences(expected: &Settings, seen: &Settings) -> Vec<String> {
    let mut lines = settings::hook_differences(&expected.webhooks, &seen.webhooks);
    let plain = |name: &str, expected: String, seen: String| {
        (expected != seen).then(|| format!("{name}: expected {expected:?}, and it is {seen:?}"))
    };
    let url = |url: &str| hook::without_credentials(url);
    lines.extend(plain(
        "before_message_send_hook_url",
        url(&expected.before_message_send_url),
        url(&seen.before_message_send_url),
    ));
    lines.extend(plain(
        "before_message_send_hook_attempt_timeout_ms",
        expected.before_message_send_timeout.to_string(),
        seen.before_message_send_timeout.to_string(),
    ));
    lines.extend(plain(
        "custom_action_handler_url",
        url(&expected.custom_action_handler_url),
        url(&seen.custom_action_handler_url),
    ));
    lines
}

/// An update that had no answer may have been done. `is_begun`: there were updates before it.
fn unsure(error: ApiError, is_begun: bool) -> anyhow::Error {
    let is_unsure = match &error {
        ApiError::Unreachable { .. } | ApiError::TooSlow { .. } | ApiError::Foreign { .. } => true,
        ApiError::Refused { status, .. } => *status >= 500,
        ApiError::Client(_) => false,
    };
    let error = anyhow::Error::from(error);
    match (is_unsure, is_begun) {
        (true, _) => {
            error.context("it is not known whether Stream wrote it; the same command again writes what is missing")
        }
        (false, false) => error.context("nothing was written"),
        (false, true) => error.context("written in part: the same command shows what is missing"),
    }
}
