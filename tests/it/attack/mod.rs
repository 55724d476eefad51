//! Attacks by a stranger who knows the address and the API key, which every chat client carries, but no secret. Signed webhooks
//! are sent during each attack; the tests assert how many of them are answered in time.
//!
//! `STREAMGATE_TEST_BINARY` names another build to attack in the same way: then the figures are printed and nothing is asserted.
//! `STREAMGATE_TEST_ATTACK_SECONDS`: how long each attack lasts; 4 by default.

mod bodies;
mod frames;
mod held;
mod hooks;
mod peers;
mod places;
mod replays;

use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site, other_binary, raise_open_files};
use crate::harness::wire::{Transport, Webhook};
use crate::statuses::secure;
use rustls_pki_types::CertificateDer;
use std::time::{Duration, Instant};
use tokio_util::task::AbortOnDropHandle;

/// The defaults, scaled down: a fiftieth of the connections, and a sixteenth of the memory, the body size and the requests.
const MAX_CONNECTIONS: usize = 200;
const LIMITS: &str = "max_connections = 200\nmax_in_flight = 256\nmemory_budget = \"16MiB\"\nmax_body = \"256KiB\"";
const MEMORY_BUDGET: u64 = 16 << 20;
const MAX_BODY: usize = 256 << 10;
/// Memory that the process may hold in addition to its budget, and for each connection: the bounds of ARCHITECTURE.md.
const CONSTANT: u64 = 128 << 20;
const CONNECTION: u64 = 32 << 10;

/// Time between two signed webhooks, each on a connection of its own.
const BEAT: Duration = Duration::from_millis(20);
/// How long Stream waits for a push, and by default for a hook.
const PUSH_PATIENCE: Duration = Duration::from_secs(6);
const HOOK_PATIENCE: Duration = Duration::from_millis(1500);

fn attack_time() -> Duration {
    let seconds = std::env::var("STREAMGATE_TEST_ATTACK_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(4))
}

/// A server under attack.
struct Scene {
    site: Site,
    server: Server,
    root: CertificateDer<'static>,
    tls: Transport,
}

/// How many signed webhooks were answered well, and how the server bore the attack.
#[derive(Debug)]
struct Row {
    sent: usize,
    good: usize,
    peak_connections: f64,
    peak_resident: u64,
    was_ready: bool,
}

impl Scene {
    async fn start() -> Scene {
        Scene::with(LIMITS).await
    }

    async fn with(gateway: &str) -> Scene {
        raise_open_files(4_000);
        let site = Site::new();
        // Rules answer each hook without a service that could be slow.
        let rest = "[hooks.before_message_send]\nrules = [{ pattern = 'casino', action = 'reject' }]\n".into();
        let (server, [tls, _]) = secure(&site, Setup { gateway: gateway.into(), rest, ..Setup::default() }).await;
        let Transport::Tls { root, .. } = &tls else { panic!() };
        let root = root.clone();
        eventually("the server is ready", || async { server.ops("/readyz").await.0 == 200 }).await;
        Scene { site, server, root, tls }
    }

    /// Sends signed webhooks, every second one a hook, while the attackers run.
    async fn under(&self, attackers: Vec<AbortOnDropHandle<()>>) -> Row {
        let began = Instant::now();
        let mut row = Row { sent: 0, good: 0, peak_connections: 0.0, peak_resident: 0, was_ready: true };
        let mut sent = tokio::task::JoinSet::new();
        let mut beat = tokio::time::interval(BEAT);
        while began.elapsed() < attack_time() {
            beat.tick().await;
            let (tls, to, is_hook) = (self.tls.clone(), self.server.public, row.sent % 2 == 1);
            sent.spawn(async move { is_good(&tls, to, is_hook).await });
            row.sent += 1;
            if row.sent.is_multiple_of(25) {
                let open = self.server.metric("streamgate_gateway_connections").await;
                row.peak_connections = row.peak_connections.max(sockets(&self.server)).max(open);
                row.was_ready &= self.server.ops("/readyz").await.0 == 200;
            }
        }
        while let Some(good) = sent.join_next().await {
            row.good += usize::from(good.unwrap());
        }
        row.peak_resident = self.server.peak_resident_bytes();
        drop(attackers);
        row
    }

    #[expect(clippy::print_stdout, reason = "the figures are a result")]
    /// Prints the figures; asserts them for the build under test.
    async fn hold(self, attack: &str, row: Row) {
        let share = 100.0 * row.good as f64 / row.sent as f64;
        let allowed = MEMORY_BUDGET + CONSTANT + MAX_CONNECTIONS as u64 * CONNECTION;
        println!(
            "| {attack} | {share:.0} % of {} | {} of {} MiB | {} of {MAX_CONNECTIONS} |",
            row.sent,
            row.peak_resident >> 20,
            allowed >> 20,
            row.peak_connections
        );
        if other_binary().is_some() {
            return;
        }
        let (_, metrics) = self.server.ops("/metrics").await;
        let outcomes: Vec<_> = metrics.lines().filter(|line| line.contains("gateway_requests_total{")).collect();
        println!(
            "{}",
            outcomes.iter().filter(|line| !line.ends_with(" 0")).map(|line| format!("{line}\n")).collect::<String>()
        );
        assert!(row.good * 10 >= row.sent * 9, "{attack}: {row:?}");
        assert!(row.peak_resident <= allowed, "{attack}: {row:?}");
        // One more connection waits for its place, and the kernel's table is read while connections come and go.
        assert!(row.peak_connections <= MAX_CONNECTIONS as f64 * 1.05, "{attack}: {row:?}");
        assert!(row.was_ready, "{attack}: {row:?}");
        assert!(self.server.terminate().await.success(), "{attack}: {}", self.site.log());
    }
}

/// Sockets of the public port that the process has accepted and not closed yet, from the kernel's table.
fn sockets(server: &Server) -> f64 {
    let port = format!(":{:04X}", server.public.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let open = table.lines().filter(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        // 01: established; 08: closed by the peer only. The inode is 0 where no process holds the socket: not accepted, or closed.
        columns.len() > 9 && columns[1].ends_with(&port) && matches!(columns[3], "01" | "08") && columns[9] != "0"
    });
    open.count() as f64
}

async fn is_good(tls: &Transport, to: std::net::SocketAddr, is_hook: bool) -> bool {
    let (webhook, patience, outcome) = if is_hook {
        (Webhook::moderation(r#"{"text":"hello"}"#), HOOK_PATIENCE, "answered")
    } else {
        (Webhook::fresh(), PUSH_PATIENCE, "enqueued")
    };
    let answer = tokio::time::timeout(patience, tls.send(to, &webhook)).await;
    answer.is_ok_and(|sent| sent.is_ok_and(|answer| answer.status == 200 && answer.outcome() == outcome))
}

/// Starts `count` attackers, each with its number.
fn attackers<F: Future<Output = ()> + Send + 'static>(
    count: usize,
    mut attack: impl FnMut(usize) -> F,
) -> Vec<AbortOnDropHandle<()>> {
    (0..count).map(|number| AbortOnDropHandle::new(tokio::spawn(attack(number)))).collect()
}
