//! Events that no route matches, and events that name a route this worker does not have: how they are settled.

use crate::delivery::Processor;
use crate::router::Router;
use std::time::{Duration, Instant};
use streamgate_core::ports::{Claims, Deliveries, Delivery, Settlement};
use streamgate_core::reason::Reason;
use streamgate_service::config::Unmatched;

/// A rolling deployment has brought a route to every worker within this time.
const ROLLING: Duration = Duration::from_secs(60 * 60);

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
}
