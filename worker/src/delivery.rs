//! The life of one delivery: claim, handle, settle.

use crate::attempts::{Attempt, AttemptLog};
use crate::handler::{Context, Event, HandlerError};
use crate::isolation::Isolation;
use crate::router::{Route, Router};
use crate::unmatched_log::UnmatchedLog;
use arc_swap::ArcSwap;
use futures_util::FutureExt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streamgate_core::{
    attempts::Attempt as FailedAttempt,
    breaker::Health,
    claim::{ClaimKey, Conclusion, Verdict},
    envelope::Envelope,
    ports::{Claims, Deliveries, Delivery, Parked, Settlement},
    reason::Reason,
    retry::{self, Failure, Ladder, Precaution},
};
use streamgate_service::config::{Lines, Unmatched};
use streamgate_service::metrics::{IntGauge, Metrics};
use tokio_util::sync::CancellationToken;

/// A lease outlives the handler's timeout by this, so that a live holder never loses it.
const LEASE_MARGIN: Duration = Duration::from_secs(10);

/// How the worker treats deliveries.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Most handlers of a route at a time, unless the route has its own limit.
    pub concurrency: usize,
    pub handler_timeout: Duration,
    /// Most fresh deliveries that the store hands out before the first is settled; `memory_budget` limits the bytes of their
    /// bodies.
    pub prefetch: usize,
    pub memory_budget: usize,
    /// How long a delivery may wait before the store takes it back; `None` if it never does.
    pub longest_wait: Option<Duration>,
    /// How long an event waits for a worker that has the route it names.
    pub claim_window: Duration,
    /// How long handlers may take to finish after the drain began.
    pub drain_timeout: Duration,
    pub ladder: Ladder,
    pub unmatched: Unmatched,
    /// Which attempts have a line in the log.
    pub lines: Lines,
}

/// Takes deliveries to their end; shared by all of them.
#[derive(Debug)]
pub(crate) struct Processor<D, C> {
    pub(crate) deliveries: Arc<D>,
    pub(crate) claims: Arc<C>,
    pub(crate) router: Arc<ArcSwap<Router>>,
    pub(crate) policy: Policy,
    pub(crate) isolation: Isolation,
    pub(crate) attempts: Arc<AttemptLog>,
    pub(crate) unmatched_log: UnmatchedLog,
    pub(crate) metrics: Arc<Metrics>,
}

/// The right to run a handler, for as long as it is renewed.
struct Lease<'a, C> {
    claims: &'a C,
    key: &'a ClaimKey,
    holder: u64,
    length: Duration,
}

impl<D: Deliveries, C: Claims> Processor<D, C> {
    /// Takes one delivery of a route to its end, or at the cut leaves it unsettled, to be delivered again. `holder` is unique
    /// to this call among all workers. `judged` gets what the attempt says about the route's service, as soon as it is known.
    pub(crate) async fn work(
        &self,
        mut delivery: Delivery<D::Handle>,
        route: &Route,
        holder: u64,
        cut: &CancellationToken,
        judged: impl FnOnce(Health) + Send,
    ) {
        let key = delivery.envelope.claim_key(&route.name);
        let ladder = route.ladder.as_ref().unwrap_or(&self.policy.ladder);
        let timeout = route.handler_timeout.unwrap_or(self.policy.handler_timeout);
        let length = timeout.saturating_add(LEASE_MARGIN);
        let mut alone = Precaution::of(delivery.abandoned) == Precaution::Alone;
        let (place, verdict, precaution) = loop {
            // The place comes before the lease: an event that only waits for its turn has not begun, and must not be blamed.
            let place = tokio::select! {
                place = self.isolation.enter(holder, alone, timeout) => place,
                () = cut.cancelled() => return,
            };
            let counts = (delivery.abandoned, delivery.redelivered);
            let (verdict, precaution) = self.claim(&delivery.envelope, counts, &key, holder, length).await;
            if precaution != Precaution::Alone || alone {
                break (place, verdict, precaution);
            }
            self.release(&key, holder).await;
            alone = true;
        };
        let settlement = match verdict {
            Verdict::Run { abandoned } if precaution == Precaution::Dead => {
                tracing::error!(%key, abandoned, "begun again and again and never concluded: given up");
                let error = format!("begun {abandoned} times and never concluded: each time its worker died or hung");
                Settlement::Dead { reason: Reason::Poison, error: Some(error) }
            }
            Verdict::Run { .. } => {
                let lease = Lease { claims: &*self.claims, key: &key, holder, length };
                tokio::select! {
                    (settlement, failed, health) = self.handle(&delivery.envelope, route, (ladder, timeout), &lease) => {
                        judged(health);
                        failed.into_iter().for_each(|failed| delivery.envelope.attempts.push(failed));
                        settlement
                    }
                    () = cut.cancelled() => return self.release(&key, holder).await,
                }
            }
            Verdict::Wait => Settlement::Wait { delay: ladder.shortest().min(length) },
            Verdict::Superseded => Settlement::Superseded,
        };
        drop(place);
        tokio::select! {
            () = self.settle(delivery, &route.name, settlement, &key, holder) => {}
            // A stop blames no event. A settlement that is done by now is recorded, or the event repeats.
            () = cut.cancelled() => self.release(&key, holder).await,
        }
    }

    /// Claims the lease. Returns the verdict and the precaution that the event needs. The counts are the queue's own, of
    /// abandoned attempts and of deliveries.
    async fn claim(
        &self,
        envelope: &Envelope,
        (abandoned_before, redelivered): (u32, u32),
        key: &ClaimKey,
        holder: u64,
        length: Duration,
    ) -> (Verdict, Precaution) {
        match self.claims.claim(key, envelope.attempt, holder, length).await {
            Ok(Verdict::Run { abandoned }) => {
                let abandoned = abandoned.max(abandoned_before);
                (Verdict::Run { abandoned }, Precaution::of(abandoned))
            }
            Ok(verdict) => (verdict, Precaution::None),
            Err(error) => {
                // Without a claim the event may be handled twice; unhandled it would be late for certain.
                self.metrics.worker_claim_errors.inc();
                tracing::debug!(%error, %key, "cannot claim, handling all the same");
                (Verdict::Run { abandoned: 0 }, Precaution::unclaimed(redelivered))
            }
        }
    }

    /// Releases the claim, so that the next worker that gets the delivery can run it at once.
    async fn release(&self, key: &ClaimKey, holder: u64) {
        if let Err(error) = self.claims.conclude(key, holder, Conclusion::Released).await {
            self.metrics.worker_claim_errors.inc();
            tracing::debug!(%error, %key, "cannot release a claim; it lapses by itself");
        }
    }

    /// Runs the handler. Returns how the delivery ends, the attempt if it failed, and what it says about the route's service.
    async fn handle(
        &self,
        envelope: &Envelope,
        route: &Route,
        (ladder, timeout): (&Ladder, Duration),
        lease: &Lease<'_, C>,
    ) -> (Settlement, Option<FailedAttempt>, Health) {
        let context = Context { attempt: envelope.attempt, timeout };
        let event = Event(envelope.clone());
        let started = Instant::now();
        let running = Running::start(&self.metrics.worker_in_flight);
        // The call itself may panic too, not only its future.
        let run = AssertUnwindSafe(async { route.handler.handle(event, context).await }).catch_unwind();
        let result = tokio::select! {
            ended = tokio::time::timeout(timeout, run) => ended,
            never = lease.renewed() => match never {},
        };
        drop(running);
        self.metrics.worker_handle.with_label_values(&[&*route.name]).observe(started.elapsed().as_secs_f64());
        let result = result.map_or_else(
            |_| Err(HandlerError::unavailable(format!("the handler did not end within {timeout:?}"))),
            // A panic's message may hold anything, so it is not quoted.
            |ended| ended.unwrap_or_else(|_| Err(HandlerError::retry("the handler panicked"))),
        );
        let health = result.as_ref().map_or_else(HandlerError::health, |()| Health::Up);
        let settlement = retry::settlement(ladder, envelope.attempt, result.clone().map_err(Failure::from));
        let took = started.elapsed();
        self.attempts.ended(&Attempt { route: &route.name, envelope, took, result: &result, settlement: &settlement });
        let failed = result.err().map(|error| FailedAttempt {
            number: envelope.attempt,
            at_ms: jiff::Timestamp::now().as_millisecond(),
            took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            error: error.to_string(),
        });
        (settlement, failed, health)
    }

    async fn settle(
        &self,
        delivery: Delivery<D::Handle>,
        route: &Arc<str>,
        settlement: Settlement,
        key: &ClaimKey,
        holder: u64,
    ) {
        let age_ms = jiff::Timestamp::now().as_millisecond().saturating_sub(delivery.envelope.received_at_ms);
        let _settling = Running::start(&self.metrics.worker_settling);
        let conclusion = conclusion(&settlement);
        // In this order: a record of what is not durable yet would lose the event in a crash, and an acknowledgement before the record
        // would let another copy run.
        let settled = async {
            let settled = self.deliveries.settle(delivery, Some(Arc::clone(route)), settlement.clone()).await?;
            if let Some(conclusion) = conclusion {
                self.record(key, holder, conclusion).await;
            }
            self.deliveries.finish(settled).await
        };
        match settled.await {
            Ok(()) => self.count(route, &settlement, age_ms),
            Err(error) => {
                tracing::error!(%error, %key, "cannot settle; the event stays in the queue and will be delivered again");
                self.release(key, holder).await;
            }
        }
    }

    async fn record(&self, key: &ClaimKey, holder: u64, conclusion: Conclusion) {
        if let Err(error) = self.claims.conclude(key, holder, conclusion).await {
            self.metrics.worker_claim_errors.inc();
            tracing::debug!(%error, %key, "cannot record the end of a claim; a repeat may be handled again");
        }
    }

    fn count(&self, route: &str, settlement: &Settlement, age_ms: i64) {
        let metrics = &self.metrics;
        let outcome = match settlement {
            Settlement::Done => {
                metrics.worker_event_age.observe(age_ms.max(0) as f64 / 1000.0);
                "done"
            }
            Settlement::Superseded => "superseded",
            Settlement::Retry { .. } => {
                metrics.worker_retries.with_label_values(&[route]).inc();
                "retry"
            }
            Settlement::Wait { .. } => "wait",
            Settlement::Dead { reason, .. } => {
                metrics.worker_dead_letters.with_label_values(&[reason.as_str()]).inc();
                "dead"
            }
        };
        metrics.worker_deliveries.with_label_values(&[route, outcome]).inc();
    }

    /// Moves an event to its route's parked ones. This counts no attempt and claims nothing.
    pub(crate) async fn park(&self, delivery: Delivery<D::Handle>, route: &Arc<str>) {
        if !delivery.is_live() {
            return;
        }
        let key = delivery.envelope.key.clone();
        let full = match self.deliveries.park(delivery, Arc::clone(route)).await {
            Ok(Parked::Kept) => return self.metrics.worker_parked.with_label_values(&[&**route]).inc(),
            Ok(Parked::Full(delivery)) => *delivery,
            Err(error) => {
                tracing::error!(%error, key, "cannot park; the event stays in the queue and will be delivered again");
                return;
            }
        };
        let error =
            format!("the queue of the route {route}'s parked events is full: it has reached rabbitmq.parked_max");
        let settlement = Settlement::Dead { reason: Reason::ParkedFull, error: Some(error) };
        self.settle_unhandled(full, Some(Arc::clone(route)), settlement, [&**route, "dead"]).await;
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

/// Counts what is running in a gauge, until it is dropped.
struct Running<'m>(&'m IntGauge);

impl Running<'_> {
    fn start(gauge: &IntGauge) -> Running<'_> {
        gauge.inc();
        Running(gauge)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What the claim records about a settlement; `None` if the lease was not ours.
fn conclusion(settlement: &Settlement) -> Option<Conclusion> {
    match settlement {
        Settlement::Done => Some(Conclusion::Done),
        Settlement::Retry { attempt, .. } => Some(Conclusion::Retrying { attempt: *attempt }),
        Settlement::Dead { .. } => Some(Conclusion::Dead),
        Settlement::Wait { .. } | Settlement::Superseded => None,
    }
}

impl<C: Claims> Lease<'_, C> {
    /// Renews the lease until this is dropped. A failed renewal is no reason to stop a running handler.
    async fn renewed(&self) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(self.length / 3).await;
            match self.claims.renew(self.key, self.holder, self.length).await {
                Ok(true) => {}
                Ok(false) => {
                    tracing::warn!(key = %self.key, "the lease was lost; the event may be handled twice")
                }
                Err(error) => tracing::warn!(%error, key = %self.key, "cannot renew the lease"),
            }
        }
    }
}
