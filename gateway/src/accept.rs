//! The accept loop and the drain.

use crate::acme;
use crate::activity::Activity;
use crate::connection::{self, ConnectionSettings, FAREWELL};
use crate::connections::{Connections, Place, Stuck};
use crate::proxy;
use crate::receive::{Arrival, Intake};
use crate::tls::Tls;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use streamgate_core::ports::Enqueue;
use streamgate_core::reason::Reason;
use streamgate_service::{config::GatewayConfig, shutdown::Shutdown};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

/// Wait after an `accept` that failed for lack of descriptors or memory: other connections must give some back first.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// After this long without such a failure the gateway is ready again, whether or not a connection came.
const RELIEVED: Duration = Duration::from_secs(1);

/// How long a drain looks for connections that the kernel has established already.
const BACKLOG: Duration = Duration::from_millis(10);
/// After this long without a new connection, either a balancer has noticed that this gateway is not ready any more, or there
/// is no balancer. Counted from the start of the drain, for at least `drain_least`, because nothing need come between two
/// probes; and for at most half of the drain's time, because clients without a balancer keep coming.
const QUIET: Duration = Duration::from_millis(300);
/// Errors of `accept` that this host causes, by their Linux numbers: ENOMEM, ENFILE, EMFILE, ENOBUFS. All others are about
/// a peer that has disconnected.
const EXHAUSTED: [i32; 4] = [12, 23, 24, 105];
/// Time after the drain for writing the answers that are due at its end.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// The public port.
#[derive(Debug)]
pub struct Gateway<E> {
    config: GatewayConfig,
    intake: Arc<Intake<E>>,
    tls: Option<Tls>,
    connections: Arc<Connections>,
}

/// How far the port is on its way to being closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Open,
    /// The drain began, and connections that still come are served: the kernel has accepted some already, and a balancer sends
    /// others until it reads /readyz again.
    Quieting,
    /// Connections that still come are answered 503: a refused connection costs the sender an attempt more than a 503.
    TurningAway,
}

/// What the loop waits for.
enum Event {
    Arrived(std::io::Result<(TcpStream, Place)>),
    Drain,
    /// The stage's time is over.
    Over,
    /// For a while no `accept` failed for lack of descriptors.
    Relieved,
    /// All connections that came in time have ended.
    Ended,
    Abort,
}

impl<E: Enqueue> Gateway<E> {
    /// `tls` is `None` for plain HTTP.
    pub fn new(config: GatewayConfig, intake: Arc<Intake<E>>, tls: Option<Tls>) -> Gateway<E> {
        let connections = Connections::new(config.max_connections, Arc::clone(&intake.metrics));
        Gateway { config, intake, tls, connections }
    }

    /// Returns a check of whether a new connection could be accepted now, with the reason if not.
    pub fn accepting(&self) -> impl Fn() -> Result<(), &'static str> + Send + Sync + 'static {
        let connections = Arc::clone(&self.connections);
        move || connections.ready()
    }

    /// Serves until the drain begins, then until what is in hand is answered or the drain's time is over.
    pub async fn run(&self, listener: TcpListener, shutdown: Shutdown) {
        let (tasks, late) = (TaskTracker::new(), TaskTracker::new());
        // Holds the log alone: an aborted task may keep what it owns for a while, and the store is closed after this.
        let log = Arc::clone(&self.intake.log);
        let _summaries = AbortOnDropHandle::new(tokio::spawn(async move { log.summaries().await }));
        let ends = Shutdown { drain: shutdown.drain.clone(), abort: CancellationToken::new() };
        // A connection that was accepted and has no place yet.
        let mut newcomer = None;
        let (mut stage, mut began, mut last) = (Stage::Open, Instant::now(), None);
        loop {
            let over = self.over(stage, began, last);
            let event = tokio::select! {
                biased;
                () = shutdown.abort.cancelled() => Event::Abort,
                () = shutdown.drain.cancelled(), if stage == Stage::Open => Event::Drain,
                () = tasks.wait(), if stage == Stage::TurningAway => Event::Ended,
                () = tokio::time::sleep_until(over.into()), if stage != Stage::Open => Event::Over,
                // Unconstrained, or tokio's budget for one poll would leave waiting connections unseen.
                arrived = tokio::task::unconstrained(arrive(&listener, &self.connections, &mut newcomer)) => {
                    Event::Arrived(arrived)
                }
                () = tokio::time::sleep(RELIEVED), if self.connections.lacks_descriptors() => Event::Relieved,
            };
            match event {
                Event::Arrived(Ok((stream, place))) => {
                    last = Some(Instant::now());
                    let (tasks, arrival) = match stage {
                        Stage::Open | Stage::Quieting => (&tasks, Arrival::InTime),
                        Stage::TurningAway => (&late, Arrival::Late),
                    };
                    tasks.spawn(self.connection(stream, place, &ends, arrival));
                }
                Event::Arrived(Err(error)) => self.refused(&error).await,
                Event::Relieved => self.connections.clear_stuck(),
                Event::Drain => (stage, began) = (Stage::Quieting, Instant::now()),
                Event::Over if stage == Stage::Quieting => {
                    stage = Stage::TurningAway;
                    tasks.close();
                }
                Event::Over => {
                    tracing::warn!(connections = tasks.len(), "drain timeout: what is left is answered 503");
                    break;
                }
                Event::Ended | Event::Abort => break,
            }
        }
        drop((listener, newcomer));
        tasks.close();
        late.close();
        self.intake.give_up();
        let all = || async { tokio::join!(tasks.wait(), late.wait()) };
        if tokio::time::timeout(LAST_ANSWERS, all()).await.is_err() {
            ends.abort.cancel();
            all().await;
        }
        self.intake.log.summary();
    }

    /// When a stage ends by itself. `last` is when the last connection came.
    fn over(&self, stage: Stage, began: Instant, last: Option<Instant>) -> Instant {
        match stage {
            Stage::Open | Stage::TurningAway => began + self.config.drain_timeout,
            Stage::Quieting => {
                let least = began + self.config.drain_least.unwrap_or_default();
                let quiet = last.map_or(began, |last| last.max(began)) + QUIET;
                let looked = Instant::now() + BACKLOG;
                quiet.max(looked).min(began + self.config.drain_timeout / 2).max(least)
            }
        }
    }

    /// Handles a failed `accept`.
    async fn refused(&self, error: &std::io::Error) {
        if error.raw_os_error().is_some_and(|number| EXHAUSTED.contains(&number)) {
            tracing::error!(%error, "cannot accept a connection; raise the limit of open files");
            self.connections.note_stuck(Stuck::Descriptors);
            // Evicting a connection gives a descriptor back.
            self.connections.evict();
            tokio::time::sleep(ACCEPT_BACKOFF).await;
        } else {
            tracing::debug!(%error, "a connection was gone before it was accepted");
        }
    }

    /// Serves one connection to its end. `ends` holds the drain, and the later abort at which whatever is left is cut off.
    fn connection(
        &self,
        stream: TcpStream,
        place: Place,
        ends: &Shutdown,
        arrival: Arrival,
    ) -> impl Future<Output = ()> + Send + use<E> {
        let cut = ends.abort.clone();
        let ends = ConnectionSettings::new(&self.config, ends.drain.clone(), arrival);
        let (intake, tls, activity) = (Arc::clone(&self.intake), self.tls.clone(), Arc::clone(&place.activity));
        let serve = async move {
            let mut stream = stream;
            let peer = activity.peer();
            if intake.peers.has_header(peer) {
                let header = tokio::time::timeout(ends.header_timeout, proxy::client(&mut stream));
                let read = tokio::select! {
                    read = header => read,
                    () = activity.evicted.cancelled() => return,
                };
                match read {
                    Ok(Ok(Some(client))) => activity.comes_from(client),
                    Ok(Ok(None)) => {}
                    Ok(Err(error)) if is_gone(&error) => return,
                    Ok(Err(_)) | Err(_) => {
                        intake.log.unreadable(Reason::MissingProxyHeader, peer);
                        return;
                    }
                }
            }
            // An answer is one small write, and should not wait for another.
            if stream.set_nodelay(true).is_err() {
                return;
            }
            match tls {
                None => connection::serve_http1(stream, intake, activity, ends).await,
                Some(tls) => secure(stream, &tls, intake, activity, ends).await,
            }
        };
        async move {
            // After an eviction the connection gets `FAREWELL`, whatever it is doing.
            let farewell = async {
                place.activity.evicted.cancelled().await;
                tokio::time::sleep(FAREWELL).await;
            };
            tokio::select! {
                () = serve => {}
                () = farewell => {}
                () = cut.cancelled() => {}
            }
            // Last, after the socket is closed: until then it takes a place.
            drop(place);
        }
    }
}

/// The next connection and its place. Cancel-safe: an accepted connection stays in `newcomer`.
async fn arrive(
    listener: &TcpListener,
    connections: &Arc<Connections>,
    newcomer: &mut Option<(TcpStream, SocketAddr)>,
) -> std::io::Result<(TcpStream, Place)> {
    let waiting = match newcomer {
        Some(_) => newcomer,
        None => {
            newcomer.replace(listener.accept().await?);
            newcomer
        }
    };
    let peer = waiting.as_ref().map_or(IpAddr::from([0; 4]), |(_, peer)| peer.ip());
    let place = connections.place(peer).await;
    waiting.take().map(|(stream, _)| (stream, place)).ok_or_else(|| std::io::ErrorKind::NotConnected.into())
}

/// Whether the peer disconnected, as probes of balancers do that only connect.
fn is_gone(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

/// Performs the handshake, which is bounded like a head: a peer that never ends it holds a place, and is the first to lose it.
async fn secure<E: Enqueue>(
    stream: TcpStream,
    tls: &Tls,
    intake: Arc<Intake<E>>,
    activity: Arc<Activity>,
    ends: ConnectionSettings,
) {
    let handshake = tokio::time::timeout(ends.header_timeout, tls.acceptor().accept(stream));
    let result = tokio::select! {
        result = handshake => result,
        () = activity.evicted.cancelled() => return,
    };
    let mut stream = match result {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) if is_gone(&error) => return,
        Ok(Err(_)) | Err(_) => return intake.log.unreadable(Reason::TlsFailed, activity.peer()),
    };
    match stream.get_ref().1.alpn_protocol() {
        Some(b"h2") => connection::serve_http2(stream, intake, activity, ends).await,
        // The authority came only for the handshake; it may have disconnected already.
        Some(acme::PROTOCOL) => drop(tokio::time::timeout(FAREWELL, stream.shutdown()).await),
        Some(_) | None => connection::serve_http1(stream, intake, activity, ends).await,
    }
}
