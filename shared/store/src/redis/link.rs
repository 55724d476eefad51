//! The connection to Redis, with a breaker: while it is open, no call waits for Redis, and one task tries to use it
//! again.
//!
//! Redis is up while it takes writes. A server that replies and refuses every write is not.

use super::address::{Address, Connection};
use crate::backoff::Backoff;
use arc_swap::ArcSwap;
use redis::{Cmd, FromRedisValue, Pipeline, RedisError, Script, ScriptInvocation, ServerErrorKind};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use streamgate_core::ports::StoreError;
use tokio::sync::{Notify, watch};
use tokio_util::task::AbortOnDropHandle;

/// Commands in a row that end in a timeout before the breaker opens.
const MAX_TIMEOUTS: u32 = 3;
/// Time limit of a new connection, which may ask Sentinels or a whole cluster first.
const DIAL: Duration = Duration::from_secs(2);
/// How often a write is tried while nobody else may write: more often than any server closes idle connections, which
/// with `timeout 1` happens after little more than a second.
const PROBE: Duration = Duration::from_millis(500);
/// Error codes of servers that take no writes, or none of this user's. Scripts wrap these codes into other errors.
const REFUSALS: [&str; 9] =
    ["OOM", "MISCONF", "NOPERM", "NOAUTH", "NOREPLICAS", "READONLY", "MOVED", "CLUSTERDOWN", "MASTERDOWN"];

/// A connection to a Redis that may be unreachable.
#[derive(Clone, Debug)]
pub struct Redis(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    prefix: String,
    timeout: Duration,
    address: Arc<ArcSwap<Address>>,
    state: watch::Sender<State>,
    timeouts: AtomicU32,
    /// Notified when a write was refused, to find out whether every write is.
    suspicion: Arc<Notify>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Clone, Debug)]
enum State {
    Open { connection: Connection, number: u64 },
    Broken { why: Arc<str> },
}

impl Redis {
    /// Starts to connect. Call within a tokio runtime.
    pub fn start(address: Address, prefix: &str, timeout: Duration) -> Redis {
        let (state, _) = watch::channel(State::Broken { why: "not connected yet".into() });
        let probe = Probe::new(prefix);
        let suspicion = Arc::new(Notify::new());
        let address = Arc::new(ArcSwap::from_pointee(address));
        let supervised = supervise(Arc::clone(&address), probe, state.clone(), Arc::clone(&suspicion));
        let task = AbortOnDropHandle::new(tokio::spawn(supervised));
        let timeouts = AtomicU32::new(0);
        let prefix = prefix.to_owned();
        Redis(Arc::new(Shared { prefix, timeout, address, state, timeouts, suspicion, _task: task }))
    }

    /// Replaces the address from the next dial on. Returns whether it differs.
    pub fn replace(&self, new: Address) -> bool {
        let differs = new.differs(&self.0.address.load());
        if differs {
            self.0.address.store(Arc::new(new));
        }
        differs
    }

    /// Name of a key that exists once.
    pub(super) fn name(&self, kind: &str) -> String {
        format!("{}:{kind}", self.0.prefix)
    }

    pub(super) fn key(&self, kind: &str, fingerprint: [u8; 16]) -> String {
        let number = u128::from_be_bytes(fingerprint);
        format!("{}:{kind}:{number:032x}", self.0.prefix)
    }

    pub(super) async fn command<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, StoreError> {
        self.run(|mut connection| async move { command.query_async(&mut connection).await }).await
    }

    pub(super) async fn pipeline<T: FromRedisValue>(&self, commands: &Pipeline) -> Result<T, StoreError> {
        self.run(|mut connection| async move { commands.query_async(&mut connection).await }).await
    }

    pub(super) async fn script<T: FromRedisValue + Send + Sync>(
        &self,
        script: &ScriptInvocation<'_>,
    ) -> Result<T, StoreError> {
        self.run(|mut connection| async move { script.invoke_async(&mut connection).await }).await
    }

    /// Calls `notify` with whether Redis can be used: now, and after each change.
    pub async fn watch_up(&self, notify: impl Fn(bool) + Send) {
        let mut state = self.0.state.subscribe();
        loop {
            notify(matches!(*state.borrow_and_update(), State::Open { .. }));
            if state.changed().await.is_err() {
                return;
            }
        }
    }

    async fn run<T, F: Future<Output = Result<T, RedisError>> + Send>(
        &self,
        ask: impl FnOnce(Connection) -> F + Send,
    ) -> Result<T, StoreError> {
        let current = self.0.state.borrow().clone();
        let (connection, number) = match current {
            State::Open { connection, number } => (connection, number),
            State::Broken { why } => return Err(StoreError::Unavailable(format!("no connection to Redis: {why}"))),
        };
        // A command that times out here may still have been run by Redis.
        match tokio::time::timeout(self.0.timeout, ask(connection)).await {
            Ok(Ok(reply)) => {
                self.0.timeouts.store(0, Ordering::Relaxed);
                Ok(reply)
            }
            Ok(Err(error)) => {
                if ends_connection(&error) {
                    self.open_breaker(number, &one_line(&error));
                } else if is_refusal(&error) {
                    // This refusal alone may concern one node or one command: the probe decides.
                    self.0.suspicion.notify_one();
                }
                Err(StoreError::Unavailable(error.to_string()))
            }
            Err(_) => {
                let why = format!("no answer within {:?}", self.0.timeout);
                // Timeouts of an earlier connection say nothing about the one that is open now.
                let is_open = matches!(*self.0.state.borrow(), State::Open { number: open, .. } if open == number);
                if is_open && self.0.timeouts.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_TIMEOUTS {
                    self.open_breaker(number, &why);
                }
                Err(StoreError::Unavailable(format!("Redis: {why}")))
            }
        }
    }

    /// `failed`: the connection that failed. The failure of an earlier one says nothing about this one.
    fn open_breaker(&self, failed: u64, why: &str) {
        if open_breaker(&self.0.state, failed, why) {
            self.0.timeouts.store(0, Ordering::Relaxed);
        }
    }
}

fn open_breaker(state: &watch::Sender<State>, failed: u64, why: &str) -> bool {
    let opened = state.send_if_modified(|state| match state {
        State::Open { number, .. } if *number == failed => {
            *state = State::Broken { why: why.into() };
            true
        }
        State::Open { .. } | State::Broken { .. } => false,
    });
    if opened {
        tracing::error!(why, "Redis cannot be used, going on without");
    }
    opened
}

/// Whether another connection may do better: this one is gone, or leads to a server that is not a master or not ready
/// yet.
fn ends_connection(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, ClusterDown, MasterDown, ReadOnly};
    let kind = error.kind();
    let server = [ReadOnly, BusyLoading, MasterDown, ClusterDown].map(redis::ErrorKind::Server).contains(&kind);
    server || error.is_io_error() || error.is_unrecoverable_error()
}

/// Whether the server replies but does not do what is needed.
fn is_refusal(error: &RedisError) -> bool {
    let text = error.to_string();
    error.code().is_some_and(|code| REFUSALS.contains(&code))
        || REFUSALS.iter().any(|code| text.contains(&format!("-{code} ")) || text.contains(&format!(": {code} ")))
}

/// The error as the server words it, if it comes from the server: the same for each command and script. Some of the
/// library's texts end with a line break.
fn one_line(error: &RedisError) -> String {
    let text = match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {}", detail.split(" script: ").next().unwrap_or_default()),
        _ => error.to_string(),
    };
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Writes of a probe, each with a key of its own: a single node of a cluster refuses those of other nodes' slots,
/// unless it holds all slots.
const WRITES: usize = 8;

/// Tries what is needed of a server: that it takes writes and runs scripts, called as ours are. It leaves nothing
/// behind.
#[derive(Clone, Debug)]
pub(super) struct Probe {
    writes: Vec<Cmd>,
    script: Script,
    key: String,
}

impl Probe {
    pub(super) fn new(prefix: &str) -> Probe {
        let key = |number: usize| format!("{prefix}:probe:{number}");
        let write = |number| redis::cmd("SET").arg(key(number)).arg(1).arg("PX").arg(1000).to_owned();
        Probe { writes: (0..WRITES).map(write).collect(), script: Script::new("return 1"), key: key(0) }
    }

    /// Runs the probe. The error is the server's own, in one line.
    pub(super) async fn run(&self, connection: &mut Connection) -> Result<(), String> {
        let run = async {
            for write in &self.writes {
                write.query_async::<()>(connection).await?;
            }
            self.script.key(&self.key).invoke_async::<i64>(connection).await
        };
        match tokio::time::timeout(DIAL, run).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if error.code() == Some("MOVED") => Err(format!(
                "{}: one node of a cluster; name it as one in redis.url, redis+cluster://host:port,…",
                one_line(&error)
            )),
            Ok(Err(error)) => Err(one_line(&error)),
            Err(_) => Err(format!("no answer within {DIAL:?}")),
        }
    }
}

async fn supervise(address: Arc<ArcSwap<Address>>, probe: Probe, state: watch::Sender<State>, suspicion: Arc<Notify>) {
    let (mut backoff, mut number) = (Backoff::default(), 0);
    loop {
        let address = address.load_full();
        match reach(&address, &probe).await {
            Ok(connection) => {
                number += 1;
                tracing::info!(at = %address, "connected to Redis");
                state.send_replace(State::Open { connection: connection.clone(), number });
                // A server that takes connections and then fails must not be dialled in a tight loop.
                tokio::time::sleep(backoff.next()).await;
                if matches!(*state.borrow(), State::Open { .. }) {
                    backoff.reset();
                }
                keep_probing(connection, number, &probe, &state, &suspicion).await;
            }
            Err(why) => {
                // One line for each reason, however many callers ran into it.
                let is_news = !matches!(&*state.borrow(), State::Broken { why: known } if **known == *why);
                if is_news {
                    tracing::error!(at = %address, why, "no connection to Redis, trying again");
                }
                state.send_replace(State::Broken { why: why.into() });
                tokio::time::sleep(backoff.next()).await;
            }
        }
    }
}

/// Probes until the breaker is open. While nobody writes, only a probe can notice that writes fail.
async fn keep_probing(
    mut connection: Connection,
    number: u64,
    probe: &Probe,
    state: &watch::Sender<State>,
    suspicion: &Notify,
) {
    let mut changes = state.subscribe();
    loop {
        tokio::select! {
            broken = changes.wait_for(|state| matches!(state, State::Broken { .. })) => return drop(broken),
            () = tokio::time::sleep(PROBE) => {}
            () = suspicion.notified() => {}
        }
        match probe.run(&mut connection).await {
            // Refused commands keep asking for the probe.
            Ok(()) => tokio::time::sleep(PROBE / 5).await,
            Err(why) => drop(open_breaker(state, number, &why)),
        }
    }
}

/// Opens a connection to a server that does what is needed.
async fn reach(address: &Address, probe: &Probe) -> Result<Connection, String> {
    let mut connection = ping(address).await?;
    probe.run(&mut connection).await?;
    Ok(connection)
}

/// Opens a connection, and waits for the reply to a PING.
pub(super) async fn ping(address: &Address) -> Result<Connection, String> {
    let dial = async {
        let mut connection = address.dial(DIAL).await?;
        redis::cmd("PING").query_async::<()>(&mut connection).await?;
        Ok::<_, RedisError>(connection)
    };
    match tokio::time::timeout(DIAL, dial).await {
        Ok(connection) => connection.map_err(|error| one_line(&error)),
        Err(_) => Err(format!("no answer within {DIAL:?}")),
    }
}

/// Milliseconds, as Redis takes times.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
