//! The gateway's side of calls: publishes each call to the queue of calls, and receives the answer directly on its
//! channel. A separate loop checks whether any worker consumes calls, so that a hook without workers costs its caller
//! no wait.

use super::endpoint::Endpoint;
use super::endpoint::REPLY_TIMEOUT;
use super::headers::{self, REPLY_TO};
use super::incoming::Incoming;
use super::link::{self, Link, Session};
use super::topology::Topology;
use bytes::Bytes;
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use streamgate_core::envelope::Envelope;
use streamgate_core::ports::Ask;
use streamgate_core::reason::Reason;
use tokio::sync::{oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

/// Interval between checks whether any worker consumes calls. A check costs the broker a third of a millisecond.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// A broker that takes longer for a check hangs: callers are not made to wait for it.
const HANG_AFTER: Duration = Duration::from_millis(500);

/// Called for each answer whose caller no longer waits.
pub type OnLate = Arc<dyn Fn() + Send + Sync>;

/// Whether calls can be answered now.
#[derive(Clone, Debug)]
enum Availability {
    /// There is no connection, or the broker hangs.
    Down,
    /// No worker consumes calls.
    Nobody,
    Open(Channel),
}

type Reply = oneshot::Sender<Result<Bytes, Reason>>;

/// Calls that wait for their answer, by correlation number.
#[derive(Debug, Default)]
struct Waiting(Mutex<HashMap<u64, Reply>>);

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Reply>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands an answer to the caller that waits for it. Returns whether there was one.
    fn hand_out(&self, answer: Delivery) -> bool {
        let Some((number, answer)) = headers::read_answer(&answer.properties, answer.data) else { return false };
        // Sent after the lock is released: the caller that wakes takes the lock to remove its own entry.
        let waits = self.lock().remove(&number);
        waits.is_some_and(|waits| waits.send(answer).is_ok())
    }
}

/// Asks workers over RabbitMQ.
#[derive(Debug)]
pub struct Caller {
    queue: String,
    link: Arc<Link>,
    availability: watch::Receiver<Availability>,
    waiting: Arc<Waiting>,
    next: AtomicU64,
    _task: AbortOnDropHandle<()>,
}

impl Caller {
    /// Starts to connect. Call within a tokio runtime.
    pub fn start(endpoint: Endpoint, topology: Topology, on_late: OnLate) -> Caller {
        let queue = topology.calls();
        let link = Link::start(endpoint, topology.with_calls().without_probe(), "gateway, calls");
        let (availability_sender, availability) = watch::channel(Availability::Down);
        let waiting = Arc::new(Waiting::default());
        let exchanger = Exchanger {
            queue: queue.clone(),
            link: Arc::clone(&link),
            availability_sender,
            waiting: Arc::clone(&waiting),
            on_late,
        };
        let task = AbortOnDropHandle::new(tokio::spawn(exchanger.run()));
        Caller { queue, link, availability, waiting, next: AtomicU64::new(1), _task: task }
    }

    /// Calls `notify` with whether a worker can answer: now, and after each change.
    pub async fn watch_workers(&self, notify: impl Fn(bool) + Send) {
        let mut availability = self.availability.clone();
        loop {
            notify(matches!(*availability.borrow_and_update(), Availability::Open(_)));
            if availability.changed().await.is_err() {
                return;
            }
        }
    }

    pub async fn close(&self) {
        self.link.close().await;
    }
}

impl Ask for Caller {
    async fn ask(&self, call: Envelope, within: Duration) -> Result<Bytes, Reason> {
        // While an alarm blocks publishing, a call would wait until the alarm ends.
        self.link.session().map_err(|_| Reason::StoreUnavailable)?;
        let channel = match &*self.availability.borrow() {
            Availability::Down => return Err(Reason::StoreUnavailable),
            Availability::Nobody => return Err(Reason::NoWorker),
            Availability::Open(channel) => channel.clone(),
        };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let properties = headers::call(&call, number, within);
        let (sender, reply) = oneshot::channel();
        self.waiting.lock().insert(number, sender);
        let _place = Place { waiting: &self.waiting, number };
        // A failed write shows as a missing answer.
        link::post(&channel, self.queue.as_str().into(), properties, &call.body)
            .map_err(|_| Reason::StoreUnavailable)?;
        // The end of the session drops the sender.
        reply.await.map_err(|_| Reason::StoreUnavailable)?
    }
}

/// A call's entry among the waiting ones, removed on drop however the call ends.
struct Place<'a> {
    waiting: &'a Waiting,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.waiting.lock().remove(&self.number);
    }
}

/// Sends calls and receives their answers, on its own task.
struct Exchanger {
    queue: String,
    link: Arc<Link>,
    availability_sender: watch::Sender<Availability>,
    waiting: Arc<Waiting>,
    on_late: OnLate,
}

impl Exchanger {
    async fn run(self) {
        loop {
            let session = self.link.up().await;
            let why = tokio::select! {
                why = self.serve(&session) => why,
                () = session.ended() => "ended".to_owned(),
            };
            self.availability_sender.send_replace(Availability::Down);
            // Their answers were lost with the channel: failing them now is better than letting them reach their
            // deadlines.
            self.waiting.lock().clear();
            session.fail(why);
        }
    }

    /// Serves one session. Returns why the session cannot be used any more.
    async fn serve(&self, session: &Session) -> String {
        let (asking, looking) = match (session.channel().await, session.channel().await) {
            (Ok(asking), Ok(looking)) => (asking, looking),
            (Err(why), _) | (_, Err(why)) => return why,
        };
        // Direct reply-to requires a consumer on the asking channel before the first call, without acknowledgements.
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let consume = asking.basic_consume(REPLY_TO.into(), "".into(), options, FieldTable::default());
        let answers = match tokio::time::timeout(REPLY_TIMEOUT, consume).await {
            Ok(Ok(answers)) => answers,
            Ok(Err(error)) => return error.to_string(),
            Err(_) => return format!("no consumer of answers within {REPLY_TIMEOUT:?}"),
        };
        let (waiting, on_late) = (Arc::clone(&self.waiting), Arc::clone(&self.on_late));
        let mut incoming = Incoming::each(&asking, answers, move |answer| {
            if !waiting.hand_out(answer) {
                on_late();
            }
            std::future::ready(())
        });
        tokio::select! {
            why = incoming.ended() => why,
            why = self.look(&asking, &looking) => why,
        }
    }

    /// Checks periodically whether any worker consumes calls.
    async fn look(&self, asking: &Channel, looking: &Channel) -> String {
        let options = QueueDeclareOptions { passive: true, durable: true, ..QueueDeclareOptions::default() };
        let mut ticks = tokio::time::interval(CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let asked = looking.queue_declare(self.queue.as_str().into(), options, FieldTable::default());
            let asked = or_hang(asked, || drop(self.availability_sender.send_replace(Availability::Down))).await;
            let availability = match asked {
                Ok(queue) if queue.consumer_count() > 0 => Availability::Open(asking.clone()),
                Ok(_) => Availability::Nobody,
                Err(error) => return error.to_string(),
            };
            self.availability_sender.send_if_modified(|known| {
                let same = std::mem::discriminant(known) == std::mem::discriminant(&availability);
                if !same {
                    *known = availability;
                }
                !same
            });
        }
    }
}

/// Awaits a reply to its end, and calls `on_hang` when it takes long. It is not abandoned: the library would keep
/// the slot of an abandoned request.
async fn or_hang<T>(asked: impl Future<Output = T>, on_hang: impl FnOnce()) -> T {
    let mut asked = std::pin::pin!(asked);
    tokio::select! {
        result = &mut asked => return result,
        () = tokio::time::sleep(HANG_AFTER) => on_hang(),
    }
    asked.await
}
