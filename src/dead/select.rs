//! Which dead letters a command means.

use crate::exit::BadUsage;
use clap::Args;
use std::time::Duration;
use streamgate_core::letter::Filter;
use streamgate_core::pattern::Pattern;
use streamgate_core::reason::Reason;
use streamgate_service::config::reader;

/// Which letters: everything given must hold.
#[derive(Debug, Args)]
pub(super) struct Select {
    /// Numbers, webhook ids (but for those of digits only) or idempotency keys
    ids: Vec<String>,
    /// Only this reason: rejected, retries_exhausted, unmatched, poison, dropped_by_broker or unrouted
    #[arg(long, value_parser = reason)]
    reason: Option<Reason>,
    /// Only these event types: a glob, like "message.*"
    #[arg(long = "type", value_name = "TYPE", value_parser = |text: &str| Pattern::parse(text))]
    event_type: Option<Pattern>,
    /// Only this route
    #[arg(long)]
    route: Option<String>,
    /// Only letters that died at least this long ago: 90s, 2h, 7d
    #[arg(long, value_name = "DURATION", value_parser = reader::duration)]
    older_than: Option<Duration>,
    /// Only events that name the user with this id, wherever Stream puts one
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// All letters
    #[arg(long)]
    all: bool,
}

/// For which events become dead letters.
const REASONS: [Reason; 6] = [
    Reason::Rejected,
    Reason::RetriesExhausted,
    Reason::Unmatched,
    Reason::Poison,
    Reason::DroppedByBroker,
    Reason::Unrouted,
];

fn reason(text: &str) -> Result<Reason, String> {
    let known = REASONS.into_iter().find(|reason| reason.as_str() == text);
    known.ok_or_else(|| format!("dead letters have the reasons {}", REASONS.map(Reason::as_str).join(", ")))
}

impl Select {
    pub(super) fn filter(self) -> Filter {
        let now = jiff::Timestamp::now().as_millisecond();
        let age = |age: Duration| now.saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        Filter {
            ids: self.ids,
            reason: self.reason,
            event_type: self.event_type,
            route: self.route,
            died_before_ms: self.older_than.map(age),
            user: self.user,
        }
    }

    /// What changes letters must say which: an empty selection is a slip, not a wish.
    pub(super) fn explicit(self) -> Result<Filter, BadUsage> {
        let (all, filter) = (self.all, self.filter());
        let Filter { ids, reason, event_type, route, died_before_ms, user } = &filter;
        let selects = !ids.is_empty()
            || reason.is_some()
            || event_type.is_some()
            || route.is_some()
            || died_before_ms.is_some()
            || user.is_some();
        if selects == all {
            let what = "say which letters: ids, --reason, --type, --route, --older-than, --user, or else --all";
            return Err(BadUsage(what.to_owned()));
        }
        Ok(filter)
    }
}
