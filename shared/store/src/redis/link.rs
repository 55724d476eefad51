//! The connection to Redis, with a breaker: while it is open nothing waits for Redis, and one task tries to reach it again.

use super::address::{Address, Connection};
use crate::backoff::Backoff;
use redis::{Cmd, FromRedisValue, Pipeline, RedisError, ScriptInvocation, ServerErrorKind};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use streamgate_core::ports::StoreError;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// Commands in a row that end in a timeout before the breaker opens.
const PATIENCE: u32 = 3;
/// For a new connection, which may ask Sentinels or a whole cluster first.
const DIAL: Duration = Duration::from_secs(2);

/// A Redis that may be away.
#[derive(Clone, Debug)]
pub struct Redis(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    prefix: String,
    timeout: Duration,
    state: watch::Sender<State>,
    timeouts: AtomicU32,
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
        let task = AbortOnDropHandle::new(tokio::spawn(supervise(address, state.clone())));
        let timeouts = AtomicU32::new(0);
        Redis(Arc::new(Shared { prefix: prefix.to_owned(), timeout, state, timeouts, _task: task }))
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
    pub async fn watch_up(&self, tell: impl Fn(bool) + Send) {
        let mut state = self.0.state.subscribe();
        loop {
            tell(matches!(*state.borrow_and_update(), State::Open { .. }));
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
            Ok(Ok(told)) => {
                self.0.timeouts.store(0, Ordering::Relaxed);
                Ok(told)
            }
            Ok(Err(error)) => {
                if ends_connection(&error) {
                    self.open_breaker(number, &error.to_string());
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
        let opened = self.0.state.send_if_modified(|state| match state {
            State::Open { number, .. } if *number == failed => {
                *state = State::Broken { why: why.into() };
                true
            }
            State::Open { .. } | State::Broken { .. } => false,
        });
        if opened {
            self.0.timeouts.store(0, Ordering::Relaxed);
            tracing::error!(why, "Redis does not answer, going on without");
        }
    }
}

/// Whether another connection may do better: this one is gone, or leads to a server that is no master, or not yet ready.
fn ends_connection(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, ClusterDown, MasterDown, ReadOnly};
    let kind = error.kind();
    let server = [ReadOnly, BusyLoading, MasterDown, ClusterDown].map(redis::ErrorKind::Server).contains(&kind);
    server || error.is_io_error() || error.is_unrecoverable_error()
}

async fn supervise(address: Address, state: watch::Sender<State>) {
    let mut backoff = Backoff::default();
    let (mut number, mut last) = (0, String::new());
    let mut changes = state.subscribe();
    loop {
        if changes.wait_for(|state| matches!(state, State::Broken { .. })).await.is_err() {
            return;
        }
        match ping(&address).await {
            Ok(connection) => {
                number += 1;
                tracing::info!(at = %address, "connected to Redis");
                state.send_replace(State::Open { connection, number });
                last.clear();
                // A server that takes connections and then fails must not be dialled in a tight loop.
                tokio::time::sleep(backoff.next()).await;
                if matches!(*state.borrow(), State::Open { .. }) {
                    backoff.reset();
                }
            }
            Err(why) => {
                if why != last {
                    tracing::error!(at = %address, why, "no connection to Redis, trying again");
                    last.clone_from(&why);
                }
                state.send_replace(State::Broken { why: why.into() });
                tokio::time::sleep(backoff.next()).await;
            }
        }
    }
}

/// A connection that has answered a question.
pub(super) async fn ping(address: &Address) -> Result<Connection, String> {
    let dial = async {
        let mut connection = address.dial(DIAL).await?;
        redis::cmd("PING").query_async::<()>(&mut connection).await?;
        Ok::<_, RedisError>(connection)
    };
    match tokio::time::timeout(DIAL, dial).await {
        // In one line: some of the library's errors end with a line break.
        Ok(connection) => {
            connection.map_err(|error| error.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
        }
        Err(_) => Err(format!("no answer within {DIAL:?}")),
    }
}

/// As Redis takes times.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
