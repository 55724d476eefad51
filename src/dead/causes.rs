//! Counts dead letters by cause.

use super::table::clipped;
use crate::output;
use serde::Serialize;
use std::collections::BTreeMap;
use streamgate_core::dead_letter::DeadLetter;
use streamgate_core::timestamp::rfc3339;

/// Reason, route and error make a cause: dead letters that share them failed the same way.
#[derive(Debug, Default)]
pub(super) struct Causes(BTreeMap<(String, Option<String>, Option<String>), Toll>);

#[derive(Clone, Copy, Debug)]
struct Toll {
    count: usize,
    first_ms: i64,
    last_ms: i64,
}

/// One cause, as scripts see it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cause {
    pub(crate) reason: String,
    pub(crate) route: Option<String>,
    pub(crate) error: Option<String>,
    pub(crate) count: usize,
    pub(crate) first: String,
    pub(crate) last: String,
}

impl Causes {
    pub(super) fn count(&mut self, dead_letter: &DeadLetter) {
        let cause = (dead_letter.reason.clone(), dead_letter.envelope.route.clone(), dead_letter.error.clone());
        let died = dead_letter.died_at_ms;
        let toll = self.0.entry(cause).or_insert(Toll { count: 0, first_ms: died, last_ms: died });
        *toll = Toll { count: toll.count + 1, first_ms: toll.first_ms.min(died), last_ms: toll.last_ms.max(died) };
    }

    /// The causes, the most frequent first.
    pub(super) fn list(&self) -> Vec<Cause> {
        let cause = |((reason, route, error), toll): (&(String, Option<String>, Option<String>), &Toll)| Cause {
            reason: reason.clone(),
            route: route.clone(),
            error: error.clone(),
            count: toll.count,
            first: rfc3339(toll.first_ms),
            last: rfc3339(toll.last_ms),
        };
        let mut causes: Vec<_> = self.0.iter().map(cause).collect();
        causes.sort_by_key(|cause| std::cmp::Reverse(cause.count));
        causes
    }

    /// Prints the causes.
    pub(super) fn show(&self, json: bool) -> anyhow::Result<()> {
        let causes = self.list();
        if json {
            return Ok(output::line(serde_json::to_string(&causes)?)?);
        }
        if causes.is_empty() {
            return Ok(output::line("no dead letters")?);
        }
        for Cause { reason, route, error, count, first, last } in causes {
            let route = route.as_deref().unwrap_or("-");
            output::line(format_args!("{count:>7}  {reason}  route {route}"))?;
            if let Some(error) = error {
                output::line(format_args!("         {}", clipped(&error, 71)))?;
            }
            output::line(format_args!("         {first} to {last}"))?;
        }
        Ok(())
    }
}
