//! What the services need from a store. No ack, tag or lease of a particular store appears here, so that RabbitMQ with Redis,
//! the embedded store and a test double are the same to the gateway and the worker.

use crate::{
    claim::{ClaimKey, Conclusion, Verdict},
    dead_letter::{DeadLetter, DeadLetterId},
    envelope::Envelope,
    instance::Instance,
    reason::Reason,
    route_record::{Records, RouteRecord},
};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A store could not do its part. Nothing was acknowledged; the same call may succeed later.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("the store is full: {0}")]
    Full(String),
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// Writes would not be found after a restart.
    #[error("the data directory is gone: {0}")]
    Gone(String),
}

impl StoreError {
    /// The reason alone, for a text that says already what failed.
    pub fn reason(&self) -> &str {
        match self {
            StoreError::Full(reason) | StoreError::Unavailable(reason) | StoreError::Gone(reason) => reason,
        }
    }
}

/// How an event was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// The event is durable now.
    Enqueued,
    /// The event is durable on the gateway's own disk, and will be handed over to the queue.
    Spooled,
    /// The event repeats one that is durable already.
    Duplicate,
}

/// Makes events durable.
pub trait Enqueue: Send + Sync + 'static {
    /// Returns only when the event survives the process and a power failure.
    fn enqueue(&self, envelope: Envelope) -> impl Future<Output = Result<Accepted, StoreError>> + Send;
    /// Whether an event could be made durable now; the error says why not.
    fn ready(&self) -> Result<(), StoreError>;
    /// How many connections to it have ended. Events that were confirmed while one ended may have been returned unrouted. A
    /// blocked connection has not ended.
    fn connections_lost(&self) -> u64 {
        0
    }
}

/// A gateway's own disk, which keeps events while their queue takes none.
pub trait Spool: Send + Sync + 'static {
    /// Returns the event's number only when the event survives the process and a power failure; numbers grow. `None` if the
    /// event was kept before.
    fn keep(&self, envelope: Envelope) -> impl Future<Output = Result<Option<i64>, StoreError>> + Send;
    /// Up to `most` events with numbers over `after` and not in `skip`, oldest first; fewer if they are large, but at
    /// least one if there is one.
    fn read(
        &self,
        after: i64,
        most: usize,
        skip: BTreeSet<i64>,
    ) -> impl Future<Output = Result<Vec<(i64, Envelope)>, StoreError>> + Send;
    /// Removes events that are durable elsewhere.
    fn release(&self, numbers: Vec<i64>) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Whether an event could be kept now; the error says why not.
    fn ready(&self) -> Result<(), StoreError>;
    fn usage(&self) -> Usage;
}

/// How much a spool holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub events: u64,
    /// Bytes on the disk, including everything that is stored with the events.
    pub bytes: u64,
}

/// Remembers which events are durable, for stores whose queue cannot.
pub trait Seen: Send + Sync + 'static {
    fn contains(&self, key: &str) -> impl Future<Output = Result<bool, StoreError>> + Send;
    /// Called after the event is durable, never before.
    fn mark(&self, key: &str) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// An event handed to a worker.
#[derive(Debug)]
pub struct Delivery<H> {
    pub envelope: Envelope,
    /// Attempts that were begun and never concluded, if the queue counts them; otherwise the claim does.
    pub abandoned: u32,
    /// How often it was delivered before. Includes deliveries that were only prefetched and never handled.
    pub redelivered: u32,
    /// The route for which it was parked, if it was.
    pub parked: Option<Arc<str>>,
    /// What the store needs to settle it.
    pub handle: H,
}

/// How a delivery ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    Done,
    /// A copy of the event goes on elsewhere, or it is finished: remove this one and record nothing.
    Superseded,
    /// Delivered again after `delay`, as attempt number `attempt`.
    Retry {
        delay: Duration,
        attempt: u32,
    },
    /// Delivered again after `delay`, unchanged, because another process holds the lease.
    Wait {
        delay: Duration,
    },
    Dead {
        reason: Reason,
        error: Option<String>,
    },
}

/// What a store needs to settle a delivery.
pub trait Handle: Send + 'static {
    /// Whether it can still be settled. If not, the store delivers the event again.
    fn is_live(&self) -> bool {
        true
    }
}

impl<H: Handle> Delivery<H> {
    pub fn is_live(&self) -> bool {
        self.handle.is_live()
    }
}

/// A delivery whose settlement is durable, and which is still in hand.
#[derive(Debug)]
#[must_use = "the event is delivered again unless its delivery is finished"]
pub struct Settled<H>(pub H);

/// The result of parking a delivery.
#[derive(Debug)]
pub enum Parked<H> {
    /// It waits with the route's other parked events.
    Kept,
    /// There is no room for it, and it is still in hand.
    Full(Box<Delivery<H>>),
}

/// The consuming side of the queue.
pub trait Deliveries: Send + Sync + 'static {
    type Handle: Handle;
    /// The next event, fresh or parked; waits for one. Cancel-safe.
    fn next(&self) -> impl Future<Output = Result<Delivery<Self::Handle>, StoreError>> + Send;
    /// From now on `next` returns the parked events of these routes and of no others, except those that are on their way
    /// already.
    fn take_parked(&self, routes: &[Arc<str>]);
    /// Returns when the store wants everything back that no handler has begun: an event may end the process, and must be the
    /// only one in hand. Cancel-safe.
    fn recalled(&self) -> impl Future<Output = ()> + Send;
    /// Notes that a handler is about to run: from here on the store may count its time.
    fn begin(&self, delivery: &Delivery<Self::Handle>);
    /// Moves the event to the route's parked ones, unchanged: no attempt is counted.
    fn park(
        &self,
        delivery: Delivery<Self::Handle>,
        route: Arc<str>,
    ) -> impl Future<Output = Result<Parked<Self::Handle>, StoreError>> + Send;
    /// Makes it the event of the first of these routes, with a copy for each other one; all are durable when this returns. If
    /// it is delivered again without the route's name, the copies are made once more, and claims absorb them.
    fn copy(
        &self,
        delivery: &mut Delivery<Self::Handle>,
        routes: &[Arc<str>],
    ) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Returns it to where it came from, for any worker to take.
    fn give_back(&self, delivery: Delivery<Self::Handle>) -> impl Future<Output = ()> + Send;
    /// Makes the settlement durable: a retry or a dead letter stands in its queue when this returns. The delivery stays in hand until
    /// [`finish`](Deliveries::finish). `route`: the one that the delivery went to, if any. A failure leaves the event in the queue: it
    /// will be delivered again.
    fn settle(
        &self,
        delivery: Delivery<Self::Handle>,
        route: Option<Arc<str>>,
        settlement: Settlement,
    ) -> impl Future<Output = Result<Settled<Self::Handle>, StoreError>> + Send;
    /// Removes a delivery whose settlement is durable. The caller records what it must before this: a crash in between delivers the
    /// event again, and the record then shows that it is a repeat.
    fn finish(&self, settled: Settled<Self::Handle>) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Whether events could be delivered now; the error says why not.
    fn ready(&self) -> Result<(), StoreError>;
}

/// Stores the state machine of [`crate::claim`].
pub trait Claims: Send + Sync + 'static {
    fn claim(
        &self,
        key: &ClaimKey,
        attempt: u32,
        holder: u64,
        lease: Duration,
    ) -> impl Future<Output = Result<Verdict, StoreError>> + Send;
    /// Whether the lease is still the holder's.
    fn renew(
        &self,
        key: &ClaimKey,
        holder: u64,
        lease: Duration,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send;
    fn conclude(
        &self,
        key: &ClaimKey,
        holder: u64,
        conclusion: Conclusion,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// Stores who has paused which route.
pub trait RouteRecords: Send + Sync + 'static {
    /// How long the store may be empty without that meaning anything: other workers write back what they know.
    const GRACE: Duration;
    fn read(&self) -> impl Future<Output = Result<Records, StoreError>> + Send;
    /// Stores the record, unless one with the same or a later epoch is there. Returns whether it was stored.
    fn write(&self, route: &str, record: &RouteRecord) -> impl Future<Output = Result<bool, StoreError>> + Send;
}

/// The result of replaying or dropping dead letters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// How many were moved.
    pub count: usize,
    /// Why the others were not, if something stopped it.
    pub stopped: Option<StoreError>,
}

/// Keeps which processes run, each by its last heartbeat.
pub trait Instances: Send + Sync + 'static {
    /// Records that the process runs, for [`GONE_AFTER`](crate::instance::GONE_AFTER).
    fn beat(&self, instance: &Instance) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Records that the process has ended.
    fn leave(&self, id: &str) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// The processes that run.
    fn list(&self) -> impl Future<Output = Result<Vec<Instance>, StoreError>> + Send;
}

/// Where a page of dead letters ends. Only the store that made it can go on from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageToken(pub i64);

/// Some dead letters, in the order in which their store keeps them.
#[derive(Clone, Debug)]
pub struct Page {
    pub dead_letters: Vec<DeadLetter>,
    /// Where the next page begins; `None` after the last one.
    pub next: Option<PageToken>,
}

/// The dead letters.
pub trait DeadLetters: Send + Sync + 'static {
    /// Up to `limit` dead letters, oldest first: from the beginning, or from where the page with that token ended. A store that
    /// holds what it has shown, as a queue does, goes on from its last page alone; an older token is an error.
    fn page(&self, from: Option<PageToken>, limit: usize) -> impl Future<Output = Result<Page, StoreError>> + Send;
    /// Puts the dead letters back into the queue, see [`DeadLetter::replayed`].
    fn replay(&self, dead_letters: Vec<DeadLetterId>) -> impl Future<Output = Moved> + Send;
    /// Releases what is held between calls. The next call starts anew.
    fn release(&self) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Removes the dead letters for good.
    fn discard(&self, dead_letters: Vec<DeadLetterId>) -> impl Future<Output = Moved> + Send;
}

/// The life of a service's backend, from its start to its end. The parts themselves are the ports above.
pub trait Lifecycle: Send + Sync + 'static {
    type Instances: Instances;
    /// Where the processes that run are kept.
    fn instances(&self) -> Arc<Self::Instances>;
    /// An error if it cannot work now; else a warning, if there is one.
    fn ready(&self) -> Result<Option<String>, String>;
    /// Updates its state in the metrics. Never returns.
    fn watch(&self) -> impl Future<Output = ()> + Send;
    /// Takes nothing new, gives back what no handler has begun, and ends background work, until `by` at the latest.
    fn stop(&self, by: Instant) -> impl Future<Output = ()> + Send;
    /// Ends its connections and threads after their pending work is done. Later uses fail, and a second call
    /// does nothing.
    fn close(&self) -> impl Future<Output = ()> + Send;
}

/// Asks a worker for an answer that a caller waits for.
pub trait Ask: Send + Sync + 'static {
    /// The answer, a JSON object; or why there is none: no worker (known within a second), no worker with a handler, a failed
    /// handler, or no connection. The caller owns the deadline: it drops the call, and an answer that comes later is
    /// dropped and counted. `within`: how much time the worker has.
    fn ask(&self, call: Envelope, within: Duration) -> impl Future<Output = Result<Bytes, Reason>> + Send;
}

/// A call handed to a worker.
#[derive(Debug)]
pub struct Call<H> {
    pub envelope: Envelope,
    /// The caller waits for the answer no longer than this.
    pub within: Duration,
    /// What the store needs to answer it.
    pub handle: H,
}

/// The answering side of [`Ask`].
pub trait Calls: Send + Sync + 'static {
    type Handle: Send + 'static;
    /// The next call; waits for one. Cancel-safe.
    fn next(&self) -> impl Future<Output = Result<Call<Self::Handle>, StoreError>> + Send;
    /// Replies with the answer, or with why there is none. A call without a reply is delivered again while there is time.
    fn answer(
        &self,
        handle: Self::Handle,
        answer: Result<Bytes, Reason>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// What to do about a call that may be a repeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallState {
    /// It is the first with its key: ask, then remember.
    First,
    /// The first one is being answered elsewhere.
    InWork,
    Answered(Bytes),
}

/// Remembers answers to calls, so that a repeat gets the first answer again.
pub trait Answers: Send + Sync + 'static {
    /// `within` is how long the call may be in work; after that the next one with its key is the first.
    fn begin(&self, key: &str, within: Duration) -> impl Future<Output = Result<CallState, StoreError>> + Send;
    /// `window` is how long the answer is remembered.
    fn remember(
        &self,
        key: &str,
        answer: Bytes,
        window: Duration,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Ends the work on a call whose answer could not be remembered, so that a repeat is asked again.
    fn forget(&self, key: &str) -> impl Future<Output = Result<(), StoreError>> + Send;
}
