//! One supervised connection: dialled, its topology ensured, watched, and dialled again when it ends. The library's own
//! recovery stays off: it gives up after a while and does not cover channel errors.

use super::endpoint::{Endpoint, REPLY_TIMEOUT};
use super::survey;
use super::topology::Topology;
use crate::backoff::Backoff;
use futures_util::{FutureExt, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Connection, Event};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::ports::StoreError;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Interval between checks of the topology: somebody may delete a part of it.
const VERIFY: Duration = Duration::from_secs(60);
/// A session that lasted this long counts as good.
const SETTLED: Duration = Duration::from_secs(5);
/// Time limit for closing a connection.
const CLOSE: Duration = Duration::from_secs(2);

/// The state of the connection.
#[derive(Clone, Debug)]
pub(super) enum State {
    Down(Arc<str>),
    Up(Session),
    /// A broker alarm: publishes wait until it is over.
    Blocked(Session, Arc<str>),
}

/// One open connection.
#[derive(Clone, Debug)]
pub(super) struct Session(Arc<Open>);

#[derive(Debug)]
struct Open {
    connection: Connection,
    ended: CancellationToken,
    why: Mutex<Option<String>>,
    /// How many sessions of its link have ended.
    lost: Arc<AtomicU64>,
}

impl Session {
    pub(super) async fn channel(&self) -> Result<Channel, String> {
        match tokio::time::timeout(REPLY_TIMEOUT, self.0.connection.create_channel()).await {
            Ok(channel) => channel.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no channel within {REPLY_TIMEOUT:?}")),
        }
    }

    /// Ends the session for all its users. The first reason is kept.
    pub(super) fn fail(&self, why: impl std::fmt::Display) {
        self.0.why.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| {
            // Counted before the publishers get the results of what was confirmed on it.
            self.0.lost.fetch_add(1, Ordering::SeqCst);
            why.to_string()
        });
        self.0.ended.cancel();
    }

    /// Makes sure that the topology is complete. The error lists the mistakes in one line.
    pub(super) async fn ensure(&self, topology: &Topology) -> Result<(), String> {
        topology.ensure(&self.0.connection).await.map_err(|errors| survey::list(&errors))
    }

    pub(super) fn is(&self, other: &Session) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(super) async fn ended(&self) {
        self.0.ended.cancelled().await;
    }

    fn has_ended(&self) -> bool {
        self.0.ended.is_cancelled()
    }

    pub(super) fn why(&self) -> String {
        let why = self.0.why.lock().unwrap_or_else(PoisonError::into_inner).clone();
        why.unwrap_or_else(|| "closed".to_owned())
    }
}

/// Publishes to a queue without waiting: the first poll sends the message. Waiting until it is written would wake the
/// task once more while the other side works.
pub(super) fn post(
    channel: &Channel,
    queue: ShortString,
    properties: BasicProperties,
    body: &[u8],
) -> Result<(), StoreError> {
    match channel.basic_publish("".into(), queue, BasicPublishOptions::default(), body, properties).now_or_never() {
        Some(Err(error)) => Err(StoreError::Unavailable(error.to_string())),
        Some(Ok(_)) | None => Ok(()),
    }
}

/// Keeps one connection open for as long as it lives.
#[derive(Debug)]
pub(super) struct Link {
    state: watch::Receiver<State>,
    lost: Arc<AtomicU64>,
    stop: CancellationToken,
    task: Mutex<Option<AbortOnDropHandle<()>>>,
}

impl Link {
    /// `name` shows in RabbitMQ's list of connections and in our logs.
    pub(super) fn start(endpoint: Endpoint, topology: Topology, name: &'static str) -> Arc<Link> {
        let (states, state) = watch::channel(State::Down("not connected yet".into()));
        let stop = CancellationToken::new();
        let lost = Arc::new(AtomicU64::new(0));
        let supervisor = Supervisor { endpoint, topology, name, states, lost: Arc::clone(&lost), stop: stop.clone() };
        let task = AbortOnDropHandle::new(tokio::spawn(supervisor.run()));
        Arc::new(Link { state, lost, stop, task: Mutex::new(Some(task)) })
    }

    /// How many sessions have ended.
    pub(super) fn sessions_lost(&self) -> u64 {
        self.lost.load(Ordering::SeqCst)
    }

    /// The open connection, or why nothing can be published now.
    pub(super) fn session(&self) -> Result<Session, StoreError> {
        match &*self.state.borrow() {
            // It failed a moment ago, and the supervisor has not closed it yet.
            State::Up(session) if session.has_ended() => {
                Err(StoreError::Unavailable(format!("no connection to RabbitMQ: {}", session.why())))
            }
            State::Up(session) => Ok(session.clone()),
            State::Blocked(_, why) => Err(StoreError::Unavailable(format!("RabbitMQ accepts no messages now: {why}"))),
            State::Down(why) => Err(StoreError::Unavailable(format!("no connection to RabbitMQ: {why}"))),
        }
    }

    /// Waits for an open connection, blocked or not.
    pub(super) async fn up(&self) -> Session {
        let mut state = self.state.clone();
        let is_open = |state: &State| match state {
            State::Up(session) | State::Blocked(session, _) => !session.has_ended(),
            State::Down(_) => false,
        };
        let up = state.wait_for(is_open).await.map(|state| state.clone());
        match up {
            Ok(State::Up(session) | State::Blocked(session, _)) => session,
            // The supervisor ended with its link; callers that wait here are about to end too.
            Ok(State::Down(_)) | Err(_) => std::future::pending().await,
        }
    }

    /// A receiver of the connection's state.
    pub(super) fn watch(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Closes the connection with AMQP's close handshake.
    pub(super) async fn close(&self) {
        self.stop.cancel();
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            drop(task.await);
        }
    }
}

struct Supervisor {
    endpoint: Endpoint,
    topology: Topology,
    name: &'static str,
    states: watch::Sender<State>,
    lost: Arc<AtomicU64>,
    stop: CancellationToken,
}

impl Supervisor {
    async fn run(self) {
        let mut backoff = Backoff::default();
        let mut last = String::new();
        loop {
            let ended = tokio::select! {
                opened = self.open() => opened,
                () = self.stop.cancelled() => return,
            };
            let why = match ended {
                Ok(session) => {
                    tracing::info!(at = self.endpoint.address(), connection = self.name, "connected to RabbitMQ");
                    let opened = Instant::now();
                    let why = self.watch_over(&session).await;
                    session.fail(&why);
                    // A session that fails as soon as it is used, for lack of a permission for example, is not
                    // redialled in a tight loop.
                    if opened.elapsed() >= SETTLED {
                        backoff.reset();
                        last.clear();
                    }
                    why
                }
                Err(why) => why,
            };
            self.states.send_replace(State::Down(why.as_str().into()));
            if self.stop.is_cancelled() {
                return;
            }
            // Each reason is logged once, not at every attempt.
            if why != last {
                tracing::error!(connection = self.name, why, "no connection to RabbitMQ, trying again");
                last = why;
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next()) => {}
                () = self.stop.cancelled() => return,
            }
        }
    }

    async fn open(&self) -> Result<Session, String> {
        let name = format!("streamgate {}", self.name);
        let connection = self.endpoint.dial(&name).await.map_err(|error| error.to_string())?;
        if let Err(errors) = self.topology.ensure(&connection).await {
            close_connection(&connection).await;
            return Err(survey::list(&errors));
        }
        let (ended, why, lost) = (CancellationToken::new(), Mutex::default(), Arc::clone(&self.lost));
        Ok(Session(Arc::new(Open { connection, ended, why, lost })))
    }

    /// Watches one session. Returns why it ended.
    async fn watch_over(&self, session: &Session) -> String {
        let connection = &session.0.connection;
        let mut events = pin!(connection.events_listener());
        // Events before the listener existed are lost.
        if !connection.status().connected() {
            return "the connection ended at once".to_owned();
        }
        self.states.send_replace(if connection.status().blocked() {
            State::Blocked(session.clone(), "blocked".into())
        } else {
            State::Up(session.clone())
        });
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + VERIFY, VERIFY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Event::ConnectionBlocked(why)) => {
                        tracing::warn!(connection = self.name, why, "RabbitMQ blocks publishing");
                        self.states.send_replace(State::Blocked(session.clone(), why.into()));
                    }
                    Some(Event::ConnectionUnblocked) => {
                        tracing::info!(connection = self.name, "RabbitMQ takes messages again");
                        self.states.send_replace(State::Up(session.clone()));
                    }
                    // Channel errors are reported here too; the channel's owner handles them.
                    Some(Event::Error(error)) if !connection.status().connected() => return error.to_string(),
                    Some(_) => {}
                    None => return "closed".to_owned(),
                },
                () = session.ended() => {
                    // The caller that failed it saw an error that others may not see.
                    close_connection(connection).await;
                    return session.why();
                }
                () = self.stop.cancelled() => {
                    close_connection(connection).await;
                    return "stopped".to_owned();
                }
                _ = ticks.tick(), if !connection.status().blocked() => {
                    if let Err(errors) = self.topology.ensure(connection).await {
                        close_connection(connection).await;
                        return survey::list(&errors);
                    }
                }
            }
        }
    }
}

pub(super) async fn close_connection(connection: &Connection) {
    // A close that fails means that the connection has ended, or will when its heartbeats stop.
    drop(tokio::time::timeout(CLOSE, connection.close(200, "OK".into())).await);
}
