//! Events that no route takes: said once an hour for each app and type, with the pattern that comes nearest. Most are a slip of
//! the configuration, and nobody would miss what is acknowledged in silence.

use crate::router::Router;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_secs(60 * 60);
/// Apps and types that are remembered: types are Stream's, but for those of custom events.
const MOST: usize = 1024;

#[derive(Debug, Default)]
pub(crate) struct UnmatchedLog(Mutex<HashMap<(String, String), Instant>>);

impl UnmatchedLog {
    pub(crate) fn happened(&self, app: &str, event_type: &str, router: &Router, is_kept: bool) {
        if !self.is_due(app, event_type, Instant::now()) {
            return;
        }
        let nearest = router.nearest(event_type);
        let what = if is_kept {
            "no route takes events of this type: dead letters"
        } else {
            "no route takes events of this type: acknowledged"
        };
        tracing::warn!(
            app,
            r#type = event_type,
            nearest,
            "{what}; worker.routes says which, worker.unmatched what becomes of the others"
        );
    }

    fn is_due(&self, app: &str, event_type: &str, now: Instant) -> bool {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (app.to_owned(), event_type.to_owned());
        if said.get(&key).is_some_and(|at| now.saturating_duration_since(*at) < EVERY) {
            return false;
        }
        if said.len() >= MOST {
            said.retain(|_, at| now.saturating_duration_since(*at) < EVERY);
        }
        // Types without end make no lines without end.
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
    fn once_an_hour_for_each_app_and_type() {
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
