//! Which dead letters a command selects.

use crate::exit::BadUsage;
use clap::Args;
use std::time::Duration;
use streamgate_core::dead_letter::Filter;
use streamgate_core::pattern::Pattern;
use streamgate_core::reason::Reason;
use streamgate_service::config::reader;

/// Selects dead letters: all given conditions must hold.
#[derive(Debug, Args)]
pub(super) struct Select {
    /// Numbers, webhook ids (except ids of digits only) or idempotency keys
    ids: Vec<String>,
    /// Only this reason: rejected, retries_exhausted, unmatched, route_unknown, parked_full, poison, dropped_by_broker or unrouted
    #[arg(long, value_parser = reason)]
    reason: Option<Reason>,
    /// Only these event types: a glob, like "message.*"
    #[arg(long = "type", value_name = "TYPE", value_parser = |text: &str| Pattern::parse(text))]
    event_type: Option<Pattern>,
    /// Only this route
    #[arg(long)]
    route: Option<String>,
    /// Only this app
    #[arg(long)]
    app: Option<String>,
    /// Only dead letters with at least N attempts
    #[arg(long, value_name = "N")]
    attempts: Option<u32>,
    /// Only dead letters since this time: 2026-01-31T12:00:00Z, 2026-01-31 (UTC), or how long ago, like 2h
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<i64>,
    /// Only dead letters from before this time
    #[arg(long, value_name = "TIME", value_parser = time)]
    until: Option<i64>,
    /// Only dead letters that are at least this old: 90s, 2h, 7d
    #[arg(long, value_name = "DURATION", value_parser = reader::duration)]
    older_than: Option<Duration>,
    /// Only events that name the user with this id, wherever Stream puts one
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// All dead letters; cannot be combined with another selection
    #[arg(long)]
    all: bool,
}

/// The reasons for which events become dead letters.
fn reasons() -> impl Iterator<Item = Reason> {
    Reason::OF_WORKERS.into_iter().chain([Reason::DroppedByBroker, Reason::Unrouted])
}

fn reason(text: &str) -> Result<Reason, String> {
    let known = reasons().find(|reason| reason.as_str() == text);
    known.ok_or_else(|| {
        format!("expected one of the reasons {}", reasons().map(Reason::as_str).collect::<Vec<_>>().join(", "))
    })
}

/// Parses a time, a day, or a duration before now, into milliseconds since the Unix epoch.
fn time(text: &str) -> Result<i64, String> {
    if let Ok(age) = reader::duration(text) {
        return Ok(before_now(age));
    }
    // A date alone means its midnight.
    let time = text.parse::<jiff::Timestamp>().or_else(|_| format!("{text}T00:00:00Z").parse()).ok();
    let time = time.ok_or_else(|| {
        format!("invalid time {text:?}: expected one like 2026-01-31T12:00:00Z, 2026-01-31, or 2h for two hours ago")
    })?;
    Ok(time.as_millisecond())
}

fn before_now(age: Duration) -> i64 {
    jiff::Timestamp::now().as_millisecond().saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX))
}

impl Select {
    pub(super) fn filter(self) -> Filter {
        let older_than = self.older_than.map(before_now);
        Filter {
            ids: self.ids,
            reason: self.reason,
            event_type: self.event_type,
            route: self.route,
            app: self.app,
            attempts: self.attempts,
            died_since_ms: self.since,
            died_before_ms: [self.until, older_than].into_iter().flatten().min(),
            user: self.user,
        }
    }

    pub(super) fn means_all(&self) -> bool {
        self.all
    }

    /// A command that changes dead letters must select some: an empty selection is more likely a slip than an
    /// intention.
    pub(super) fn explicit(self) -> Result<Filter, BadUsage> {
        let (all, filter) = (self.all, self.filter());
        let Filter { ids, reason, event_type, route, app, attempts, died_since_ms, died_before_ms, user } = &filter;
        let selects = !ids.is_empty()
            || reason.is_some()
            || event_type.is_some()
            || route.is_some()
            || app.is_some()
            || attempts.is_some()
            || died_since_ms.is_some()
            || died_before_ms.is_some()
            || user.is_some();
        if selects && all {
            return Err(BadUsage(
                "--all means every dead letter, so it cannot be combined with another selection".to_owned(),
            ));
        }
        if let (Some(since), Some(until)) = (died_since_ms, died_before_ms)
            && since >= until
        {
            return Err(BadUsage("--since is not before --until, so nothing is selected: swap them?".to_owned()));
        }
        if !selects && !all {
            let what = "select dead letters by ids, --reason, --type, --route, --app, --attempts, --since, --until, --older-than, --user, or \
                        else --all";
            return Err(BadUsage(what.to_owned()));
        }
        Ok(filter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_times() {
        for (text, expected) in [
            ("2026-01-31T12:00:00Z", Some(1_769_860_800_000)),
            ("2026-01-31T13:00:00+01:00", Some(1_769_860_800_000)),
            ("2026-01-31", Some(1_769_817_600_000)),
            ("yesterday", None),
            ("2026-13-01", None),
            ("", None),
        ] {
            assert_eq!(time(text).ok(), expected, "{text}");
        }
        let ago = time("2h").unwrap() - jiff::Timestamp::now().as_millisecond();
        assert!((-7_201_000..=-7_200_000).contains(&ago), "{ago}");
    }
}
