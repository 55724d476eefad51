//! The worker's side: deliveries with a bounded prefetch, on a connection that never publishes, and their settlement:
//! publish, confirm, then acknowledge.

use super::depth;
use super::feed::{Arrived, Feed};
use super::headers::{self, Annotations, Death, Received};
use super::incoming::give_back;
use super::link::{Link, Session, State};
use super::publisher::{Message, Publisher};
use super::topology::Topology;
use bytes::Bytes;
use lapin::Acker;
use lapin::message::Delivery as Raw;
use lapin::options::BasicAckOptions;
use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::{
    envelope::Envelope,
    ports::{self, Deliveries, Delivery, Parked, Settled, Settlement, StoreError},
    repeated::Repeated,
};
use tokio::time::MissedTickBehavior;

/// A queue that has refused everything for this long is full.
const FULL_AFTER: Duration = Duration::from_secs(5);
/// Interval between counts of parked events.
const LOOK: Duration = Duration::from_secs(5);
/// Wait between attempts to publish a retry or a dead letter. There is no last attempt while the delivery is ours.
const SETTLE_BACKOFF: Duration = Duration::from_secs(1);

/// How many deliveries RabbitMQ hands out before the first of them is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefetch {
    /// From the queue of events.
    pub fresh: u16,
    /// From the queues of parked events, together.
    pub parked: u16,
}

/// Events from RabbitMQ.
#[derive(Debug)]
pub struct Consumer {
    feed: Feed,
    /// Prefetch for each route's queue of parked events.
    parked_prefetch: u16,
    settler: Arc<Settler>,
    last_death_us: AtomicI64,
}

/// Publishes retries and dead letters.
#[derive(Debug)]
struct Settler {
    topology: Topology,
    publisher: Publisher,
    /// Failed publishes, for the log.
    refused: Mutex<Repeated>,
    /// Refusals of full queues of parked events, by route.
    full: Mutex<HashMap<Arc<str>, Refusals>>,
}

/// Since when a queue has refused, without taking anything in between.
#[derive(Clone, Copy, Debug)]
struct Refusals {
    first: Instant,
    last: Instant,
}

/// Result of one publish.
enum Attempt {
    Stands,
    /// The queue is at its limit.
    Full,
    Again,
}

/// Settles a delivery.
#[derive(Debug)]
pub struct Handle {
    acker: Acker,
}

impl ports::Handle for Handle {
    /// A delivery is live while its connection lasts: the next connection delivers it again.
    fn is_live(&self) -> bool {
        self.acker.usable()
    }
}

impl Consumer {
    pub(super) fn start(topology: Topology, link: Arc<Link>, publisher: Publisher, prefetch: Prefetch) -> Consumer {
        let feed = Feed::start(link, topology.events(), prefetch.fresh, prefetch.parked);
        let routes = u16::try_from(topology.routes().len()).unwrap_or(u16::MAX).max(1);
        let parked_prefetch = (prefetch.parked / routes).max(1);
        let settler = Arc::new(Settler { topology, publisher, refused: Mutex::default(), full: Mutex::default() });
        Consumer { feed, parked_prefetch, settler, last_death_us: AtomicI64::new(0) }
    }

    /// Takes no more events, and gives back those that no handler has begun, for other workers to handle now.
    pub async fn stop(&self) {
        self.feed.stop().await;
    }

    /// Closes both connections.
    pub async fn close(&self) {
        self.feed.close().await;
        self.settler.publisher.link().close().await;
    }

    /// Calls `notify` with whether both connections are up: now, and after each change.
    pub async fn watch_up(&self, notify: impl Fn(bool) + Send) {
        let (mut consuming, mut publishing) = (self.feed.link().watch(), self.settler.publisher.link().watch());
        loop {
            let up = |state: &State| matches!(state, State::Up(_));
            notify(up(&consuming.borrow_and_update()) && up(&publishing.borrow_and_update()));
            let changed = tokio::select! {
                changed = consuming.changed() => changed,
                changed = publishing.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    }

    /// Calls `show` with how many events are parked for each route, every few seconds. Never returns.
    pub async fn watch_parked(&self, show: impl Fn(&str, u32) + Send) {
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Ok(session) = self.feed.link().session() else { continue };
            if let Err(why) = self.look_at_parked(&session, &show).await {
                tracing::debug!(why, "cannot count parked events");
            }
        }
    }

    async fn look_at_parked(&self, session: &Session, show: &(impl Fn(&str, u32) + Send)) -> Result<(), String> {
        let channel = session.channel().await?;
        for route in self.settler.topology.routes() {
            let queue = self.settler.topology.parked(&route);
            show(&route, depth::ready_in_time(&channel, &queue).await.map_err(|error| error.to_string())?);
        }
        drop(channel.close(200, "OK".into()).await);
        Ok(())
    }

    /// The time of a death, distinct within the process, because it is also the dead letter's number.
    fn death_us(&self) -> i64 {
        let now = jiff::Timestamp::now().as_microsecond();
        let later = |last: i64| Some(now.max(last.saturating_add(1)));
        self.last_death_us
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, later)
            .map_or(now, |last| now.max(last + 1))
    }

    async fn settled(
        &self,
        envelope: Envelope,
        handle: &Handle,
        route: Option<Arc<str>>,
        settlement: Settlement,
    ) -> Result<(), StoreError> {
        let envelope = Envelope { route: route.map(|name| name.to_string()).or(envelope.route.clone()), ..envelope };
        let settler = &self.settler;
        let until = |delay: Duration| now_ms().saturating_add(i64::try_from(delay.as_millis()).unwrap_or(i64::MAX));
        match settlement {
            Settlement::Done | Settlement::Superseded => Ok(()),
            Settlement::Retry { delay, attempt } => {
                let next = Envelope { attempt, ..envelope };
                let until_ms = until(delay);
                settler.publish(&handle.acker, || settler.later(&next, until_ms)).await
            }
            Settlement::Wait { delay } => {
                let until_ms = until(delay);
                settler.publish(&handle.acker, || settler.later(&envelope, until_ms)).await
            }
            Settlement::Dead { reason, error } => {
                let reason = reason.as_str().to_owned();
                let death = Death { reason, error, at_us: self.death_us(), by_broker: false };
                let annotations = Annotations { death: Some(death), ..Annotations::default() };
                let dead_letter = || Message {
                    exchange: settler.topology.dead().into(),
                    routing_key: headers::routing_key(&envelope),
                    properties: headers::properties(&envelope, &annotations),
                    body: envelope.body.clone(),
                };
                settler.publish(&handle.acker, dead_letter).await
            }
        }
    }
}

impl Settler {
    /// Publishes to a route's queue of parked events until it succeeds. Returns false once the queue has been full for
    /// a while.
    async fn publish_parked(
        &self,
        acker: &Acker,
        route: &Arc<str>,
        message: impl Fn() -> Message,
    ) -> Result<bool, StoreError> {
        loop {
            let attempt = self.publish_once(acker, message()).await?;
            {
                let (mut full, now) = (self.full.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
                match attempt {
                    Attempt::Stands => {
                        full.remove(route);
                        return Ok(true);
                    }
                    // RabbitMQ also refuses while the queue elects a leader.
                    Attempt::Full => {
                        let refusals = full.entry(Arc::clone(route)).or_insert(Refusals { first: now, last: now });
                        if now.saturating_duration_since(refusals.last) > FULL_AFTER {
                            refusals.first = now;
                        }
                        refusals.last = now;
                        if now.saturating_duration_since(refusals.first) >= FULL_AFTER {
                            return Ok(false);
                        }
                    }
                    Attempt::Again => {}
                }
            }
            tokio::time::sleep(SETTLE_BACKOFF).await;
        }
    }

    /// Publishes until it succeeds, or until the delivery is no longer ours: then the broker hands it out again.
    async fn publish(&self, acker: &Acker, message: impl Fn() -> Message) -> Result<(), StoreError> {
        loop {
            match self.publish_once(acker, message()).await? {
                Attempt::Stands => return Ok(()),
                Attempt::Full | Attempt::Again => tokio::time::sleep(SETTLE_BACKOFF).await,
            }
        }
    }

    async fn publish_once(&self, acker: &Acker, message: Message) -> Result<Attempt, StoreError> {
        let error = match self.publisher.publish(message).await {
            Ok(()) => return Ok(Attempt::Stands),
            Err(error) => error,
        };
        if !acker.usable() {
            return Err(error);
        }
        // All errors count as one cause: the same outage shows as several errors.
        let due = self.refused.lock().unwrap_or_else(PoisonError::into_inner).happened("", Instant::now());
        if let Some(times) = due {
            tracing::warn!(%error, times, "cannot publish settlements (retries, dead letters, parked events), trying again");
        }
        Ok(if matches!(error, StoreError::Full(_)) { Attempt::Full } else { Attempt::Again })
    }

    /// A copy for the matching retry step, from where it returns to the events.
    fn later(&self, envelope: &Envelope, until_ms: i64) -> Message {
        let left_ms = until_ms.saturating_sub(now_ms());
        let delay = Duration::from_millis(u64::try_from(left_ms).unwrap_or_default());
        let step = self.topology.step_for(delay);
        let not_before_ms = (Duration::from_millis(step) < delay).then_some(until_ms);
        let annotations = Annotations { not_before_ms, death: None };
        Message {
            exchange: self.topology.retry(step).into(),
            routing_key: headers::routing_key(envelope),
            properties: headers::properties(envelope, &annotations),
            body: envelope.body.clone(),
        }
    }

    /// Another round of the longest step, for a copy that has to wait longer.
    async fn wait_on(&self, envelope: Envelope, handle: Handle, until_ms: i64) {
        let copy = || self.later(&envelope, until_ms);
        let waits = match self.publish(&handle.acker, copy).await {
            Ok(()) => acknowledge(&handle.acker).await,
            Err(error) => Err(error),
        };
        if let Err(error) = waits {
            tracing::warn!(%error, key = envelope.key, "cannot let an event wait on; it is delivered again");
        }
    }
}

impl Deliveries for Consumer {
    type Handle = Handle;

    async fn next(&self) -> Result<Delivery<Handle>, StoreError> {
        loop {
            let Arrived { message, parked } = self.feed.next().await;
            let Raw { routing_key, properties, data, acker, .. } = message;
            let handle = Handle { acker };
            let Received { envelope, redelivered, annotations } =
                headers::read(&properties, routing_key.as_str(), Bytes::from(data));
            // A dead letter that somebody moved here, by hand or with a tool of RabbitMQ: a replay.
            let envelope = match annotations.death {
                Some(death) => headers::dead(envelope, death).replayed(),
                None => envelope,
            };
            match annotations.not_before_ms.filter(|until_ms| *until_ms > now_ms()) {
                None => return Ok(Delivery { envelope, abandoned: 0, redelivered, parked, handle }),
                // On a task of its own, so that others need not wait for it. At most as many as were prefetched at a
                // time.
                Some(until_ms) => {
                    let settler = Arc::clone(&self.settler);
                    tokio::spawn(async move { settler.wait_on(envelope, handle, until_ms).await });
                }
            }
        }
    }

    fn take_parked(&self, routes: &[Arc<str>]) {
        self.feed.take_parked(routes, &self.settler.topology, self.parked_prefetch);
    }

    /// Never completes: RabbitMQ does not know which events may kill the process, the claims do.
    async fn recalled(&self) {
        std::future::pending().await
    }

    fn begin(&self, _delivery: &Delivery<Handle>) {}

    async fn park(&self, delivery: Delivery<Handle>, route: Arc<str>) -> Result<Parked<Handle>, StoreError> {
        let Delivery { envelope, handle, .. } = &delivery;
        let envelope = Envelope { route: Some(route.to_string()), ..envelope.clone() };
        let copy = || Message {
            exchange: self.settler.topology.parked(&route).into(),
            routing_key: headers::routing_key(&envelope),
            properties: headers::properties(&envelope, &Annotations::default()),
            body: envelope.body.clone(),
        };
        if !self.settler.publish_parked(&handle.acker, &route, copy).await? {
            return Ok(Parked::Full(Box::new(delivery)));
        }
        acknowledge(&handle.acker).await.map(|()| Parked::Kept)
    }

    async fn copy(&self, delivery: &mut Delivery<Handle>, routes: &[Arc<str>]) -> Result<(), StoreError> {
        let [first, further @ ..] = routes else { return Ok(()) };
        let Delivery { envelope, handle, .. } = &*delivery;
        for route in further {
            let envelope = Envelope { route: Some(route.to_string()), ..envelope.clone() };
            // Straight to the events: through the topic exchange it would also reach every other queue that is bound to
            // it.
            let copy = || Message {
                exchange: self.settler.topology.return_exchange().into(),
                routing_key: headers::routing_key(&envelope),
                properties: headers::properties(&envelope, &Annotations::default()),
                body: envelope.body.clone(),
            };
            self.settler.publish(&handle.acker, copy).await?;
        }
        delivery.envelope.route = Some(first.to_string());
        Ok(())
    }

    async fn give_back(&self, delivery: Delivery<Handle>) {
        give_back(&delivery.handle.acker).await;
    }

    async fn settle(
        &self,
        delivery: Delivery<Handle>,
        route: Option<Arc<str>>,
        settlement: Settlement,
    ) -> Result<Settled<Handle>, StoreError> {
        let Delivery { envelope, handle, .. } = delivery;
        self.settled(envelope, &handle, route, settlement).await?;
        Ok(Settled(handle))
    }

    async fn finish(&self, Settled(handle): Settled<Handle>) -> Result<(), StoreError> {
        acknowledge(&handle.acker).await
    }

    fn ready(&self) -> Result<(), StoreError> {
        // Only the publishing connection is ever blocked: deliveries go on, retries wait.
        self.feed.link().session().map(drop)
    }
}

/// The broker confirms no acknowledgement: a lost one means another delivery, which the claim absorbs.
async fn acknowledge(acker: &Acker) -> Result<(), StoreError> {
    match acker.ack(BasicAckOptions::default()).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(StoreError::Unavailable("its connection to RabbitMQ has ended".to_owned())),
        Err(error) => Err(StoreError::Unavailable(error.to_string())),
    }
}

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
