//! The spool held against a model: a queue and a disk that fail in every way that RabbitMQ and SQLite may, callers that give
//! up, and crashes. Whatever was answered 2xx is in the queue in the end.

use crate::spool::{SpoolPolicy, Spooled};
use bytes::Bytes;
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use streamgate_core::envelope::Envelope;
use streamgate_core::id::Kind;
use streamgate_core::ports::{Accepted, Enqueue, Spool, StoreError, Usage};
use streamgate_service::metrics::Metrics;
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

const POLICY: SpoolPolicy =
    SpoolPolicy { spool_after: Duration::from_millis(250), confirm_timeout: Duration::from_secs(2) };
const DEADLINE: Duration = Duration::from_millis(4500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broker {
    Up,
    /// Refuses, as a queue at its limit does.
    Nacks,
    /// Takes, and confirms nothing until it changes.
    Silent,
    /// No connection. What it had not confirmed is in the queue, or is not.
    Down,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disk {
    Works,
    /// No commit succeeds. After a crash one that failed may be there all the same.
    Fails,
    /// No commit ends until it changes.
    Hangs,
}

#[derive(Clone, Debug)]
enum Op {
    Event,
    /// One that was sent before, by its place.
    Repeat(usize),
    Broker(Broker),
    Disk(Disk),
    Pass(u64),
    /// SIGKILL, and a new process on the same disk. The coin decides what the contracts leave open.
    Crash(bool),
}

type Told = oneshot::Sender<Result<(), StoreError>>;

/// RabbitMQ, as far as the port shows it.
#[derive(Debug)]
struct Queue {
    mode: Mutex<Broker>,
    messages: Mutex<Vec<String>>,
    held: Mutex<Vec<(String, Told)>>,
}

impl Queue {
    fn new() -> Queue {
        Queue { mode: Mutex::new(Broker::Up), messages: Mutex::default(), held: Mutex::default() }
    }

    fn turn(&self, mode: Broker) {
        *self.mode.lock().unwrap() = mode;
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        for (place, (key, told)) in held.into_iter().enumerate() {
            match mode {
                Broker::Silent => self.held.lock().unwrap().push((key, told)),
                Broker::Up | Broker::Nacks => {
                    self.messages.lock().unwrap().push(key);
                    drop(told.send(Ok(())));
                }
                Broker::Down => {
                    if place.is_multiple_of(2) {
                        self.messages.lock().unwrap().push(key);
                    }
                    drop(told.send(Err(StoreError::Unavailable("cut".into()))));
                }
            }
        }
    }
}

impl Enqueue for Queue {
    async fn enqueue(&self, envelope: Envelope) -> Result<Accepted, StoreError> {
        tokio::task::yield_now().await;
        let mode = *self.mode.lock().unwrap();
        match mode {
            Broker::Up => {
                self.messages.lock().unwrap().push(envelope.key);
                Ok(Accepted::Enqueued)
            }
            Broker::Nacks => Err(StoreError::Full("nack".into())),
            Broker::Down => Err(StoreError::Unavailable("down".into())),
            Broker::Silent => {
                let (tell, told) = oneshot::channel();
                self.held.lock().unwrap().push((envelope.key, tell));
                told.await.unwrap().map(|()| Accepted::Enqueued)
            }
        }
    }

    fn ready(&self) -> Result<(), StoreError> {
        match *self.mode.lock().unwrap() {
            Broker::Down => Err(StoreError::Unavailable("down".into())),
            Broker::Up | Broker::Nacks | Broker::Silent => Ok(()),
        }
    }
}

/// What outlives a process.
#[derive(Clone, Debug, Default)]
struct Platter {
    rows: BTreeMap<i64, Envelope>,
    seen: HashSet<String>,
    next: i64,
}

/// SQLite, as its contract has it: a commit that returned is there, one that failed is not, until a crash decides anew.
#[derive(Debug)]
struct File {
    mode: watch::Sender<Disk>,
    platter: Mutex<Platter>,
    /// Commits that failed: a crash may find them done.
    open: Mutex<Vec<Write>>,
}

#[derive(Clone, Debug)]
enum Write {
    Keep(Box<Envelope>),
    Release(Vec<i64>),
}

impl Platter {
    fn write(&mut self, write: Write) -> Option<i64> {
        match write {
            Write::Keep(envelope) => {
                if !self.seen.insert(envelope.key.clone()) {
                    return None;
                }
                self.next += 1;
                self.rows.insert(self.next, *envelope);
                Some(self.next)
            }
            Write::Release(rows) => {
                rows.iter().for_each(|row| drop(self.rows.remove(row)));
                None
            }
        }
    }
}

impl File {
    fn new(platter: Platter) -> File {
        File { mode: watch::channel(Disk::Works).0, platter: Mutex::new(platter), open: Mutex::default() }
    }

    /// A crash in the middle of whatever goes on.
    fn crash(&self, coin: bool) -> Platter {
        let mut platter = self.platter.lock().unwrap().clone();
        if coin {
            let open = std::mem::take(&mut *self.open.lock().unwrap());
            for write in open {
                platter.write(write);
            }
        }
        platter
    }

    async fn commit(&self, write: Write) -> Result<Option<i64>, StoreError> {
        tokio::task::yield_now().await;
        let mut mode = self.mode.subscribe();
        let place = self.open.lock().unwrap().len();
        let now = *mode.wait_for(|mode| *mode != Disk::Hangs).await.unwrap();
        match now {
            Disk::Works => Ok(self.platter.lock().unwrap().write(write)),
            Disk::Fails | Disk::Hangs => {
                self.open.lock().unwrap().push(write);
                Err(StoreError::Unavailable(format!("write {place} failed")))
            }
        }
    }
}

impl Spool for File {
    async fn keep(&self, envelope: Envelope) -> Result<Option<i64>, StoreError> {
        self.commit(Write::Keep(Box::new(envelope))).await
    }

    async fn read(&self, after: i64, most: usize) -> Result<Vec<(i64, Envelope)>, StoreError> {
        tokio::task::yield_now().await;
        if *self.mode.borrow() == Disk::Fails {
            return Err(StoreError::Unavailable("cannot be read".into()));
        }
        let platter = self.platter.lock().unwrap();
        // Small pages, so that a pass has several.
        Ok(platter.rows.range(after + 1..).take(most.min(3)).map(|(row, event)| (*row, event.clone())).collect())
    }

    async fn release(&self, numbers: Vec<i64>) -> Result<(), StoreError> {
        self.commit(Write::Release(numbers)).await.map(drop)
    }

    fn ready(&self) -> Result<(), StoreError> {
        match *self.mode.borrow() {
            Disk::Works => Ok(()),
            Disk::Fails | Disk::Hangs => Err(StoreError::Unavailable("no disk".into())),
        }
    }

    fn usage(&self) -> Usage {
        Usage { events: self.platter.lock().unwrap().rows.len() as u64, bytes: 0 }
    }
}

fn event(key: &str) -> Envelope {
    Envelope {
        app: "chat".into(),
        kind: Kind::Push,
        id: key.into(),
        event_type: "message.new".into(),
        key: key.into(),
        webhook_attempt: 1,
        api_key: String::new(),
        signature: String::new(),
        received_at_ms: 1,
        attempt: 1,
        cid: None,
        route: None,
        replay: None,
        traceparent: None,
        body: Bytes::new(),
    }
}

/// A gateway process: its spool, its drain, and the requests in its hands.
struct Process {
    spooled: Arc<Spooled<Queue, File>>,
    file: Arc<File>,
    drain: JoinHandle<()>,
    requests: JoinSet<()>,
}

impl Process {
    fn start(queue: &Arc<Queue>, platter: Platter) -> Process {
        let file = Arc::new(File::new(platter));
        let spooled = Arc::new(Spooled::new(Arc::clone(queue), Arc::clone(&file), POLICY, Metrics::new()));
        let draining = Arc::clone(&spooled);
        let drain = tokio::spawn(async move {
            draining.drain(&CancellationToken::new(), Duration::ZERO).await;
        });
        Process { spooled, file, drain, requests: JoinSet::new() }
    }

    /// Answered 2xx: it is in the ledger from then on.
    fn send(&mut self, key: String, ledger: &Arc<Mutex<HashSet<String>>>) {
        let (spooled, ledger) = (Arc::clone(&self.spooled), Arc::clone(ledger));
        self.requests.spawn(async move {
            if let Ok(Ok(_)) = tokio::time::timeout(DEADLINE, spooled.enqueue(event(&key))).await {
                ledger.lock().unwrap().insert(key);
            }
        });
    }
}

#[derive(Debug, Default)]
struct Outcome {
    lost: Vec<String>,
    /// Events that are in the queue more than once.
    doubled: usize,
    left: usize,
}

fn run(ops: Vec<Op>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let (queue, ledger) = (Arc::new(Queue::new()), Arc::default());
        let mut process = Process::start(&queue, Platter::default());
        let mut sent = Vec::new();
        for op in ops {
            match op {
                Op::Event => {
                    let key = format!("event-{}", sent.len());
                    process.send(key.clone(), &ledger);
                    sent.push(key);
                }
                Op::Repeat(_) if sent.is_empty() => {}
                Op::Repeat(place) => process.send(sent[place % sent.len()].clone(), &ledger),
                Op::Broker(mode) => queue.turn(mode),
                Op::Disk(mode) => drop(process.file.mode.send_replace(mode)),
                Op::Pass(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
                Op::Crash(coin) => {
                    process.requests.shutdown().await;
                    process.drain.abort();
                    drop(process.drain.await);
                    let platter = process.file.crash(coin);
                    process = Process::start(&queue, platter);
                }
            }
            tokio::task::yield_now().await;
        }
        queue.turn(Broker::Up);
        process.file.mode.send_replace(Disk::Works);
        while process.requests.join_next().await.is_some() {}
        let ended = async {
            while process.file.usage().events > 0 {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        drop(tokio::time::timeout(Duration::from_secs(60), ended).await);
        let mut counts = HashMap::<String, usize>::new();
        for key in &*queue.messages.lock().unwrap() {
            *counts.entry(key.clone()).or_default() += 1;
        }
        let ledger = ledger.lock().unwrap();
        Outcome {
            lost: ledger.iter().filter(|key| !counts.contains_key(*key)).cloned().collect(),
            doubled: counts.values().filter(|count| **count > 1).count(),
            left: process.file.usage().events as usize,
        }
    })
}

fn weather() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => Just(Op::Event),
        1 => any::<usize>().prop_map(Op::Repeat),
        2 => prop_oneof![Just(Broker::Up), Just(Broker::Nacks), Just(Broker::Silent), Just(Broker::Down)].prop_map(Op::Broker),
        2 => prop_oneof![2 => Just(Disk::Works), 1 => Just(Disk::Fails), 1 => Just(Disk::Hangs)].prop_map(Op::Disk),
        4 => prop_oneof![0..50u64, 200..3000u64].prop_map(Op::Pass),
        1 => any::<bool>().prop_map(Op::Crash),
    ]
}

/// Without cuts, crashes and failing disks.
fn calm(op: &Op) -> bool {
    !matches!(op, Op::Crash(_) | Op::Broker(Broker::Down) | Op::Disk(_) | Op::Repeat(_))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_fails_what_was_answered_is_in_the_queue_in_the_end(ops in proptest::collection::vec(weather(), 1..80)) {
        let told = run(ops);
        prop_assert!(told.lost.is_empty(), "lost: {told:?}");
        prop_assert_eq!(told.left, 0, "the spool is handed over");
    }

    /// A queue that refuses, or stalls and goes on, costs no repeat.
    #[test]
    fn a_stall_doubles_nothing(ops in proptest::collection::vec(weather().prop_filter("calm", calm), 1..80)) {
        let told = run(ops);
        prop_assert!(told.lost.is_empty(), "lost: {told:?}");
        prop_assert_eq!((told.doubled, told.left), (0, 0));
    }
}
