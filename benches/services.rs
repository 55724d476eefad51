//! `streamgate gateway` compared with a bare publisher with confirms, and `streamgate worker` with a handler that does nothing
//! compared with a bare consumer: on one RabbitMQ and one Redis, started here, with the same bodies and headers.
//!
//! Run with `cargo bench --bench services`. Every program measured is a process of its own; what counts is the ratio within
//! one run. Options, by environment: BENCH_SECONDS (3), BENCH_ROUNDS (3), BENCH_EVENTS (20000, of the consumers), BENCH_OTHER (paths of
//! another build's `streamgate` and of its build of this bench, with a colon between them: both builds are measured in turn, under
//! prefixes of their own).

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a measurement that cannot go on should say where")]
#![expect(clippy::print_stdout, reason = "it prints a table")]
#![expect(unreachable_pub, dead_code, reason = "the harness has more than is needed here")]

#[path = "../tests/harness/mod.rs"]
mod harness;

use futures_util::StreamExt;
use harness::process::{Server, Setup, Site};
use harness::servers::Backends;
use harness::wire::Webhook;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use streamgate::{Context, Event, Hooks, Metrics, Pattern, Route, Router, Shutdown, backends, config, worker};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};

const BODY: usize = 2100;
const IN_FLIGHT: usize = 256;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[tokio::main]
async fn main() {
    let args: Vec<_> = std::env::args().collect();
    let place = args.iter().position(|arg| arg.starts_with("--measure-"));
    let Some(place) = place else { return compare().await };
    let figure = match &args[place..] {
        [mode, url, prefix, seconds] if mode == "--measure-publisher" => {
            publisher(url, prefix, Duration::from_secs(seconds.parse().unwrap())).await
        }
        [mode, url, prefix, events] if mode == "--measure-consumer" => {
            consumer(url, prefix, events.parse().unwrap()).await
        }
        [mode, config, events] if mode == "--measure-worker" => noop_worker(config, events.parse().unwrap()).await,
        other => panic!("{other:?}"),
    };
    println!("{} {} {} {}", figure.rate, figure.cpu, figure.p50, figure.p99);
}

/// One build of the two services.
struct Build {
    label: String,
    site: Site,
    prefix: String,
    gateway: Server,
    /// This bench in that build: its worker is measured from within.
    bench: PathBuf,
}

impl Build {
    async fn start(label: &str, binary: &Path, bench: PathBuf, backends: &Backends) -> Build {
        let site = Site::new();
        let prefix = site.name();
        site.configure(&Setup { rest: backends.tables(&prefix), ..Setup::default() });
        let start = async |service: &str| {
            let mut command = tokio::process::Command::new(binary);
            command.arg(service).env_clear().env("STREAMGATE_CONFIG", site.config()).kill_on_drop(true);
            command.stdin(Stdio::null()).current_dir(site.path("."));
            Server::of(command, &site).await.ready().await
        };
        let gateway = start("gateway").await;
        drop(start("worker").await);
        Build { label: label.to_owned(), site, prefix, gateway, bench }
    }
}

async fn compare() {
    let seconds = setting("BENCH_SECONDS", 3);
    let events = setting("BENCH_EVENTS", 20_000);
    let backends = Backends::start().await;
    let url = backends.broker.url();
    let (this, own) = (std::env::current_exe().unwrap(), PathBuf::from(env!("CARGO_BIN_EXE_streamgate")));
    let mut builds = vec![Build::start("", &own, this.clone(), &backends).await];
    if let Ok(other) = std::env::var("BENCH_OTHER") {
        let (binary, bench) = other.split_once(':').expect("BENCH_OTHER names two paths");
        builds.push(Build::start(", other", Path::new(binary), bench.into(), &backends).await);
    }
    println!("{BODY}-byte bodies, {seconds} s a round, {events} events for the consumers; CPU of the process measured");
    println!("{:<42} {:>12} {:>14} {:>9} {:>9}", "", "events/s", "CPU µs/event", "p50 ms", "p99 ms");
    let mut rows: Vec<(String, Vec<Figure>)> = Vec::new();
    for round in 0..=setting("BENCH_ROUNDS", 3) {
        let (length, count) = (seconds.to_string(), events.to_string());
        let mut measured = Vec::new();
        let prefix = &builds[0].prefix;
        let publisher = child(&this, &["--measure-publisher", &url, prefix, &length]).await;
        measured.push(("bare publisher, 256 in flight".to_owned(), publisher));
        purge(&url, prefix).await;
        fill(&url, prefix, events).await;
        measured.push(("bare consumer".into(), child(&this, &["--measure-consumer", &url, prefix, &count]).await));
        for Build { label, site, prefix, gateway, bench } in &builds {
            for connections in [64, 256] {
                let length = Duration::from_secs(seconds);
                let figure = load(gateway.public, gateway.pid(), connections, length).await;
                measured.push((format!("gateway, {connections} connections{label}"), figure));
                purge(&url, prefix).await;
            }
            fill(&url, prefix, events).await;
            let config = site.config().display().to_string();
            let figure = child(bench, &["--measure-worker", &config, &count]).await;
            measured.push((format!("worker, a handler that does nothing{label}"), figure));
        }
        // The first round warms up.
        if round > 0 {
            for (name, figure) in measured {
                println!("{name:<42} {figure}");
                match rows.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, figures)) => figures.push(figure),
                    None => rows.push((name, vec![figure])),
                }
            }
        }
    }
    println!("medians");
    for (name, figures) in &rows {
        println!("{name:<42} {}", Figure::median(figures));
    }
    let median = |name: &str| rows.iter().find(|(known, _)| known == name).map(|(_, figures)| Figure::median(figures));
    let (gateway, worker) = ("gateway, 256 connections", "worker, a handler that does nothing");
    for (what, one, other) in [
        ("gateway (256) / publisher", gateway, "bare publisher, 256 in flight"),
        ("worker / consumer", worker, "bare consumer"),
        ("gateway (64) / other", "gateway, 64 connections", "gateway, 64 connections, other"),
        ("gateway (256) / other", gateway, "gateway, 256 connections, other"),
        ("worker / other", worker, "worker, a handler that does nothing, other"),
    ] {
        if let (Some(one), Some(other)) = (median(one), median(other)) {
            println!("{what}: events/s {:.3}, CPU {:.3}", one.rate / other.rate, one.cpu / other.cpu);
        }
    }
    for build in builds {
        assert!(build.gateway.terminate().await.success());
    }
}

#[derive(Clone, Copy, Debug)]
struct Figure {
    rate: f64,
    /// Microseconds an event.
    cpu: f64,
    /// Milliseconds; 0 for a worker and a consumer.
    p50: f64,
    p99: f64,
}

impl Figure {
    fn of(count: usize, elapsed: Duration, cpu: Duration, mut latencies: Vec<Duration>) -> Figure {
        latencies.sort_unstable();
        let at = |share: f64| match latencies.len() {
            0 => 0.0,
            length => latencies[((length - 1) as f64 * share) as usize].as_secs_f64() * 1000.0,
        };
        let (p50, p99) = (at(0.5), at(0.99));
        Figure { rate: count as f64 / elapsed.as_secs_f64(), cpu: cpu.as_secs_f64() * 1e6 / count as f64, p50, p99 }
    }

    fn median(figures: &[Figure]) -> Figure {
        let of = |field: fn(&Figure) -> f64| {
            let mut values: Vec<_> = figures.iter().map(field).collect();
            values.sort_unstable_by(f64::total_cmp);
            values[values.len() / 2]
        };
        Figure { rate: of(|f| f.rate), cpu: of(|f| f.cpu), p50: of(|f| f.p50), p99: of(|f| f.p99) }
    }
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:>12.0} {:>14.1} {:>9.2} {:>9.2}", self.rate, self.cpu, self.p50, self.p99)
    }
}

/// Measures in a process of its own, which prints the figure.
async fn child(bench: &Path, args: &[&str]) -> Figure {
    let mut command = tokio::process::Command::new(bench);
    let output = command.args(args).kill_on_drop(true).stderr(std::process::Stdio::inherit()).output().await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let numbers: Vec<f64> = text.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let [rate, cpu, p50, p99] = numbers[..] else { panic!("{text}") };
    Figure { rate, cpu, p50, p99 }
}

/// CPU time of a process so far, user and system.
fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    // USER_HZ is 100 on every Linux that this runs on.
    Duration::from_millis(ticks * 10)
}

fn own_cpu() -> Duration {
    cpu(std::process::id())
}

async fn connect(url: &str) -> (Connection, Channel) {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

async fn purge(url: &str, prefix: &str) {
    let (_connection, channel) = connect(url).await;
    channel.queue_purge(format!("{prefix}.events").into(), QueuePurgeOptions::default()).await.unwrap();
}

fn webhook(number: usize) -> Webhook {
    let text = "x".repeat(BODY - 67);
    Webhook::push(
        &format!("bench-{}-{number}", std::process::id()),
        format!(r#"{{"type":"message.new","cid":"messaging:bench","message":{{"text":"{text}"}}}}"#),
    )
}

/// Properties as the gateway writes them.
fn properties(webhook: &Webhook) -> BasicProperties {
    let mut headers = FieldTable::default();
    let signature = harness::wire::sign(&webhook.body);
    for (name, value) in [
        ("x-streamgate-version", "1"),
        ("x-webhook-id", webhook.id()),
        ("x-webhook-attempt", "1"),
        ("x-api-key", harness::wire::API_KEY),
        ("x-signature", &signature),
        ("x-streamgate-key", &format!("chat:push:{}:{}", webhook.id(), &signature[..16])),
        ("x-streamgate-received-at", "2026-04-08T14:23:35.879Z"),
        ("x-streamgate-attempt", "1"),
        ("x-streamgate-cid", "messaging:bench"),
    ] {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    BasicProperties::default()
        .with_delivery_mode(2)
        .with_content_type("application/json".into())
        .with_message_id(webhook.id().into())
        .with_app_id("chat".into())
        .with_type("message.new".into())
        .with_timestamp(1)
        .with_headers(headers)
}

/// One channel, one publishing task, this many confirms awaited at a time.
async fn publish(url: &str, prefix: &str, mut go_on: impl FnMut(usize) -> bool) -> (usize, Vec<Duration>) {
    let (_connection, channel) = connect(url).await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let room = Arc::new(Semaphore::new(IN_FLIGHT));
    let (mut number, mut confirms) = (0, Vec::new());
    let first = webhook(0);
    let template = properties(&first);
    while go_on(number) {
        number += 1;
        let permit = Arc::clone(&room).acquire_owned().await.unwrap();
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        // A new id each time: an event that an earlier round handled would be superseded.
        let id = format!("bench-{}-{}", std::process::id(), harness::unique());
        let mut headers = template.headers().clone().unwrap();
        headers.insert("x-streamgate-key".into(), AMQPValue::LongString(format!("chat:push:{id}:0").into()));
        let properties = template.clone().with_message_id(id.into()).with_headers(headers);
        let started = Instant::now();
        let key = "chat.push.message.new".into();
        let confirm = channel.basic_publish(prefix.into(), key, options, &first.body, properties).await.unwrap();
        confirms.push(tokio::spawn(async move {
            assert!(confirm.await.unwrap().is_ack());
            drop(permit);
            started.elapsed()
        }));
    }
    let latencies = futures_util::future::join_all(confirms).await.into_iter().map(Result::unwrap).collect();
    (number, latencies)
}

async fn publisher(url: &str, prefix: &str, length: Duration) -> Figure {
    let (before, started) = (own_cpu(), Instant::now());
    let (count, latencies) = publish(url, prefix, |_| started.elapsed() < length).await;
    Figure::of(count, started.elapsed(), own_cpu() - before, latencies)
}

async fn fill(url: &str, prefix: &str, events: u64) {
    publish(url, prefix, |number| number < usize::try_from(events).unwrap()).await;
}

async fn consumer(url: &str, prefix: &str, events: usize) -> Figure {
    let (_connection, channel) = connect(url).await;
    channel.basic_qos(256, BasicQosOptions::default()).await.unwrap();
    let queue = format!("{prefix}.events");
    let options = BasicConsumeOptions::default();
    let (before, started) = (own_cpu(), Instant::now());
    let mut consumer = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.unwrap();
    for _ in 0..events {
        let delivery = consumer.next().await.unwrap().unwrap();
        delivery.ack(BasicAckOptions::default()).await.unwrap();
    }
    Figure::of(events, started.elapsed(), own_cpu() - before, Vec::new())
}

/// `streamgate worker` with a handler that counts.
async fn noop_worker(config: &str, events: usize) -> Figure {
    let source = config::Source { file: Some(config.into()), environment: config::Environment::default() };
    let loaded = backends::rabbitmq::for_services(config::load(&source, backends::problems).unwrap()).unwrap();
    let (handled, shutdown) = (Arc::new(AtomicUsize::new(0)), Shutdown::new());
    let (done, is_done) = oneshot::channel();
    let done = std::sync::Mutex::new(Some(done));
    let counted = Arc::clone(&handled);
    let handler = move |_: Event, _: Context| {
        if counted.fetch_add(1, Ordering::Relaxed) + 1 == events {
            done.lock().unwrap().take().unwrap().send(()).unwrap();
        }
        std::future::ready(Ok(()))
    };
    let every = vec![Pattern::parse("*").unwrap()];
    let route = Route::new("noop", every, Arc::new(handler));
    let ops_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let router = Router::new(vec![route]);
    let back = worker::WorkerInputs {
        loaded,
        router,
        hooks: Hooks::default(),
        reload: None,
        ops_listener,
        metrics: Metrics::new(),
    };
    let (before, started, stop) = (own_cpu(), Instant::now(), shutdown.clone());
    let running = tokio::spawn(async move { worker::run(back, stop, || ()).await.unwrap() });
    is_done.await.unwrap();
    let figure = Figure::of(events, started.elapsed(), own_cpu() - before, Vec::new());
    shutdown.drain.cancel();
    running.await.unwrap();
    figure
}

async fn load(to: SocketAddr, pid: u32, connections: usize, length: Duration) -> Figure {
    let (before, started) = (cpu(pid), Instant::now());
    let clients: Vec<_> = (0..connections).map(|_| tokio::spawn(client(to, started + length))).collect();
    let mut latencies = Vec::new();
    for client in clients {
        latencies.extend(client.await.unwrap());
    }
    Figure::of(latencies.len(), started.elapsed(), cpu(pid) - before, latencies)
}

/// One keep-alive connection that sends one webhook after another.
async fn client(to: SocketAddr, until: Instant) -> Vec<Duration> {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let template = webhook(0);
    let (mut latencies, mut answer) = (Vec::new(), vec![0; 4096]);
    while Instant::now() < until {
        let id = format!("load-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let request = template.clone().set("x-webhook-id", &id).raw();
        let started = Instant::now();
        stream.write_all(&request).await.unwrap();
        let mut length = 0;
        while !answer[..length].ends_with(b"\r\n\r\n") {
            let read = stream.read(&mut answer[length..]).await.unwrap();
            assert!(read > 0, "closed: {}", String::from_utf8_lossy(&answer[..length]));
            length += read;
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..length]));
        latencies.push(started.elapsed());
    }
    latencies
}
