//! The log lines of events that no route matches, and of events that name a route this worker does not have: one an hour for each
//! app and type, the former with the most similar pattern. Most are a mistake in the configuration that nobody would notice if
//! they were acknowledged silently.

use crate::router::Router;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_secs(60 * 60);
/// Most apps and types that are remembered. Stream defines the types, except those of custom events, which are unbounded.
const MOST: usize = 1024;

#[derive(Debug, Default)]
pub(crate) struct UnmatchedLog {
    said: Mutex<HashMap<(String, String), Instant>>,
    /// Routes that events named and this worker did not have, and since when.
    missing: Mutex<HashMap<String, Instant>>,
}

impl UnmatchedLog {
    pub(crate) fn happened(&self, app: &str, event_type: &str, router: &Router, is_kept: bool) {
        if !self.is_due(app, event_type, Instant::now()) {
            return;
        }
        let nearest = router.nearest(event_type);
        let what = if is_kept {
            "no route matches events of this type: they become dead letters"
        } else {
            "no route matches events of this type: they are acknowledged"
        };
        tracing::warn!(
            app,
            r#type = event_type,
            nearest,
            "{what}; worker.routes lists the types, worker.unmatched decides about all others"
        );
    }

    /// How long events have named a missing route. A route that comes and goes counts as missing from the first time on.
    pub(crate) fn missing_for(&self, route: &str, now: Instant) -> Duration {
        let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        if missing.len() >= MOST && !missing.contains_key(route) {
            return Duration::ZERO;
        }
        now.saturating_duration_since(*missing.entry(route.to_owned()).or_insert(now))
    }

    pub(crate) fn unknown(&self, app: &str, event_type: &str, route: &str) {
        if self.is_due(app, &format!("{route}: {event_type}"), Instant::now()) {
            tracing::warn!(
                app,
                r#type = event_type,
                route,
                "an event names a route that this worker does not have: it waits for a worker that does, for worker.claim_window at \
                 most; if the route was renamed or removed, restore it, or these events become dead letters"
            );
        }
    }

    fn is_due(&self, app: &str, event_type: &str, now: Instant) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (app.to_owned(), event_type.to_owned());
        if said.get(&key).is_some_and(|at| now.saturating_duration_since(*at) < EVERY) {
            return false;
        }
        if said.len() >= MOST {
            said.retain(|_, at| now.saturating_duration_since(*at) < EVERY);
        }
        // Unbounded types must not make unbounded log lines.
        if said.len() >= MOST {
            return false;
        }
        said.insert(key, now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unmatched_events_are_logged_once_an_hour_for_each_app_and_type() {
        let (log, start) = (UnmatchedLog::default(), Instant::now());
        let due = |app: &str, event_type: &str, minutes: u64| {
            log.is_due(app, event_type, start + Duration::from_secs(minutes * 60))
        };
        assert!(due("chat", "a.b", 0) && !due("chat", "a.b", 59) && due("chat", "a.b", 60));
        assert!(due("chat", "a.c", 0) && due("other", "a.b", 0));
        let lines = (0..5_000).filter(|number| due("chat", &number.to_string(), 61)).count();
        assert!(lines <= MOST && !due("chat", "more", 61));
    }
}
