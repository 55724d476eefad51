//! What an outage of RabbitMQ costs callers, and how fast a spool is handed over, compared with a bare publisher with confirms on
//! the same RabbitMQ, in one run.
//!
//! Run with `cargo bench --bench spool`. Options, by environment: BENCH_SECONDS (60, of the outage), BENCH_EVENTS (1000000,
//! in the spool), BENCH_BARE (200000, of the bare publisher).

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a measurement that cannot go on should say where")]
#![expect(clippy::print_stdout, reason = "it prints a table")]
#![expect(unreachable_pub, dead_code, reason = "the harness has more than is needed here")]

mod bare;
#[path = "../tests/harness/mod.rs"]
mod harness;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join_all;
use harness::process::{Setup, Site};
use harness::servers::Backends;
use harness::wire::{Webhook, envelope, send};
use lapin::options::QueuePurgeOptions;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use streamgate_core::envelope::Envelope;
use streamgate_core::ports::Spool;
use streamgate_store::sqlite::{SpoolFile, SpoolOptions};

const BODY: usize = 2100;
const RATE: u32 = 500;
const SENDERS: u32 = 50;
const BEFORE: Duration = Duration::from_secs(20);
/// Unconfirmed publishes of the bare publisher at a time: as many as the hand-over of the spool has.
const IN_FLIGHT: usize = 512;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[tokio::main]
async fn main() {
    let mut backends = Backends::start().await;
    outage(&mut backends).await;
    hand_over(&backends).await;
}

async fn outage(backends: &mut Backends) {
    let (site, length) = (Site::new(), Duration::from_secs(setting("BENCH_SECONDS", 60)));
    site.configure(&Setup { rest: backends.impatient_tables(&site.name()), ..Setup::default() });
    let gateway = site.start_as("gateway").await.ready().await;
    println!("{RATE} events/s of {BODY} bytes, a connection each; RabbitMQ killed for {length:?}");
    println!("{:<28} {:>9} {:>9} {:>9} {:>9} {:>9}", "", "requests", "200 %", "p50 ms", "p99 ms", "max ms");
    let before = load(gateway.public, BEFORE).await;
    println!("{:<28} {before}", "before");
    let killed = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        backends.broker.kill();
    };
    // The moment of the kill belongs to the outage.
    let (during, ()) = tokio::join!(load(gateway.public, length), killed);
    println!("{:<28} {during}", "outage");
    let waited = gateway.metric("streamgate_spool_events").await;
    let back = Instant::now();
    backends.broker.restart().await;
    let after = load(gateway.public, BEFORE).await;
    println!("{:<28} {after}", "while it is handed over");
    harness::eventually("the spool is handed over", || async {
        gateway.metric("streamgate_spool_events").await == 0.0
    })
    .await;
    println!(
        "p99 of the outage / before: {:.2}; {waited} events waited, the last was handed over {:.0} s after the restart began",
        during.p99 / before.p99,
        back.elapsed().as_secs_f64()
    );
    assert!(gateway.terminate().await.success());
}

#[derive(Debug)]
struct Figure {
    requests: usize,
    taken: f64,
    p50: f64,
    p99: f64,
    max: f64,
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Figure { requests, taken, p50, p99, max } = self;
        write!(f, "{requests:>9} {taken:>9.3} {p50:>9.2} {p99:>9.2} {max:>9.1}")
    }
}

async fn load(to: SocketAddr, length: Duration) -> Figure {
    let send_all = |sender: u32| async move {
        let (started, pace) = (Instant::now(), Duration::from_secs(1) * SENDERS / RATE);
        let first = started + pace * sender / SENDERS;
        let mut answers = Vec::new();
        for due in (0..).map(|number| first + pace * number).take_while(|due| *due < started + length) {
            tokio::time::sleep_until(due.into()).await;
            let webhook = Webhook::push(&format!("bench-{}", harness::unique()), body());
            let began = Instant::now();
            let answer = send(to, &webhook).await;
            answers.push((began.elapsed(), answer.is_ok_and(|answer| answer.status == 200)));
        }
        answers
    };
    let answers = join_all((0..SENDERS).map(|sender| tokio::spawn(send_all(sender)))).await;
    let answers: Vec<_> = answers.into_iter().flat_map(Result::unwrap).collect();
    let mut latencies: Vec<_> = answers.iter().map(|(latency, _)| latency.as_secs_f64() * 1000.0).collect();
    latencies.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    let taken = answers.iter().filter(|(_, taken)| *taken).count() as f64 * 100.0 / answers.len() as f64;
    Figure { requests: answers.len(), taken, p50: at(0.5), p99: at(0.99), max: at(1.0) }
}

fn body() -> Bytes {
    format!(r#"{{"type":"message.new","n":{},"text":"{}"}}"#, harness::unique(), "x".repeat(BODY - 50)).into()
}

async fn hand_over(backends: &Backends) {
    let (site, events) = (Site::new(), setting("BENCH_EVENTS", 1_000_000));
    let tables = backends.tables_with(&site.name(), "events_max = \"64GiB\"");
    site.configure(&Setup { store: "spool_max = \"64GiB\"".into(), rest: tables, ..Setup::default() });
    // Declares the topology.
    assert!(site.start_as("gateway").await.ready().await.terminate().await.success());
    fill(&site, events).await;
    let queue = format!("{}.events", site.name());
    let one = bare(backends, &site.name()).await;
    let (_connection, channel) = backends.broker.channel().await;
    channel.queue_purge(queue.as_str().into(), QueuePurgeOptions::default()).await.unwrap();
    let began = Instant::now();
    let mut drain = site.command(&["drain", "--json"]).spawn().unwrap();
    let (pid, mut memory) = (drain.id().unwrap(), Vec::new());
    let status = loop {
        tokio::select! {
            status = drain.wait() => break status.unwrap(),
            () = tokio::time::sleep(Duration::from_secs(1)) => memory.extend(harness::process::memory(pid, "VmRSS").map(|bytes| bytes >> 20)),
        }
    };
    let rate = events as f64 / began.elapsed().as_secs_f64();
    assert!(status.success());
    let later = || memory.iter().skip(2);
    let (least, most) = (later().min().unwrap_or(&0), later().max().unwrap_or(&0));
    println!("bare publisher, {IN_FLIGHT} in flight: {one:.0} events/s");
    println!(
        "streamgate drain, {events} events: {rate:.0} events/s; memory {least} to {most} MiB after the first two seconds"
    );
    println!("drain / bare publisher: {:.2}", rate / one);
    let there = backends.broker.ready(&queue).await;
    println!("in the queue after it: {there}");
}

/// A spool as a gateway would leave it.
async fn fill(site: &Site, events: u64) {
    let options = SpoolOptions {
        data_dir: site.data_dir(),
        max_bytes: 64 << 30,
        seen_window: Duration::from_secs(600),
        max_waiting: 1024,
    };
    let spool = SpoolFile::open(&options).unwrap();
    let kept = futures_util::stream::iter(0..events).map(|_| spool.keep(event())).buffer_unordered(1024);
    kept.for_each(|kept| {
        assert!(kept.unwrap().is_some());
        std::future::ready(())
    })
    .await;
    spool.close().await;
}

fn event() -> Envelope {
    envelope(&format!("spooled-{}", harness::unique()), body())
}

/// Events a second of one channel with confirms and nothing around it.
async fn bare(backends: &Backends, prefix: &str) -> f64 {
    let (events, began) = (setting("BENCH_BARE", 200_000), Instant::now());
    bare::publish(&backends.broker, prefix, &body(), events, IN_FLIGHT).await;
    events as f64 / began.elapsed().as_secs_f64()
}
