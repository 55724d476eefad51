//! The log line of each attempt: which event, what its result was, and what comes next.

use crate::handler::HandlerError;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::allowance::Allowance;
use streamgate_core::duration::rounded;
use streamgate_core::envelope::Envelope;
use streamgate_core::ports::Settlement;
use streamgate_service::config::Lines;

/// Interval between summaries of attempts without a line of their own.
const SUMMARY: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) struct AttemptLog {
    lines: Lines,
    /// Limits the lines, so that a service that is down does not fill the log.
    failures: Mutex<Allowance>,
}

/// One attempt that has ended.
pub(crate) struct Attempt<'a> {
    pub(crate) route: &'a str,
    pub(crate) envelope: &'a Envelope,
    pub(crate) took: Duration,
    pub(crate) result: &'a Result<(), HandlerError>,
    pub(crate) settlement: &'a Settlement,
}

impl AttemptLog {
    pub(crate) fn new(lines: Lines) -> AttemptLog {
        AttemptLog { lines, failures: Mutex::default() }
    }

    pub(crate) fn ended(&self, attempt: &Attempt<'_>) {
        let Attempt { route, envelope, took, result, settlement } = attempt;
        let Envelope { id, key, event_type, attempt, .. } = envelope;
        let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        let Err(error) = result else {
            if self.lines == Lines::All {
                let age_ms = jiff::Timestamp::now().as_millisecond().saturating_sub(envelope.received_at_ms);
                tracing::info!(route, id, key, r#type = event_type, attempt, outcome = "done", ms, age_ms, "handled");
            }
            return;
        };
        let next = next(settlement);
        if self.lines == Lines::None || (self.lines == Lines::Failures && !self.allows(route, next.outcome)) {
            return;
        }
        match next.again_in {
            Some(again_in) => {
                tracing::warn!(route, id, key, r#type = event_type, attempt, outcome = next.outcome, %error, ms, ?again_in, "an attempt failed");
            }
            None => {
                tracing::error!(route, id, key, r#type = event_type, attempt, outcome = next.outcome, %error, ms, "an attempt failed: dead letter");
            }
        }
    }

    /// Each route and outcome has its own allowance: a route whose service is down hides neither other routes nor dead letters.
    fn allows(&self, route: &str, outcome: &str) -> bool {
        let what = format!("{route}: {outcome}");
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).allows(&what, Instant::now())
    }

    /// Logs every minute how many attempts had no line of their own. Runs until it is dropped.
    pub(crate) async fn summaries(&self) {
        loop {
            tokio::time::sleep(SUMMARY).await;
            self.summary();
        }
    }

    /// Logs how many attempts had no line of their own since the last summary.
    pub(crate) fn summary(&self) {
        let left_out = self.failures.lock().unwrap_or_else(PoisonError::into_inner).take_left_out();
        if let Some(left_out) = left_out {
            tracing::warn!(left_out, "more failed attempts than log lines");
        }
    }
}

struct Next {
    outcome: &'static str,
    /// When the next attempt is due; `None` if there is no next attempt.
    again_in: Option<Duration>,
}

fn next(settlement: &Settlement) -> Next {
    match settlement {
        Settlement::Retry { delay, .. } => Next { outcome: "retry", again_in: Some(rounded(*delay)) },
        Settlement::Wait { delay } => Next { outcome: "wait", again_in: Some(rounded(*delay)) },
        Settlement::Dead { reason, .. } => Next { outcome: reason.as_str(), again_in: None },
        Settlement::Done | Settlement::Superseded => Next { outcome: "done", again_in: None },
    }
}
