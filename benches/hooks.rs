//! What a synchronous hook costs: gateway and worker, with a handler that echoes the hook, compared with a bare request and reply
//! over the same RabbitMQ; and the same with a backlog of events.
//!
//! Run with `cargo bench --bench hooks`. What counts is the ratio within one run. Options, by environment: BENCH_SECONDS (1),
//! BENCH_ROUNDS (40: a round depends on which thread runs on which core), BENCH_BACKLOG (100000).

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a measurement that cannot go on should say where")]
#![expect(clippy::print_stdout, reason = "it prints a table")]
#![expect(unreachable_pub, dead_code, reason = "the harness has more than is needed here")]

mod bare;
#[path = "../tests/harness/mod.rs"]
mod harness;

use futures_util::StreamExt;
use futures_util::future::join_all;
use harness::process::{Server, Setup, Site};
use harness::receiver::{Receiver, reply};
use harness::servers::Backends;
use harness::wire::Webhook;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use streamgate::{
    BoxFuture, HandlerError, Hook, HookHandler, Hooks, Metrics, Shutdown, backends, config, wiring, worker,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

const TEXT: usize = 2000;
const RATE: u32 = 200;
/// Senders, each of which has one call under way at a time.
const SENDERS: u32 = 8;
/// How long the service takes for an event, so that the backlog lasts.
const HANDLING: Duration = Duration::from_millis(100);
const BARE: &str = "bare.calls";

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[tokio::main]
async fn main() {
    let args: Vec<_> = std::env::args().collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "--respond", url] => return respond(url).await,
        [_, "--work", config] => return work(config).await,
        _ => {}
    }
    let length = Duration::from_secs(setting("BENCH_SECONDS", 1));
    let (backends, site) = (Backends::start().await, Site::new());
    let service = Receiver::start(|_| {
        std::thread::sleep(HANDLING);
        reply(200, &[])
    })
    .await;
    let rest = format!("{}\n{}", service.route(), backends.impatient_tables(&site.name()));
    site.configure(&Setup { rest, ..Setup::default() });
    let gateway = site.start_as("gateway").await.ready().await;
    let url = backends.broker.url();
    let child = |args: [&str; 2]| {
        let mut command = tokio::process::Command::new(std::env::current_exe().unwrap());
        command.args(args).kill_on_drop(true).spawn().unwrap()
    };
    let _children = [child(["--respond", &url]), child(["--work", site.config().to_str().unwrap()])];
    let bare = Arc::new(Bare::connect(&url).await);
    harness::eventually("the gateway sees a worker", || async {
        gateway.metric("streamgate_gateway_hook_workers_up").await == 1.0
    })
    .await;
    println!("{RATE} calls/s, messages of {TEXT} bytes, {RATE} pushes/s alongside, {length:?} a round");
    println!("{:<44} {:>8} {:>8} {:>8}", "", "p50 ms", "p99 ms", "max ms");
    let (mut alone, mut through) = (Vec::new(), Vec::new());
    let rounds = setting("BENCH_ROUNDS", 40);
    for round in 0..=rounds {
        let (_, one) = tokio::join!(pushes(gateway.public, length), asked(&bare, length));
        let (_, two) = tokio::join!(pushes(gateway.public, length), hooked(gateway.public, length));
        // The first round warms up.
        if round > 0 {
            alone.extend(one);
            through.extend(two);
        }
    }
    let (one, two) = (Figure::of(alone), Figure::of(through));
    println!("{:<44} {one}\n{:<44} {two}", "bare request and reply", "gateway and worker");
    println!("gateway and worker / bare: p50 {:.2}, p99 {:.2}", two.p50 / one.p50, two.p99 / one.p99);
    backlog(&backends, &site, &gateway, rounds, length).await;
}

/// Hooks on an idle system, and then with a backlog and pushes.
async fn backlog(backends: &Backends, site: &Site, gateway: &Server, rounds: u64, length: Duration) {
    let events = format!("{}.events", site.name());
    harness::eventually("the queue is empty", || async { backends.broker.ready(&events).await == 0 }).await;
    let (mut idle, mut busy) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        idle.extend(hooked(gateway.public, length).await);
    }
    let backlog = setting("BENCH_BACKLOG", 100_000);
    let body = format!("{{\"type\":\"message.new\",\"message\":{}}}", message());
    bare::publish(&backends.broker, &site.name(), body.as_bytes(), backlog, 1024).await;
    let before = backends.broker.ready(&events).await;
    for _ in 0..rounds {
        let (_, latencies) = tokio::join!(pushes(gateway.public, length), hooked(gateway.public, length));
        busy.extend(latencies);
    }
    let after = backends.broker.ready(&events).await;
    let (idle, busy) = (Figure::of(idle), Figure::of(busy));
    let waiting = format!("{before} to {after} events waiting, and pushes");
    println!("{:<44} {idle}\n{waiting:<44} {busy}", "idle");
    println!("with the backlog / idle: p50 {:.2}, p99 {:.2}", busy.p50 / idle.p50, busy.p99 / idle.p99);
}

/// Milliseconds.
#[derive(Clone, Copy, Debug)]
struct Figure {
    p50: f64,
    p99: f64,
    max: f64,
}

impl Figure {
    fn of(mut latencies: Vec<Duration>) -> Figure {
        latencies.sort_unstable();
        let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0;
        Figure { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:>8.2} {:>8.2} {:>8.2}", self.p50, self.p99, self.max)
    }
}

/// Time between two of a sender's calls.
const BEAT: Duration = Duration::from_millis(1000 * SENDERS as u64 / RATE as u64);

/// When each of a sender's calls is due.
fn schedule(sender: u32, length: Duration) -> impl Iterator<Item = Instant> {
    let started = Instant::now();
    let first = started + BEAT * sender / SENDERS;
    (0..).map(move |number| first + BEAT * number).take_while(move |due| *due < started + length)
}

/// Pushes keep the rate of the calls and not their beat: on the beat each would meet a call at the same point of its path, and a
/// bare call, which skips the beginning of that path, at another.
fn within_a_beat() -> Duration {
    BEAT.mul_f64(getrandom::u32().unwrap() as f64 / u32::MAX as f64)
}

/// Runs all senders concurrently, each in a task of its own.
async fn by_all<F: Future<Output: Send> + Send + 'static>(send: impl Fn(u32) -> F) -> Vec<F::Output> {
    let sent = join_all((0..SENDERS).map(|sender| tokio::spawn(send(sender)))).await;
    sent.into_iter().map(Result::unwrap).collect()
}

/// Hooks through the gateway; their latencies, from the request's first byte to the answer's last.
async fn hooked(to: SocketAddr, length: Duration) -> Vec<Duration> {
    let send = |sender| async move {
        let mut stream = connected(to).await;
        let mut latencies = Vec::new();
        for due in schedule(sender, length) {
            tokio::time::sleep_until(due.into()).await;
            let request = Webhook::moderation(&message()).raw();
            let started = Instant::now();
            let answer = exchange(&mut stream, &request).await;
            latencies.push(started.elapsed());
            assert!(answer.contains("x-streamgate-outcome: answered"), "{answer}");
        }
        latencies
    };
    by_all(send).await.into_iter().flatten().collect()
}

async fn pushes(to: SocketAddr, length: Duration) {
    let send = |sender| async move {
        let mut stream = connected(to).await;
        for beat in schedule(sender, length) {
            tokio::time::sleep_until((beat + within_a_beat()).into()).await;
            let body = format!("{{\"type\":\"message.new\",\"message\":{}}}", message());
            let request = Webhook::push(&format!("push-{}", harness::unique()), body).raw();
            assert!(exchange(&mut stream, &request).await.starts_with("HTTP/1.1 200"));
        }
    };
    by_all(send).await;
}

fn message() -> String {
    format!(r#"{{"id":"{}","text":"{}","type":"regular"}}"#, harness::unique(), "x".repeat(TEXT))
}

async fn connected(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// One request on a kept connection, and its whole answer.
async fn exchange(stream: &mut TcpStream, request: &[u8]) -> String {
    stream.write_all(request).await.unwrap();
    let (mut answer, mut piece) = (Vec::new(), vec![0; 16 << 10]);
    loop {
        let read = stream.read(&mut piece).await.unwrap();
        assert!(read > 0, "closed: {}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&piece[..read]);
        let Some(head) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { continue };
        let text = String::from_utf8_lossy(&answer[..head]).into_owned();
        let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        if answer.len() >= head + 4 + length.unwrap() {
            return text;
        }
    }
}

/// Request and reply with nothing around it: one connection, one channel, direct reply-to.
struct Bare {
    channel: Channel,
    waiting: Arc<Mutex<HashMap<u64, oneshot::Sender<Vec<u8>>>>>,
    _connection: Connection,
}

impl Bare {
    async fn connect(url: &str) -> Bare {
        let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let reply_to = "amq.rabbitmq.reply-to";
        let mut replies =
            channel.basic_consume(reply_to.into(), "".into(), options, FieldTable::default()).await.unwrap();
        let waiting: Arc<Mutex<HashMap<u64, oneshot::Sender<Vec<u8>>>>> = Arc::default();
        let callers = Arc::clone(&waiting);
        tokio::spawn(async move {
            while let Some(Ok(reply)) = replies.next().await {
                let number = reply.properties.correlation_id().as_ref().unwrap().as_str().parse().unwrap();
                if let Some(waits) = callers.lock().unwrap().remove(&number) {
                    drop(waits.send(reply.data));
                }
            }
        });
        Bare { channel, waiting, _connection: connection }
    }

    async fn call(&self, body: &[u8]) -> Vec<u8> {
        let number = harness::unique();
        let (sender, answer) = oneshot::channel();
        self.waiting.lock().unwrap().insert(number, sender);
        let properties = BasicProperties::default()
            .with_delivery_mode(1)
            .with_expiration("5000".into())
            .with_correlation_id(number.to_string().into())
            .with_reply_to("amq.rabbitmq.reply-to".into());
        let options = BasicPublishOptions::default();
        self.channel.basic_publish("".into(), BARE.into(), options, body, properties).await.unwrap();
        answer.await.unwrap()
    }
}

async fn asked(bare: &Arc<Bare>, length: Duration) -> Vec<Duration> {
    let send = |sender| {
        let bare = Arc::clone(bare);
        async move {
            let mut latencies = Vec::new();
            for due in schedule(sender, length) {
                tokio::time::sleep_until(due.into()).await;
                let body = Webhook::moderation(&message()).body;
                let started = Instant::now();
                let answer = bare.call(&body).await;
                latencies.push(started.elapsed());
                assert_eq!(answer.len(), body.len());
            }
            latencies
        }
    };
    by_all(send).await.into_iter().flatten().collect()
}

/// The other side of it, in a process of its own: it echoes each call.
async fn respond(url: &str) {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.basic_qos(64, BasicQosOptions::default()).await.unwrap();
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(BARE.into(), options, FieldTable::default()).await.unwrap();
    let options = BasicConsumeOptions::default();
    let mut calls = channel.basic_consume(BARE.into(), "".into(), options, FieldTable::default()).await.unwrap();
    while let Some(Ok(call)) = calls.next().await {
        let reply_to = call.properties.reply_to().clone().unwrap();
        let properties =
            BasicProperties::default().with_correlation_id(call.properties.correlation_id().clone().unwrap());
        let options = BasicPublishOptions::default();
        channel.basic_publish("".into(), reply_to, options, &call.data, properties).await.unwrap();
        call.ack(BasicAckOptions::default()).await.unwrap();
    }
}

/// `streamgate worker` with a handler of hooks that costs nothing, so that only the round trip is measured.
async fn work(config: &str) {
    let source = config::Source { file: Some(config.into()), environment: config::Environment::default() };
    let loaded = backends::rabbitmq::for_services(config::load(&source, backends::problems).unwrap()).unwrap();
    let router = wiring::router(&loaded.config, Vec::new()).unwrap();
    let hooks = Hooks { before_message_send: Some(Arc::new(Echo)), ..Hooks::default() };
    let ops_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let back = worker::WorkerInputs { loaded, router, hooks, reload: None, ops_listener, metrics: Metrics::new() };
    worker::run(back, Shutdown::new(), || ()).await.unwrap();
}

struct Echo;

impl HookHandler for Echo {
    fn answer(&self, hook: Hook) -> BoxFuture<Result<bytes::Bytes, HandlerError>> {
        Box::pin(std::future::ready(Ok(hook.envelope().body.clone())))
    }
}
