//! The fault suite: a steady load of signed events, and one fault after the other, or two together. Every event that was answered
//! 2xx is handled with an identical body, and no event is refused that could have been taken.
//!
//! The table's columns: requests of the senders; the share of them that was answered 2xx; answers that named the spool; messages
//! that a gateway published though the same event had been published before (among them copies that RabbitMQ nacked, and the
//! sender's repeats while Redis is down); deliveries to the service beyond each event's first; the time from the end of the fault
//! until all events were handled and the spools were empty; the peak memory of a gateway.
//!
//! `tests/run` makes each fault once, briefly. `tests/run --soak` goes on for STREAMGATE_TEST_FAULT_SECONDS, in random order and
//! with two faults at a time; STREAMGATE_TEST_SEED, set to the seed that a run prints, repeats its order.

mod world;

use crate::harness::proxy::Random;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use world::World;

/// How many events are accepted while a fault lasts; in a soak, while packets are lost, as many as take half a minute.
const WHILE: usize = 150;
const WHILE_PACKETS_ARE_LOST: usize = 3000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    BrokerKilled,
    /// With `rabbitmqctl`, as an operator does it.
    BrokerRestarted,
    /// For longer than the heartbeats.
    BrokerHangs,
    MemoryAlarm,
    DiskAlarm,
    /// The queue refuses events over its limit.
    EventsQueueFull,
    EventsQueueDeleted,
    AlternateExchangeDeleted,
    /// The publish does not arrive.
    CutBeforeTheConfirm,
    /// The publish arrives, its confirm does not.
    CutAfterThePublish,
    LosesPackets,
    RedisKilled,
    RedisHangs,
    RedisFlushed,
    RedisFull,
    GatewayKilled,
    WorkerKilled,
    GatewayAndWorkerKilled,
    /// No commit finishes.
    SpoolHangs,
    /// Each commit waits for a fifth of a second.
    SpoolSlow,
    SpoolFull,
    /// A gateway does not start on it, and its error says so.
    SpoolReadOnly,
    BrokerAndRedisKilled,
    /// Queued events expire, and are replayed from the dead letters.
    PolicyExpiresEvents,
    /// Queued events expire, and an operator moves the dead letters back by hand.
    DeadLettersMoved,
    /// New connections may not publish any more.
    PermissionsTaken,
    /// An operator looks at the queue a dozen times, as with the management UI.
    OperatorPeeks,
    /// Redis became a replica, and takes no writes.
    RedisReplica,
    /// Redis cannot save, and takes no writes.
    RedisCannotSave,
    /// The data directory of a gateway, with its database open.
    DataDirectoryMoved,
    /// A gateway logs at trace level into a pipe that nobody reads.
    LogStalled,
    /// A gateway's stderr is a file on a full disk.
    LogFull,
    /// A worker's clock, by a day.
    ClockSetBack,
}

use Fault::*;

/// The part that a fault breaks: two faults of one part are not made together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Broker,
    Redis,
    /// A gateway, its disk or a worker: a gateway does not start on a disk that hangs.
    Process,
}

const ALL: [(Fault, &[Part]); 33] = [
    (BrokerKilled, &[Part::Broker]),
    (BrokerRestarted, &[Part::Broker]),
    (BrokerHangs, &[Part::Broker]),
    (MemoryAlarm, &[Part::Broker]),
    (DiskAlarm, &[Part::Broker]),
    (EventsQueueFull, &[Part::Broker]),
    (EventsQueueDeleted, &[Part::Broker]),
    (AlternateExchangeDeleted, &[Part::Broker]),
    (CutBeforeTheConfirm, &[Part::Broker]),
    (CutAfterThePublish, &[Part::Broker]),
    (LosesPackets, &[Part::Broker]),
    (RedisKilled, &[Part::Redis]),
    (RedisHangs, &[Part::Redis]),
    (RedisFlushed, &[Part::Redis]),
    (RedisFull, &[Part::Redis]),
    (GatewayKilled, &[Part::Process]),
    (WorkerKilled, &[Part::Process]),
    (GatewayAndWorkerKilled, &[Part::Process]),
    (SpoolHangs, &[Part::Process]),
    (SpoolSlow, &[Part::Process]),
    (SpoolFull, &[Part::Process]),
    (SpoolReadOnly, &[Part::Process]),
    (BrokerAndRedisKilled, &[Part::Broker, Part::Redis]),
    (PolicyExpiresEvents, &[Part::Broker, Part::Process]),
    (DeadLettersMoved, &[Part::Broker, Part::Process]),
    (PermissionsTaken, &[Part::Broker]),
    (OperatorPeeks, &[Part::Broker]),
    (RedisReplica, &[Part::Redis]),
    (RedisCannotSave, &[Part::Redis]),
    (DataDirectoryMoved, &[Part::Process, Part::Broker]),
    (LogStalled, &[Part::Process]),
    (LogFull, &[Part::Process]),
    (ClockSetBack, &[Part::Process, Part::Broker]),
];

/// The pairs that are tried: a disk is needed only while RabbitMQ takes no events.
const TOGETHER: [[Fault; 2]; 3] = [[BrokerKilled, SpoolHangs], [MemoryAlarm, SpoolSlow], [EventsQueueFull, SpoolFull]];

fn seed() -> u64 {
    let given = std::env::var("STREAMGATE_TEST_SEED").ok().map(|text| text.parse().unwrap());
    given.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1)
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_breaks_nothing_acknowledged_is_lost() {
    let (seed, started) = (seed(), Instant::now());
    let soak: Option<u64> = std::env::var("STREAMGATE_TEST_FAULT_SECONDS").ok().map(|text| text.parse().unwrap());
    let mut world = World::start(seed).await;
    println!(
        "seed {seed}\n{:<46} {:>8} {:>7} {:>8} {:>11} {:>8} {:>9} {:>8}",
        "fault", "requests", "2xx %", "spooled", "enqd. again", "repeats", "recover s", "peak MiB"
    );
    let events = |faults: &[Fault]| match soak {
        Some(_) if faults.contains(&LosesPackets) => WHILE_PACKETS_ARE_LOST,
        _ => WHILE,
    };
    let rounds = ALL.iter().map(|(fault, _)| vec![*fault]).chain(TOGETHER.map(Vec::from));
    for faults in rounds {
        if faults.iter().all(|fault| world.can(*fault)) {
            println!("{}", world.suffer(&faults, events(&faults)).await);
        } else {
            println!("{faults:?}: left out, since this user may not mount a tmpfs: run as root, or with sudo -n");
        }
    }
    let mut random = Random(seed);
    while soak.is_some_and(|seconds| started.elapsed() < Duration::from_secs(seconds)) {
        let [(one, parts), (two, others)] = [0; 2].map(|_| ALL[(random.next() % ALL.len() as u64) as usize]);
        let both = if parts.iter().any(|part| others.contains(part)) { vec![one] } else { vec![one, two] };
        let faults: Vec<_> = both.into_iter().filter(|fault| world.can(*fault)).collect();
        println!("{}", world.suffer(&faults, events(&faults)).await);
    }
    world.promises_were_kept();
    let World { load, service, workers, gateways: _gateways, .. } = world;
    // A sender whose event was refused with a 4xx has panicked.
    let ledger = load.stop().await;
    let repeats = ledger.prove(&service).await;
    println!(
        "seed {seed}: {} events accepted, 0 lost, {} given up by their sender, {repeats} deliveries repeated",
        ledger.accepted(),
        ledger.refused.load(Ordering::Relaxed),
    );
    let listed = workers[0].0.run(&["dead", "list", "--json"]).await;
    assert_eq!(String::from_utf8_lossy(&listed.stdout).trim(), "[]", "nothing ended in the dead letters: {listed:?}");
}
