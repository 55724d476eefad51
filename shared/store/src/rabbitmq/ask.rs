//! The gateway's side of calls: asks through the queue of calls, and is answered straight to its channel. Whether anybody is
//! there to answer is looked up beside, so that a hook without workers costs its caller no wait.

use super::endpoint::Endpoint;
use super::endpoint::PATIENCE;
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

/// Between looks at whether somebody consumes calls. A look costs the broker a third of a millisecond.
const LOOK: Duration = Duration::from_millis(250);
/// A broker that takes longer for a look hangs: callers are not made to wait for it.
const SILENCE: Duration = Duration::from_millis(500);

/// Called for each answer that nobody waits for any more.
pub type OnLate = Arc<dyn Fn() + Send + Sync>;

/// Who could answer now.
#[derive(Clone, Debug)]
enum Line {
    /// No connection, or the broker hangs.
    Down,
    /// Nobody consumes calls.
    Nobody,
    Open(Channel),
}

type Reply = oneshot::Sender<Result<Bytes, Reason>>;

/// Calls that wait for their answer, by number.
#[derive(Debug, Default)]
struct Waiting(Mutex<HashMap<u64, Reply>>);

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Reply>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives an answer to who waits for it, and says whether anybody does.
    fn hand_out(&self, answer: Delivery) -> bool {
        let Some((number, answer)) = headers::read_answer(&answer.properties, answer.data) else { return false };
        // Not under the lock: the caller that is woken takes it to give its place back.
        let waits = self.lock().remove(&number);
        waits.is_some_and(|waits| waits.send(answer).is_ok())
    }
}

/// Asks workers over RabbitMQ.
#[derive(Debug)]
pub struct Caller {
    queue: String,
    link: Arc<Link>,
    line: watch::Receiver<Line>,
    waiting: Arc<Waiting>,
    next: AtomicU64,
    _task: AbortOnDropHandle<()>,
}

impl Caller {
    /// Starts to connect. Call within a tokio runtime.
    pub fn start(endpoint: Endpoint, topology: Topology, on_late: OnLate) -> Caller {
        let queue = topology.calls();
        let link = Link::start(endpoint, topology.with_calls().without_probe(), "gateway, calls");
        let (line_sender, line) = watch::channel(Line::Down);
        let waiting = Arc::new(Waiting::default());
        let exchanger = Exchanger {
            queue: queue.clone(),
            link: Arc::clone(&link),
            line_sender,
            waiting: Arc::clone(&waiting),
            on_late,
        };
        let task = AbortOnDropHandle::new(tokio::spawn(exchanger.run()));
        Caller { queue, link, line, waiting, next: AtomicU64::new(1), _task: task }
    }

    /// Calls for each change of whether somebody is there to answer, from now on.
    pub async fn watch_workers(&self, notify: impl Fn(bool) + Send) {
        let mut line = self.line.clone();
        loop {
            notify(matches!(*line.borrow_and_update(), Line::Open(_)));
            if line.changed().await.is_err() {
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
        // While an alarm blocks publishing, a call would wait for its end.
        self.link.session().map_err(|_| Reason::StoreUnavailable)?;
        let channel = match &*self.line.borrow() {
            Line::Down => return Err(Reason::StoreUnavailable),
            Line::Nobody => return Err(Reason::NoWorker),
            Line::Open(channel) => channel.clone(),
        };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let properties = headers::call(&call, number, within);
        let (sender, reply) = oneshot::channel();
        self.waiting.lock().insert(number, sender);
        let _place = Place { waiting: &self.waiting, number };
        // Whether it could be written shows in whether there is an answer.
        link::post(&channel, self.queue.as_str().into(), properties, &call.body)
            .map_err(|_| Reason::StoreUnavailable)?;
        // The end of the session drops it.
        reply.await.map_err(|_| Reason::StoreUnavailable)?
    }
}

/// A call's place among those that wait, given back however it ends.
struct Place<'a> {
    waiting: &'a Waiting,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.waiting.lock().remove(&self.number);
    }
}

/// Sends questions and takes their answers, on a task of its own.
struct Exchanger {
    queue: String,
    link: Arc<Link>,
    line_sender: watch::Sender<Line>,
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
            self.line_sender.send_replace(Line::Down);
            // Their answers went with the channel: telling them now is better than their deadline.
            self.waiting.lock().clear();
            session.fail(why);
        }
    }

    /// Returns why the session is of no more use.
    async fn serve(&self, session: &Session) -> String {
        let (asking, looking) = match (session.channel().await, session.channel().await) {
            (Ok(asking), Ok(looking)) => (asking, looking),
            (Err(why), _) | (_, Err(why)) => return why,
        };
        // Answers come only to a channel that consumes before it asks, and without acknowledgement.
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let consume = asking.basic_consume(REPLY_TO.into(), "".into(), options, FieldTable::default());
        let answers = match tokio::time::timeout(PATIENCE, consume).await {
            Ok(Ok(answers)) => answers,
            Ok(Err(error)) => return error.to_string(),
            Err(_) => return format!("no consumer of answers within {PATIENCE:?}"),
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

    /// Looks up again and again whether somebody consumes calls.
    async fn look(&self, asking: &Channel, looking: &Channel) -> String {
        let options = QueueDeclareOptions { passive: true, durable: true, ..QueueDeclareOptions::default() };
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let asked = looking.queue_declare(self.queue.as_str().into(), options, FieldTable::default());
            let asked = or_silence(asked, || drop(self.line_sender.send_replace(Line::Down))).await;
            let line = match asked {
                Ok(queue) if queue.consumer_count() > 0 => Line::Open(asking.clone()),
                Ok(_) => Line::Nobody,
                Err(error) => return error.to_string(),
            };
            self.line_sender.send_if_modified(|known| {
                let same = std::mem::discriminant(known) == std::mem::discriminant(&line);
                if !same {
                    *known = line;
                }
                !same
            });
        }
    }
}

/// Awaits an answer to its end, and calls back when it takes long: the library keeps the place of one that is given up.
async fn or_silence<T>(asked: impl Future<Output = T>, on_silence: impl FnOnce()) -> T {
    let mut asked = std::pin::pin!(asked);
    tokio::select! {
        result = &mut asked => return result,
        () = tokio::time::sleep(SILENCE) => on_silence(),
    }
    asked.await
}
