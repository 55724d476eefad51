//! The fault suite: a steady load of signed events, and one fault after the other, or two together. Whatever was answered 2xx is
//! handled with an identical body, and nothing is refused that could have been taken.
//!
//! The table's columns: attempts of the sender, and those of them that were answered 2xx; answers that named the spool; messages
//! that a gateway published though the same event had been published before (copies that RabbitMQ nacked, and repeats of the
//! sender's while Redis is away, among them); deliveries to the service beyond each event's first; how long after the end of the
//! fault all was handled and the spools empty; the most memory of a gateway.
//!
//! `tests/run` makes each fault once, briefly. `tests/run --soak` goes on for STREAMGATE_TEST_FAULT_SECONDS, in random order and
//! with two at a time; the seed that it prints makes the same order again, as STREAMGATE_TEST_SEED.

mod world;

use crate::harness::proxy::Random;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use world::World;

/// Events that are accepted while a fault lasts; in a soak, of those while packets are lost: for half a minute.
const WHILE: usize = 150;
const WHILE_PACKETS_ARE_LOST: usize = 3000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    BrokerKilled,
    /// As an operator does it.
    BrokerRestarted,
    /// For longer than the heartbeats.
    BrokerHangs,
    MemoryAlarm,
    DiskAlarm,
    /// It refuses what is over its limit.
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
    /// No commit ends.
    SpoolHangs,
    /// Each commit waits for a fifth of a second.
    SpoolSlow,
    SpoolFull,
    /// A gateway does not start on it, and says so.
    SpoolReadOnly,
    BrokerAndRedisKilled,
    /// What waits expires: it is replayed from the dead letters.
    PolicyExpiresEvents,
    /// What waits expires: an operator moves the dead letters back by hand.
    DeadLettersMoved,
    /// New connections may not publish any more.
    PermissionsTaken,
    /// A look at the queue, a dozen times, as with the management UI.
    OperatorPeeks,
    /// It takes no writes: it became a replica.
    RedisReplica,
    /// It takes no writes: it cannot save.
    RedisCannotSave,
    /// A gateway's, with its database open.
    DataDirectoryMoved,
    /// A gateway writes every line there is into a pipe that nobody reads.
    LogStalled,
    /// A gateway's stderr is a file on a full disk.
    LogFull,
    /// A worker's, by a day.
    ClockSetBack,
}

use Fault::*;

/// What a fault breaks: two that break one thing are not made together.
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

/// A disk is needed only while RabbitMQ takes nothing.
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
            println!("{faults:?}: left out, for want of the right to mount a tmpfs: run as root, or with sudo -n");
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
    // A sender that was refused for good has panicked.
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
