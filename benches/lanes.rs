//! How a route is affected by another one whose service hangs, answers 500 to everything, or is down: its throughput and the time
//! from a push to its handling, compared with the same load while the other service is well. `up` on the embedded store, and a
//! gateway and a worker on one RabbitMQ and one Redis, started here.
//!
//! Run with `cargo bench --bench lanes`. What counts is the ratio within one run: the cases take turns. Options, by environment:
//! BENCH_SECONDS (5, of each case), BENCH_ROUNDS (3), BENCH_RATE (300 events a second, half of them for each route).

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a measurement that cannot go on should say where")]
#![expect(clippy::print_stdout, reason = "it prints a table")]
#![expect(unreachable_pub, dead_code, reason = "the harness has more than is needed here")]

#[path = "../tests/harness/mod.rs"]
mod harness;

use harness::process::{Server, Setup, Site};
use harness::receiver::{Received, Receiver, reply};
use harness::servers::{Backends, free_port};
use harness::wire::{Webhook, send};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// What is wrong with the other route's service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Case {
    Well,
    Hangs,
    Answers500,
    IsDown,
}

const CASES: [Case; 4] = [Case::Well, Case::Hangs, Case::Answers500, Case::IsDown];

/// The figures of the route whose service is well.
#[derive(Clone, Debug, Default)]
struct Figures {
    events: usize,
    seconds: f64,
    millis: Vec<f64>,
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[tokio::main]
async fn main() {
    for services in [false, true] {
        let mut all: HashMap<Case, Figures> = HashMap::new();
        for _ in 0..setting("BENCH_ROUNDS", 3) {
            for case in CASES {
                let Figures { events, seconds, millis } = measure(services, case).await;
                let sum = all.entry(case).or_default();
                sum.events += events;
                sum.seconds += seconds;
                sum.millis.extend(millis);
            }
        }
        println!("{}", if services { "RabbitMQ and Redis" } else { "embedded store" });
        println!("{:12} {:>10} {:>9} {:>9}   ratio: events, p99", "other route", "events/s", "p50 ms", "p99 ms");
        let row = |figures: &mut Figures| {
            figures.millis.sort_by(f64::total_cmp);
            let at = |share: f64| figures.millis[((figures.millis.len() - 1) as f64 * share) as usize];
            (figures.events as f64 / figures.seconds, at(0.5), at(0.99))
        };
        let (rate, _, p99) = row(all.get_mut(&Case::Well).unwrap());
        for case in CASES {
            let (events, median, slowest) = row(all.get_mut(&case).unwrap());
            println!(
                "{:12} {events:10.1} {median:9.2} {slowest:9.2}   {:.3}, {:.3}",
                format!("{case:?}"),
                events / rate,
                slowest / p99
            );
        }
    }
}

/// Sends events of two routes at a steady rate.
async fn measure(services: bool, case: Case) -> Figures {
    let handled: Arc<Mutex<HashMap<String, Instant>>> = Arc::default();
    let times = Arc::clone(&handled);
    let well = Receiver::start(move |request: &Received| {
        times.lock().unwrap().insert(request.header("x-webhook-id").to_owned(), Instant::now());
        reply(200, &[])
    })
    .await;
    let (hangs, gate) = Receiver::gated().await;
    let fails = Receiver::start(|_| reply(500, &[])).await;
    let other = match case {
        Case::Well => well.url(),
        Case::Hangs => hangs.url(),
        Case::Answers500 => fails.url(),
        Case::IsDown => format!("http://127.0.0.1:{}/", free_port()),
    };
    let site = Site::new();
    let route = |name: &str, events: &str, url: &str| {
        format!(
            "[[worker.routes]]\nname = \"{name}\"\nevents = [\"{events}\"]\nforward = {{ url = \"{url}\", timeout = \"30s\" }}\n"
        )
    };
    let backends = if services { Some(Backends::shared().await) } else { None };
    let tables = backends.map(|backends| backends.tables(&site.name())).unwrap_or_default();
    let rest = route("other", "message.new", &other) + &route("well", "*", &well.url()) + &tables;
    site.configure(&Setup { rest, ..Setup::default() });
    let mut servers: Vec<Server> = Vec::new();
    if services {
        servers.push(site.start_as("gateway").await.ready().await);
        servers.push(site.start_as("worker").await.ready().await);
    } else {
        servers.push(site.start().await);
    }
    let to = servers[0].public;
    let (rate, seconds) = (setting("BENCH_RATE", 300), setting("BENCH_SECONDS", 5));
    // A warm-up, in which the other route's service fails and the failure is noticed.
    let warm = rate;
    let (mut sending, mut sent) = (JoinSet::new(), HashMap::new());
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / u32::try_from(rate).unwrap());
    let mut began = Instant::now();
    for number in 0..warm + rate * seconds {
        ticks.tick().await;
        if number == warm {
            began = Instant::now();
        }
        let (event, name) = if number % 2 == 0 { ("reaction.new", "well") } else { ("message.new", "other") };
        let id = format!("{name}-{number}");
        if number >= warm && name == "well" {
            sent.insert(id.clone(), Instant::now());
        }
        sending.spawn(async move {
            let body = format!(r#"{{"type":"{event}","number":{number},"text":"{}"}}"#, "x".repeat(1500));
            assert_eq!(send(to, &Webhook::push(&id, body)).await.unwrap().status, 200);
        });
    }
    while let Some(result) = sending.join_next().await {
        result.unwrap();
    }
    while sent.keys().any(|id| !handled.lock().unwrap().contains_key(id)) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let handled = handled.lock().unwrap().clone();
    let last = sent.keys().map(|id| handled[id]).max().unwrap();
    let millis = sent.iter().map(|(id, at)| handled[id].saturating_duration_since(*at).as_secs_f64() * 1000.0);
    let figures =
        Figures { events: sent.len(), seconds: last.duration_since(began).as_secs_f64(), millis: millis.collect() };
    gate.open();
    for server in servers {
        server.kill().await;
    }
    figures
}
