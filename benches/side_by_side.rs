//! `streamgate up` compared with a bare hyper server that reads the same body and answers 200, and the store's commits alone.
//!
//! Run with `cargo bench --bench side_by_side`. Both servers are processes of their own, loaded in turn from this one, so
//! that their CPU time can be read from the kernel; what counts is the ratio within one run. Options, by environment:
//! BENCH_SECONDS (3), BENCH_ROUNDS (5), BENCH_CONNECTIONS (64), BENCH_BODY (2100 bytes), BENCH_GZIP (0; 1: bodies are sent compressed),
//! BENCH_OTHER (paths of other builds of `streamgate`, with colons between them, which are then loaded in turn with this one).

#![expect(clippy::unwrap_used, reason = "a measurement that cannot go on should say where")]
#![expect(clippy::print_stdout, reason = "it prints a table")]

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http_body_util::{BodyExt, Full};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streamgate_core::envelope::{Envelope, safe_type};
use streamgate_core::id::{KeyedBy, Kind, idempotency_key};
use streamgate_core::ports::Enqueue;
use streamgate_core::signature::SigningKey;
use streamgate_store::sqlite::{Embedded, Options};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

const SECRET: &str = "bench_secret";

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[tokio::main]
async fn main() {
    if std::env::args().any(|arg| arg == "--bare") {
        return bare().await;
    }
    let seconds = Duration::from_secs(setting("BENCH_SECONDS", 3));
    let connections = setting("BENCH_CONNECTIONS", 64);
    let body = body(usize::try_from(setting("BENCH_BODY", 2100)).unwrap());
    let sent = if setting("BENCH_GZIP", 0) == 1 { gzip(&body) } else { body.clone() };
    let others = std::env::var("BENCH_OTHER").unwrap_or_default();
    let mut servers =
        vec![Server::start("bare".to_owned(), Command::new(std::env::current_exe().unwrap()).arg("--bare")).await];
    let mut directories = Vec::new();
    let others = others.split(':').filter(|path| !path.is_empty()).map(|path| (path.to_owned(), path));
    for (name, binary) in [("up".to_owned(), env!("CARGO_BIN_EXE_streamgate"))].into_iter().chain(others) {
        let directory = tempfile::tempdir().unwrap();
        let mut up = Command::new(binary);
        up.env_clear().env("STREAM_API_KEY", "bench").env("STREAM_API_SECRET", SECRET);
        up.env("STREAMGATE__GATEWAY__LISTEN", "127.0.0.1:0").env("STREAMGATE__GATEWAY__OPS_LISTEN", "127.0.0.1:0");
        servers.push(Server::start(name, up.current_dir(directory.path())).await);
        directories.push(directory);
    }
    let (long, short) = (body.len(), sent.len());
    println!("{connections} connections, {long} bytes sent as {short}, {seconds:?} a round; CPU of the server process");
    println!("{:<8} {:>12} {:>14} {:>9} {:>9}", "server", "events/s", "CPU µs/event", "p50 ms", "p99 ms");
    for round in 0..=setting("BENCH_ROUNDS", 5) {
        for server in &mut servers {
            let figure = server.load(&body, &sent, connections, seconds).await;
            // The first round warms up.
            if round > 0 {
                println!("{:<8} {figure}", server.name);
                server.figures.push(figure);
            }
        }
    }
    let medians: Vec<_> = servers.iter().map(|server| (&server.name, Figure::median(&server.figures))).collect();
    for (name, median) in &medians {
        println!("{name:<8} {median}  (median)");
    }
    let (_, up) = medians[1];
    for (name, one) in medians.iter().filter(|(name, _)| *name != "up") {
        println!("up / {name}: events/s {:.2}, CPU {:.3}", up.rate / one.rate, up.cpu / one.cpu);
    }
    for waiting in [64, 256] {
        println!("store alone, {waiting} waiting: {:.0} events/s committed", store(waiting, &body, seconds).await);
    }
}

/// A server that reads a body, answers 200, and does nothing else.
async fn bare() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("  webhooks  http://{}/ send ", listener.local_addr().unwrap());
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let service = service_fn(|request: Request<Incoming>| async {
            let read = request.into_body().collect().await.map(|body| body.to_bytes().len());
            drop(read);
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
        });
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

struct Server {
    name: String,
    child: Child,
    address: SocketAddr,
    figures: Vec<Figure>,
}

impl Server {
    async fn start(name: String, command: &mut Command) -> Server {
        let mut child = command.kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        loop {
            let line = lines.next_line().await.unwrap().unwrap();
            if line.trim_start().starts_with("webhooks") {
                let address = line.split("://").nth(1).unwrap().split('/').next().unwrap().parse().unwrap();
                tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
                return Server { name, child, address, figures: Vec::new() };
            }
        }
    }

    /// CPU time of the process so far, user and system.
    fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id().unwrap())).unwrap();
        let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        // USER_HZ is 100 on every Linux that this runs on.
        Duration::from_millis(ticks * 10)
    }

    /// `sent` is the body as it goes over the wire.
    async fn load(&mut self, body: &Bytes, sent: &Bytes, connections: u64, length: Duration) -> Figure {
        let (cpu, started) = (self.cpu(), Instant::now());
        let clients: Vec<_> = (0..connections)
            .map(|_| tokio::spawn(client(self.address, body.clone(), sent.clone(), started + length)))
            .collect();
        let mut latencies = Vec::new();
        for client in clients {
            latencies.extend(client.await.unwrap());
        }
        let elapsed = started.elapsed();
        latencies.sort_unstable();
        let count = latencies.len() as f64;
        let at = |share: f64| latencies[((count - 1.0) * share) as usize].as_secs_f64() * 1000.0;
        let cpu = (self.cpu() - cpu).as_secs_f64() * 1e6 / count;
        Figure { rate: count / elapsed.as_secs_f64(), cpu, p50: at(0.5), p99: at(0.99) }
    }
}

#[derive(Clone, Copy)]
struct Figure {
    rate: f64,
    cpu: f64,
    p50: f64,
    p99: f64,
}

impl Figure {
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

/// One keep-alive connection that sends one webhook after another.
async fn client(to: SocketAddr, body: Bytes, sent: Bytes, until: Instant) -> Vec<Duration> {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let head = format!(
        "POST /webhooks/stream/push HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\nx-api-key: bench\r\n\
         x-signature: {}\r\nx-webhook-attempt: 1\r\ncontent-length: {}\r\nx-webhook-id: ",
        SigningKey::new(SECRET.as_bytes()).sign(&body).to_hex(),
        sent.len()
    );
    let mut latencies = Vec::new();
    let mut answer = vec![0; 4096];
    while Instant::now() < until {
        let mut request = format!("{head}{}\r\n\r\n", unique()).into_bytes();
        request.extend_from_slice(&sent);
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

fn unique() -> String {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).unwrap();
    hex::encode(bytes)
}

/// An event of this length, with text that compresses about as real text does.
fn body(length: usize) -> Bytes {
    let event = |text: &str| {
        serde_json::json!({"type": "message.new", "cid": "messaging:bench", "message": {"text": text}}).to_string()
    };
    let mut state = 1_u32;
    let letters = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        char::from(b"etaoin shrdlu cmfwyp"[(state >> 24) as usize % 20])
    });
    event(&letters.take(length - event("").len()).collect::<String>()).into()
}

fn gzip(body: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap().into()
}

/// Events per second that the store commits while this many callers wait.
async fn store(waiting: usize, body: &Bytes, length: Duration) -> f64 {
    let directory = tempfile::tempdir().unwrap();
    let options = Options {
        data_dir: directory.path().join("data"),
        max_bytes: 1 << 40,
        seen_window: Duration::from_secs(600),
        remember: Duration::from_secs(600),
        max_waiting: waiting,
        prefetch: 1,
        parked_share: 4,
        in_hand_bytes: 1 << 20,
        patience: Duration::from_secs(30),
    };
    let store = Arc::new(Embedded::open(&options).unwrap());
    let (started, signature) = (Instant::now(), SigningKey::new(SECRET.as_bytes()).sign(body).to_hex());
    let callers: Vec<_> = (0..waiting)
        .map(|_| {
            let (store, body, signature) = (Arc::clone(&store), body.clone(), signature.clone());
            tokio::spawn(async move {
                let mut count = 0_u64;
                while started.elapsed() < length {
                    store.enqueue(envelope(&body, &signature)).await.unwrap();
                    count += 1;
                }
                count
            })
        })
        .collect();
    let mut count = 0;
    for caller in callers {
        count += caller.await.unwrap();
    }
    count as f64 / started.elapsed().as_secs_f64()
}

fn envelope(body: &Bytes, signature: &str) -> Envelope {
    let id = unique();
    Envelope {
        app: "chat".into(),
        kind: Kind::Push,
        event_type: safe_type(Some("message.new")).into(),
        key: idempotency_key("chat", Kind::Push, None, KeyedBy::Id(&id), signature),
        id,
        webhook_attempt: 1,
        api_key: "bench".into(),
        signature: signature.into(),
        received_at_ms: 0,
        attempt: 1,
        attempts: Default::default(),
        cid: None,
        route: None,
        replay: None,
        traceparent: None,
        further: streamgate_core::further::FurtherHeaders::default(),
        body: body.clone(),
    }
}
