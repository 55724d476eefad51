//! One run of `connect`: plan, ask, read again, write, read back, and report the outcome.

use super::Connect;
use super::goal::Wanted;
use super::plan::Plan;
use super::settings::{Settings, differences};
use super::step::{Mark, Step};
use super::stream_api::{ApiError, StreamApi};
use super::update::{Part, Update};
use crate::{exit, output, prompt};
use anyhow::Context;
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Reads after a write, a second apart, as in Stream's own SDKs: reads lag behind writes.
const READS: u32 = 5;
const BETWEEN_READS: Duration = Duration::from_secs(1);

/// How the run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    NothingToDo,
    WouldChange,
    Refused,
    Written,
    /// Stream accepted the update, and still shows the old settings.
    NotYetVisible,
}

/// What a failed run did to the app's settings: the context of its error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Written {
    #[error("nothing was written")]
    Nothing,
    #[error("only part was written: run the same command again to write the rest")]
    InPart,
    #[error("it is not known whether Stream wrote it; the same command again writes what is missing")]
    Unknown,
    #[error("Stream took the update, and what it shows now is not what was written")]
    Unverified,
    #[error("Stream took the update, but the result could not be read back: run the same command again to compare")]
    Unread,
}

/// One run.
pub(super) struct Session<'a> {
    pub(super) args: &'a Connect,
    pub(super) api: StreamApi,
    pub(super) wanted: Wanted,
}

impl Session<'_> {
    pub(super) async fn run(&self, mut settings: Settings) -> anyhow::Result<ExitCode> {
        let mut plan = self.plan(&settings);
        self.show(&settings, &plan)?;
        if let Some(outcome) = self.outcome_without_writing(&plan) {
            return self.end(&settings, &plan, outcome);
        }
        self.ask().await?;
        // Someone else may have changed the settings since they were read; only a read right before the update can show
        // that.
        let again = self.read().await.context(Written::Nothing)?;
        let is_same = again.is_equivalent(&settings);
        settings = again;
        plan = self.plan(&settings);
        if !is_same {
            self.note("! the settings were changed meanwhile; planned anew:")?;
            self.show(&settings, &plan)?;
            if let Some(outcome) = self.outcome_without_writing(&plan) {
                return self.end(&settings, &plan, outcome);
            }
            self.ask().await?;
            let again = self.read().await.context(Written::Nothing)?;
            if !again.is_equivalent(&settings) {
                let what = "someone else is changing this app's settings: try again later";
                return Err(anyhow::Error::msg(what).context(Written::Nothing));
            }
        }
        let outcome = self.write(settings.clone(), &mut plan).await?;
        self.end(&settings, &plan, outcome)
    }

    fn plan(&self, settings: &Settings) -> Plan {
        Plan::of(settings, &self.wanted)
    }

    fn outcome_without_writing(&self, plan: &Plan) -> Option<Outcome> {
        if plan.is_refused() {
            Some(Outcome::Refused)
        } else if !plan.changes_anything() {
            Some(Outcome::NothingToDo)
        } else {
            self.args.dry_run.then_some(Outcome::WouldChange)
        }
    }

    async fn read(&self) -> anyhow::Result<Settings> {
        Settings::of(&self.api.app().await?).map_err(anyhow::Error::msg)
    }

    async fn ask(&self) -> anyhow::Result<()> {
        if self.args.yes || prompt::confirmed("Write this to the app's settings?", &CancellationToken::new()).await? {
            return Ok(());
        }
        Err(Written::Nothing.into())
    }

    /// Writes one part after the other, each once the previous one is visible.
    async fn write(&self, mut reached: Settings, plan: &mut Plan) -> anyhow::Result<Outcome> {
        let mut outcome = Outcome::NothingToDo;
        let updates = plan.updates();
        let count = updates.len();
        for (number, update) in updates.into_iter().enumerate() {
            if outcome == Outcome::NotYetVisible {
                let what = "Stream does not show the first part yet: wait a minute before the same command";
                return Err(anyhow::Error::msg(what).context(Written::InPart));
            }
            if number > 0 && !update.part.is_same(&self.read().await.context(Written::InPart)?, &reached) {
                let what = "then someone else changed the settings: run the same command again";
                return Err(anyhow::Error::msg(what).context(Written::InPart));
            }
            match self.api.update_app(&update.body).await {
                Ok(()) => outcome = self.read_back(&reached, &update, number + 1 == count).await?,
                // Everything else is done, and the timeout of a hook that is not called is harmless.
                Err(error @ ApiError::Refused { status: 400, .. }) if update.part == Part::Default && number > 0 => {
                    let what = format!("Stream does not take its own default back, so the timeout stays: {error}");
                    self.note(format!("{} {what}", Mark::Attention.sign()))?;
                    plan.steps.push(Step { mark: Mark::Attention, what });
                    continue;
                }
                Err(error) => return Err(failed(error, number > 0)),
            }
            reached = update.expected;
        }
        Ok(outcome)
    }

    /// Waits until Stream shows what was written; after the last update, until it shows everything expected.
    async fn read_back(&self, before: &Settings, update: &Update, is_last: bool) -> anyhow::Result<Outcome> {
        let expected = &update.expected;
        let mut seen = None;
        for read in 0..READS {
            if read > 0 {
                tokio::time::sleep(BETWEEN_READS).await;
            }
            let now = self.read().await.with_context(|| format!("{} cannot be read back", update.part));
            let now = now.context(Written::Unread)?;
            let is_there = if is_last { now.holds(expected) } else { update.is_in(&now) };
            if is_there {
                return Ok(Outcome::Written);
            }
            seen = Some(now);
        }
        match seen {
            Some(now) if !now.is_between(before, expected) => Err(anyhow::anyhow!(
                "{}; compare with the app's dashboard, or run the same command again",
                differences(expected, &now).join(" | ")
            )
            .context(Written::Unverified)),
            Some(_) | None => Ok(Outcome::NotYetVisible),
        }
    }

    fn show(&self, settings: &Settings, plan: &Plan) -> anyhow::Result<()> {
        self.note(&settings.app)?;
        for Step { mark, what } in &plan.steps {
            self.note(format!("{} {what}", mark.sign()))?;
        }
        Ok(())
    }

    /// Prints a line for the user.
    fn note(&self, text: impl std::fmt::Display) -> anyhow::Result<()> {
        if !self.args.json {
            output::line(text)?;
        }
        Ok(())
    }

    fn end(&self, settings: &Settings, plan: &Plan, outcome: Outcome) -> anyhow::Result<ExitCode> {
        if self.args.json {
            output::line(report(settings, plan, outcome))?;
        } else {
            for refusal in &plan.refusals {
                output::line(format!("refused: {refusal}"))?;
            }
            let done = match (self.args.remove, plan.refusals.is_empty()) {
                (true, true) => "what led here is taken out",
                (true, false) => "what was refused still leads here",
                (false, _) => "the app is connected",
            };
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
        Ok(if plan.refusals.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(exit::FAILED) })
    }
}

fn report(settings: &Settings, plan: &Plan, outcome: Outcome) -> serde_json::Value {
    let app = &settings.app;
    let steps: Vec<_> = plan.steps.iter().map(|step| json!({ "mark": step.mark.name(), "what": step.what })).collect();
    json!({
        "ok": plan.refusals.is_empty(),
        "app": { "id": app.id, "name": app.name, "region": app.region, "suspended": app.is_suspended },
        "plan": steps,
        "refused": plan.refusals,
        "changes": plan.changes_anything(),
        "written": matches!(outcome, Outcome::Written | Outcome::NotYetVisible),
        "visible": outcome == Outcome::Written,
    })
}

/// The JSON report of a failed run. `written` is null if it is not known.
pub(super) fn report_of_failure(error: &anyhow::Error) -> serde_json::Value {
    let written = match error.downcast_ref::<Written>() {
        None | Some(Written::Nothing) => Some(false),
        Some(Written::InPart | Written::Unverified | Written::Unread) => Some(true),
        Some(Written::Unknown) => None,
    };
    json!({ "ok": false, "error": format!("{error:#}"), "written": written })
}

/// The error for an update that failed, or that may have succeeded without an answer. `is_begun`: whether there were
/// updates before it.
fn failed(error: ApiError, is_begun: bool) -> anyhow::Error {
    let is_unsure = match &error {
        ApiError::Unreachable { .. } | ApiError::TooSlow { .. } => true,
        ApiError::Refused { status, .. } | ApiError::Foreign { status, .. } => *status >= 500 || *status < 400,
        ApiError::Client(_) => false,
    };
    let written = match (is_unsure, is_begun) {
        (true, _) => Written::Unknown,
        (false, true) => Written::InPart,
        (false, false) => Written::Nothing,
    };
    anyhow::Error::from(error).context(written)
}
