//! One run of `connect`: plan, ask, look again, write, read back, and say how it ended.

use super::Connect;
use super::hook::without_credentials;
use super::plan::{Mark, Plan, Step, Wanted};
use super::settings::{Settings, hook_differences};
use super::stream_api::{ApiError, StreamApi};
use crate::exit::{self, BadUsage};
use crate::{ask, output};
use anyhow::{Context, bail};
use serde_json::json;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What was written is read back so many times, a second apart, as Stream's own SDKs do: reads lag behind.
const READS: u32 = 5;
const BETWEEN_READS: Duration = Duration::from_secs(1);

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

/// One run: from settings to settings.
pub(super) struct Session<'a> {
    pub(super) args: &'a Connect,
    pub(super) api: StreamApi,
    pub(super) wanted: Wanted,
}

impl Session<'_> {
    pub(super) async fn run(&self, mut settings: Settings) -> anyhow::Result<ExitCode> {
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
    let mut lines = hook_differences(&expected.webhooks, &seen.webhooks);
    let plain = |name: &str, expected: String, seen: String| {
        (expected != seen).then(|| format!("{name}: expected {expected:?}, and it is {seen:?}"))
    };
    let url = without_credentials;
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
