//! Records of whether a route runs or a person has paused it, shared by all workers, and what a worker concludes from them.
//!
//! A running route has a record too: a store that was emptied has none, which must not count as "nobody paused it". Each
//! record has an epoch; the later one holds, wherever it is found.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a worker that just started waits for the records before it runs its routes without them.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A pause by a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    pub by: String,
    pub why: Option<String>,
}

/// The state of one route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteRecord {
    /// Of two records the one with the later epoch holds. Milliseconds since the Unix epoch, or 0 if no person has changed
    /// the state.
    pub epoch: u64,
    /// `None`: the route runs.
    pub pause: Option<Pause>,
}

/// Records by route name.
pub type Records = BTreeMap<String, RouteRecord>;

impl RouteRecord {
    /// A route that nobody has paused yet.
    pub const RUNNING: RouteRecord = RouteRecord { epoch: 0, pause: None };

    /// The record that follows when a person pauses or resumes the route now.
    pub fn next(before: Option<&RouteRecord>, pause: Option<Pause>, now_ms: i64) -> RouteRecord {
        let least = before.map_or(1, |before| before.epoch.saturating_add(1));
        RouteRecord { epoch: u64::try_from(now_ms).unwrap_or_default().max(least), pause }
    }

    pub fn to_json(&self) -> String {
        match &self.pause {
            Some(Pause { by, why }) => json!({"epoch": self.epoch, "state": "paused", "by": by, "why": why}),
            None => json!({"epoch": self.epoch, "state": "running"}),
        }
        .to_string()
    }

    /// `None` if the text is unreadable.
    pub fn parse(json: &str) -> Option<RouteRecord> {
        let read: Value = serde_json::from_str(json).ok()?;
        let text = |key: &str| Some(read.get(key)?.as_str()?.to_owned());
        let pause = || Some(Pause { by: text("by")?, why: text("why") });
        let pause = match text("state")?.as_str() {
            "paused" => Some(pause()?),
            "running" => None,
            _ => return None,
        };
        Some(RouteRecord { epoch: read.get("epoch")?.as_u64()?, pause })
    }
}

/// What one worker knows about its routes.
#[derive(Debug)]
pub struct Known {
    records: Records,
    /// How long a store without a route's record is given, so that other workers can write back theirs. After that no worker
    /// has one.
    grace: Duration,
    started: Instant,
    /// Since when the store has been found without the record of a route.
    lacking_since: Option<Instant>,
    /// The store has answered, or the patience is over.
    is_settled: bool,
}

impl Known {
    pub fn new(grace: Duration, now: Instant) -> Known {
        Known { records: Records::new(), grace, started: now, lacking_since: None, is_settled: false }
    }

    /// Whether the routes may run as the records say.
    pub fn is_settled(&self) -> bool {
        self.is_settled
    }

    pub fn records(&self) -> &Records {
        &self.records
    }

    pub fn pause_of(&self, route: &str) -> Option<&Pause> {
        self.records.get(route)?.pause.as_ref()
    }

    /// Notes that the store does not answer. Returns whether from this moment the routes run without it.
    pub fn failed(&mut self, now: Instant) -> bool {
        self.lacking_since = None;
        let is_over = !self.is_settled && now.saturating_duration_since(self.started) >= PATIENCE;
        self.is_settled |= is_over;
        is_over
    }

    /// Takes the records found in the store. Returns those to write there: later ones known here, and those of routes without
    /// a record.
    pub fn found(&mut self, found: &Records, routes: &[&str], now: Instant) -> Records {
        if !self.is_settled && routes.iter().any(|route| !found.contains_key(*route)) {
            let since = *self.lacking_since.get_or_insert(now);
            if now.saturating_duration_since(since) < self.grace {
                return Records::new();
            }
        }
        self.is_settled = true;
        for (route, record) in found {
            let is_later = self.records.get(route).is_none_or(|known| known.epoch < record.epoch);
            if is_later {
                self.records.insert(route.clone(), record.clone());
            }
        }
        for route in routes {
            self.records.entry((*route).to_owned()).or_insert(RouteRecord::RUNNING);
        }
        let is_better =
            |(route, known): &(&String, &RouteRecord)| found.get(*route).is_none_or(|found| found.epoch < known.epoch);
        let better = self.records.iter().filter(is_better);
        better.map(|(route, known)| (route.clone(), known.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_millis(500);

    fn paused(epoch: u64) -> RouteRecord {
        RouteRecord { epoch, pause: Some(Pause { by: "ann".into(), why: None }) }
    }

    fn of(records: &[(&str, RouteRecord)]) -> Records {
        records.iter().map(|(route, record)| ((*route).to_owned(), record.clone())).collect()
    }

    #[test]
    fn what_is_written_reads_back() {
        let why = Some("a \"deploy\"".to_owned());
        let record = RouteRecord { epoch: 7, pause: Some(Pause { by: "ann".into(), why }) };
        assert_eq!(RouteRecord::parse(&record.to_json()), Some(record));
        assert_eq!(RouteRecord::parse(&paused(1).to_json()), Some(paused(1)));
        assert_eq!(RouteRecord::parse(&RouteRecord::RUNNING.to_json()), Some(RouteRecord::RUNNING));
        for unreadable in ["", "{}", r#"{"epoch":1,"state":"else"}"#, r#"{"epoch":-1,"state":"running"}"#] {
            assert_eq!(RouteRecord::parse(unreadable), None, "{unreadable}");
        }
    }

    #[test]
    fn the_later_record_holds_wherever_it_is_found() {
        let (mut known, now) = (Known::new(GRACE, Instant::now()), Instant::now());
        assert!(known.found(&of(&[("app", paused(5))]), &["app"], now).is_empty());
        assert!(known.is_settled() && known.pause_of("app").is_some());
        // A flushed store, one restored from before the pause, and one in which the route was resumed.
        assert_eq!(known.found(&Records::new(), &["app"], now), of(&[("app", paused(5))]));
        let older = of(&[("app", RouteRecord::RUNNING)]);
        assert_eq!(known.found(&older, &["app"], now), of(&[("app", paused(5))]));
        let resumed = RouteRecord::next(Some(&paused(5)), None, 3);
        assert_eq!(resumed.epoch, 6, "later than the pause, whatever the clock says");
        assert!(known.found(&of(&[("app", resumed)]), &["app"], now).is_empty());
        assert_eq!(known.pause_of("app"), None);
    }

    #[test]
    fn an_empty_store_is_given_a_while_and_a_route_without_a_record_runs() {
        let now = Instant::now();
        let mut known = Known::new(GRACE, now);
        assert!(known.found(&Records::new(), &["app"], now).is_empty() && !known.is_settled());
        // Meanwhile another worker has written back what it knows.
        let found = of(&[("other", paused(5)), ("app", paused(4))]);
        assert!(known.found(&found, &["app", "new"], now).is_empty() && !known.is_settled(), "not all of it yet");
        let written = known.found(&found, &["app", "new"], now + GRACE);
        assert_eq!(written, of(&[("new", RouteRecord::RUNNING)]));
        assert!(known.is_settled() && known.pause_of("app").is_some() && known.pause_of("new").is_none());
        let mut alone = Known::new(GRACE, now);
        alone.found(&Records::new(), &["app"], now);
        let written = alone.found(&Records::new(), &["app"], now + GRACE);
        assert_eq!(written, of(&[("app", RouteRecord::RUNNING)]));
        assert!(alone.is_settled());
    }

    #[test]
    fn without_the_store_routes_run_after_a_while_and_what_was_known_holds() {
        let now = Instant::now();
        let mut known = Known::new(GRACE, now);
        assert!(!known.failed(now + PATIENCE / 2) && !known.is_settled());
        assert!(known.failed(now + PATIENCE) && known.is_settled());
        assert!(!known.failed(now + PATIENCE * 2), "once");
        known.found(&of(&[("app", paused(5))]), &["app"], now);
        known.failed(now + PATIENCE * 3);
        assert!(known.pause_of("app").is_some());
    }
}
