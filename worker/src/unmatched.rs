//! Events that no route matches, and events that name a route this worker does not have. Both are logged once an hour for each
//! app and type, the former with the most similar pattern. Most are a mistake in the configuration that nobody would notice if
//! they were acknowledged silently.

use crate::delivery::Processor;
use crate::router::Router;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::ports::{Claims, Deliveries, Delivery, Settlement};
use streamgate_core::reason::Reason;
use streamgate_service::config::Unmatched;

const EVERY: Duration = Duration::from_secs(60 * 60);
/// Most apps and types that are remembered. Stream defines the types, except those of custom events, which are unbounded.
const MOST: usize = 1024;

/// A rolling deployment has brought a route to every worker within this time.
const ROLLING: Duration = Duration::from_secs(60 * 60);

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
    fn missing_for(&self, route: &str, now: Instant) -> Duration {
        let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        if missing.len() >= MOST && !missing.contains_key(route) {
            return Duration::ZERO;
        }
        now.saturating_duration_since(*missing.entry(route.to_owned()).or_insert(now))
    }

    fn unknown(&self, app: &str, event_type: &str, route: &str) {
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

/// The `route` label of an event without a route.
const NONE: &str = "none";

impl<D: Deliveries, C: Claims> Processor<D, C> {
    /// Settles an event that no route matches, as `worker.unmatched` says.
    pub(crate) async fn unmatched(&self, delivery: Delivery<D::Handle>, router: &Router) {
        let (app, event_type) = (delivery.envelope.app.clone(), delivery.envelope.event_type.clone());
        let settlement = match self.policy.unmatched {
            Unmatched::Ack => Settlement::Done,
            Unmatched::Dead => Settlement::Dead { reason: Reason::Unmatched, error: None },
        };
        let is_kept = matches!(settlement, Settlement::Dead { .. });
        if self.settle_unhandled(delivery, None, settlement, [NONE, "unmatched"]).await {
            self.unmatched_log.happened(&app, &event_type, router, is_kept);
        }
    }

    /// Leaves an event to a worker that has its route: in a rolling deployment others have it. This worker must not handle it.
    pub(crate) async fn unknown_route(&self, delivery: Delivery<D::Handle>, route: &str) {
        let envelope = &delivery.envelope;
        self.unmatched_log.unknown(&envelope.app, &envelope.event_type, route);
        let age_ms = jiff::Timestamp::now().as_millisecond().saturating_sub(envelope.received_at_ms);
        let window = self.policy.claim_window;
        let is_old = u128::try_from(age_ms).is_ok_and(|age_ms| age_ms > window.as_millis());
        // The age alone is not enough: an old event, replayed or long parked, may meet a rolling deployment.
        let is_old = self.unmatched_log.missing_for(route, Instant::now()) >= window.min(ROLLING) && is_old;
        let (settlement, outcome) = match is_old {
            true => {
                let error = format!("no worker has the route {route:?}, which the event failed on or was parked for");
                (Settlement::Dead { reason: Reason::RouteUnknown, error: Some(error) }, "dead")
            }
            false => (Settlement::Wait { delay: self.policy.ladder.shortest() }, "wait"),
        };
        self.settle_unhandled(delivery, Some(route.into()), settlement, [NONE, outcome]).await;
    }

    /// Settles an event that no handler ran for and nobody claimed. `labels` are route and outcome. Returns whether it is
    /// settled.
    pub(crate) async fn settle_unhandled(
        &self,
        delivery: Delivery<D::Handle>,
        route: Option<Arc<str>>,
        settlement: Settlement,
        labels: [&str; 2],
    ) -> bool {
        let key = delivery.envelope.key.clone();
        let settled = async {
            let settled = self.deliveries.settle(delivery, route, settlement.clone()).await?;
            self.deliveries.finish(settled).await
        };
        if let Err(error) = settled.await {
            tracing::error!(%error, key, "cannot settle; the event stays in the queue and will be delivered again");
            return false;
        }
        self.metrics.worker_deliveries.with_label_values(&labels).inc();
        if let Settlement::Dead { reason, .. } = &settlement {
            self.metrics.worker_dead_letters.with_label_values(&[reason.as_str()]).inc();
        }
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
