//! Tests the spool with a model: a queue and a disk that fail in every way that RabbitMQ and SQLite may, callers that give
//! up, and crashes. Whatever was answered 2xx is in the queue in the end.

mod disk;
mod queue;

use crate::spool::{SpoolPolicy, Spooled};
use bytes::Bytes;
use disk::{Disk, File, Platter, Write};
use proptest::prelude::*;
use queue::{Broker, Queue};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use streamgate_core::envelope::Envelope;
use streamgate_core::id::Kind;
use streamgate_core::ports::{Enqueue, Spool};
use streamgate_service::metrics::Metrics;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

const POLICY: SpoolPolicy =
    SpoolPolicy { spool_after: Duration::from_millis(250), confirm_timeout: Duration::from_secs(2) };
const DEADLINE: Duration = Duration::from_millis(4500);

#[derive(Clone, Debug)]
enum Op {
    Event,
    /// Sends an earlier event again, chosen by its index.
    Repeat(usize),
    Broker(Broker),
    Disk(Disk),
    Pass(u64),
    /// SIGKILL, and a new process on the same disk. The flag decides what the contracts leave open.
    Crash(bool),
}

fn event(key: &str) -> Envelope {
    Envelope {
        app: "chat".into(),
        kind: Kind::Push,
        id: key.into(),
        event_type: "message.new".into(),
        key: key.into(),
        webhook_attempt: 1,
        attempts: Default::default(),
        api_key: String::new(),
        signature: String::new(),
        received_at_ms: 1,
        attempt: 1,
        cid: None,
        route: None,
        replay: None,
        traceparent: None,
        further: streamgate_core::further::FurtherHeaders::default(),
        body: Bytes::new(),
    }
}

/// A gateway process: its spool, its hand-over, and the requests in its hands.
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
            draining.hand_over(&CancellationToken::new()).await;
        });
        Process { spooled, file, drain, requests: JoinSet::new() }
    }

    /// Sends an event; its key is in the ledger once it is answered 2xx.
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

fn broker() -> impl Strategy<Value = Broker> {
    prop_oneof![Just(Broker::Up), Just(Broker::Nacks), Just(Broker::Silent), Just(Broker::Blocked), Just(Broker::Down)]
}

fn weather() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => Just(Op::Event),
        1 => any::<usize>().prop_map(Op::Repeat),
        2 => broker().prop_map(Op::Broker),
        2 => prop_oneof![2 => Just(Disk::Works), 1 => Just(Disk::Fails), 1 => Just(Disk::Hangs)].prop_map(Op::Disk),
        4 => prop_oneof![0..50u64, 200..3000u64].prop_map(Op::Pass),
        1 => any::<bool>().prop_map(Op::Crash),
    ]
}

/// Whether an operation cuts no connection, crashes nothing and leaves the disk alone.
fn calm(op: &Op) -> bool {
    !matches!(op, Op::Crash(_) | Op::Broker(Broker::Down) | Op::Disk(_) | Op::Repeat(_))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_answered_event_reaches_the_queue_whatever_fails(ops in proptest::collection::vec(weather(), 1..80)) {
        let outcome = run(ops);
        prop_assert!(outcome.lost.is_empty(), "lost: {outcome:?}");
        prop_assert_eq!(outcome.left, 0, "the spool is handed over");
    }

    /// A queue that refuses, or stalls and goes on, causes no repeats.
    #[test]
    fn a_stall_duplicates_no_event(ops in proptest::collection::vec(weather().prop_filter("calm", calm), 1..80)) {
        let outcome = run(ops);
        prop_assert!(outcome.lost.is_empty(), "lost: {outcome:?}");
        prop_assert_eq!((outcome.doubled, outcome.left), (0, 0));
    }
}

/// Puts events on the disk of which the queue never takes those at `places`. Returns how many extra copies of the others that
/// made.
fn poisoned(events: usize, places: &HashSet<usize>) -> usize {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let queue = Arc::new(Queue::new());
        let key = |place: usize| format!("event-{place}");
        queue.poison.lock().unwrap().extend(places.iter().map(|place| key(*place)));
        let mut platter = Platter::default();
        for place in 0..events {
            platter.write(Write::Keep(Box::new(event(&key(place)))));
        }
        let process = Process::start(&queue, platter);
        let good = |key: &String| !queue.poison.lock().unwrap().contains(key);
        let others: HashSet<_> = (0..events).map(key).filter(good).collect();
        let all = async {
            while process.file.usage().events > places.len() as u64 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let all = tokio::time::timeout(Duration::from_secs(25), all).await;
        let messages = queue.messages.lock().unwrap();
        let came: HashSet<_> = messages.iter().cloned().collect();
        assert!(all.is_ok() && came == others, "{} of {}", came.len(), others.len());
        // Live traffic goes to the queue, too.
        assert!(process.spooled.state.is_open() || queue.ready().is_err());
        messages.len() - came.len()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn an_event_that_the_queue_never_takes_keeps_no_other_waiting(
        (events, places) in (1..600usize).prop_flat_map(|events| {
            (Just(events), proptest::collection::hash_set(0..events, 1..=3.min(events)))
        }),
    ) {
        let copies = poisoned(events, &places);
        prop_assert!(copies <= 512 * places.len(), "{copies} copies");
    }
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_hangs_keeps_no_event_from_a_queue_that_takes_it() {
    let (queue, ledger) = (Arc::new(Queue::new()), Arc::default());
    let mut process = Process::start(&queue, Platter::default());
    let wait = |ms| tokio::time::sleep(Duration::from_millis(ms));
    queue.turn(Broker::Nacks);
    process.send("first".into(), &ledger);
    wait(10).await;
    assert!(!process.spooled.state.is_open(), "refused: it is on the disk");
    // The hand-over's next offer is confirmed, but its row cannot be released.
    process.file.mode.send_replace(Disk::Hangs);
    queue.turn(Broker::Up);
    wait(1000).await;
    queue.turn(Broker::Nacks);
    process.send("second".into(), &ledger);
    wait(5000).await;
    assert!(!process.spooled.state.is_open() && !ledger.lock().unwrap().contains("second"), "nothing takes it");
    queue.turn(Broker::Up);
    for key in ["third", "fourth"] {
        process.send(key.into(), &ledger);
        wait(4500).await;
        assert!(ledger.lock().unwrap().contains(key), "{key}");
    }
    process.file.mode.send_replace(Disk::Works);
    wait(5000).await;
    assert_eq!(process.file.usage().events, 0, "what was confirmed is let go");
    assert_eq!(queue.messages.lock().unwrap().len(), 3, "and not repeated");
}

#[tokio::test(start_paused = true)]
async fn an_event_that_was_held_goes_on_without_live_traffic() {
    let queue = Arc::new(Queue::new());
    queue.poison.lock().unwrap().insert("first".into());
    let mut platter = Platter::default();
    for key in ["first", "second"] {
        platter.write(Write::Keep(Box::new(event(key))));
    }
    let mut process = Process::start(&queue, platter);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(process.file.usage().events, 1, "the other one has gone on");
    // The refused event shuts the gate but is not written to the disk, so it cannot serve as a probe.
    process.file.mode.send_replace(Disk::Fails);
    queue.turn(Broker::Nacks);
    process.send("third".into(), &Arc::default());
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(!process.spooled.state.is_open());
    process.file.mode.send_replace(Disk::Works);
    queue.turn(Broker::Up);
    queue.poison.lock().unwrap().clear();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(process.file.usage().events, 0);
    assert!(process.spooled.state.is_open(), "and the next live event goes to the queue");
}
