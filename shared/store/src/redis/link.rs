//! The connection to Redis, with a breaker: while it is open nothing waits for Redis, and one task tries to use it again.
//!
//! Redis is up while it does what is needed: it takes a write. One that answers and refuses every write is not.

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
const PATIENCE: u32 = 3;
/// For a new connection, which may ask Sentinels or a whole cluster first.
const DIAL: Duration = Duration::from_secs(2);
/// How often a write is tried while nobody else may do one: more often than any server closes idle connections, which with `timeout 1` is
/// after little more than a second.
const PROBE: Duration = Duration::from_millis(500);
/// How servers say that they take no writes, or none of this user's. Scripts wrap these words into others.
const REFUSALS: [&str; 9] =
    ["OOM", "MISCONF", "NOPERM", "NOAUTH", "NOREPLICAS", "READONLY", "MOVED", "CLUSTERDOWN", "MASTERDOWN"];

/// A Redis that may be away.
#[derive(Clone, Debug)]
pub struct Redis(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    prefix: String,
    timeout: Duration,
    address: Arc<ArcSwap<Address>>,
    state: watch::Sender<State>,
    timeouts: AtomicU32,
    /// A write was refused: is it every write?
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

    /// From the next dial on, this is where Redis is. Whether it differs.
    pub fn replace(&self, new: Address) -> bool {
        let differs = new.differs(&self.0.address.load());
        if differs {
            self.0.address.store(Arc::new(new));
        }
        differs
    }

    /// Of a key that there is one of.
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

    /// Calls for each change of whether Redis answers, from now on.
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
        // One that is given up here may still have been run there.
        match tokio::time::timeout(self.0.timeout, ask(connection)).await {
            Ok(Ok(reply)) => {
                self.0.timeouts.store(0, Ordering::Relaxed);
                Ok(reply)
            }
            Ok(Err(error)) => {
                if ends_connection(&error) {
                    self.open_breaker(number, &one_line(&error));
                } else if is_refusal(&error) {
                    // Not for this one alone, which may be one node's, or one command's: the probe decides.
                    self.0.suspicion.notify_one();
                }
                Err(StoreError::Unavailable(error.to_string()))
            }
            Err(_) => {
                let why = format!("no answer within {:?}", self.0.timeout);
                // Those of an earlier connection say nothing of the one that is open now.
                let is_open = matches!(*self.0.state.borrow(), State::Open { number: open, .. } if open == number);
                if is_open && self.0.timeouts.fetch_add(1, Ordering::Relaxed) + 1 >= PATIENCE {
                    self.open_breaker(number, &why);
                }
                Err(StoreError::Unavailable(format!("Redis: {why}")))
            }
        }
    }

    /// What failed on an earlier connection says nothing of this one.
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

/// Whether another connection may do better: this one is gone, or leads to a server that is no master, or not yet ready.
fn ends_connection(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, ClusterDown, MasterDown, ReadOnly};
    let kind = error.kind();
    let server = [ReadOnly, BusyLoading, MasterDown, ClusterDown].map(redis::ErrorKind::Server).contains(&kind);
    server || error.is_io_error() || error.is_unrecoverable_error()
}

/// Whether the server answers, and does not do what is needed.
fn is_refusal(error: &RedisError) -> bool {
    let text = error.to_string();
    error.code().is_some_and(|code| REFUSALS.contains(&code))
        || REFUSALS.iter().any(|word| text.contains(&format!("-{word} ")) || text.contains(&format!(": {word} ")))
}

/// In the server's own words, where it is its own: the same for each command and script. Some of the library's end with a line break.
fn one_line(error: &RedisError) -> String {
    let text = match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {}", detail.split(" script: ").next().unwrap_or_default()),
        _ => error.to_string(),
    };
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Writes of a probe, each with a key of its own: of a cluster's node some of them are not its slots', unless it holds them all.
const WRITES: usize = 8;

/// What is needed of a server: it takes writes and runs scripts, called as ours are. Nothing stays of it.
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

    /// Why the server does not do what is needed, in its own words.
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
                // One line for each reason, however many callers found it.
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

/// Until the breaker is open. While nobody writes nothing else would find that nobody could.
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
            // Commands that are refused go on asking for the probe.
            Ok(()) => tokio::time::sleep(PROBE / 5).await,
            Err(why) => drop(open_breaker(state, number, &why)),
        }
    }
}

/// A connection to a server that does what is needed.
async fn reach(address: &Address, probe: &Probe) -> Result<Connection, String> {
    let mut connection = ping(address).await?;
    probe.run(&mut connection).await?;
    Ok(connection)
}

/// A connection that has answered a question.
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

/// As Redis takes times.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
