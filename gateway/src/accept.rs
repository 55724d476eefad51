//! The accept loop, and the drain.

use crate::acme;
use crate::activity::Activity;
use crate::connection::{self, Ends, FAREWELL};
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

/// After an `accept` that failed for want of descriptors or memory: others must give something back first.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// After this long without such a failure connections are taken again, whether or not one came.
const RELIEVED: Duration = Duration::from_secs(1);

/// How long a drain looks for connections that the kernel has made already.
const BACKLOG: Duration = Duration::from_millis(10);
/// After this long without a new connection a balancer has seen that this gateway is not ready any more, or there is none. Counted
/// from the start of the drain, and at least `drain_least` long: between two probes nothing need come. Half of the drain's time
/// is waited for that at the most: without a balancer there is always another.
const QUIET: Duration = Duration::from_millis(300);
/// Errors of `accept` that tell of ourselves, by their numbers in Linux: ENOMEM, ENFILE, EMFILE, ENOBUFS. The others tell of
/// a peer that has gone again.
const EXHAUSTED: [i32; 4] = [12, 23, 24, 105];
/// After the drain's time is over: long enough to write the answers that are due then.
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
    /// The drain began, and connections that still come are served: those that the kernel has made already have been promised
    /// an answer, and a balancer sends others until it looks at /readyz again.
    Quieting,
    /// Connections that still come are answered 503, to come back: a refused connection costs the sender an attempt more than a 503.
    TurningAway,
}

/// What the loop waits for.
enum Event {
    Arrived(std::io::Result<(TcpStream, Place)>),
    Drain,
    /// The stage's time is over.
    Over,
    /// For a while nobody was refused for want of descriptors.
    Relieved,
    /// All connections that came in time have ended.
    Ended,
    Abort,
}

impl<E: Enqueue> Gateway<E> {
    /// `tls`: absent for plain HTTP.
    pub fn new(config: GatewayConfig, intake: Arc<Intake<E>>, tls: Option<Tls>) -> Gateway<E> {
        let connections = Connections::new(config.max_connections, Arc::clone(&intake.metrics));
        Gateway { config, intake, tls, connections }
    }

    /// Says whether a new connection could be taken now, or why not.
    pub fn accepting(&self) -> impl Fn() -> Result<(), &'static str> + Send + Sync + 'static {
        let connections = Arc::clone(&self.connections);
        move || connections.ready()
    }

    /// Serves until the drain, then until what is in hand is answered or the drain's time is over.
    pub async fn run(&self, listener: TcpListener, shutdown: Shutdown) {
        let (tasks, late) = (TaskTracker::new(), TaskTracker::new());
        // The log alone: a task that is aborted may hold what it has for a while, and the store is closed after this.
        let log = Arc::clone(&self.intake.log);
        let _summaries = AbortOnDropHandle::new(tokio::spawn(async move { log.summaries().await }));
        let ends = Shutdown { drain: shutdown.drain.clone(), abort: CancellationToken::new() };
        // Accepted, and without a place yet.
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
                // Unconstrained, or tokio would stop after its usual share of a turn and leave the rest unseen.
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
                Event::Relieved => self.connections.moves_on(),
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

    /// When a stage ends by itself. `last`: when the last connection came.
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

    /// An `accept` that failed.
    async fn refused(&self, error: &std::io::Error) {
        if error.raw_os_error().is_some_and(|number| EXHAUSTED.contains(&number)) {
            tracing::error!(%error, "cannot accept a connection; raise the limit of open files");
            self.connections.is_stuck(Stuck::Descriptors);
            // Another connection gives a descriptor back.
            self.connections.evict();
            tokio::time::sleep(ACCEPT_BACKOFF).await;
        } else {
            tracing::debug!(%error, "a connection was gone before it was accepted");
        }
    }

    /// One connection to its end. `ends`: the drain, and the moment after it at which what is left is cut.
    fn connection(
        &self,
        stream: TcpStream,
        place: Place,
        ends: &Shutdown,
        arrival: Arrival,
    ) -> impl Future<Output = ()> + Send + use<E> {
        let cut = ends.abort.clone();
        let ends = Ends::new(&self.config, ends.drain.clone(), arrival);
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
            // An answer is one small write: it should not wait for another.
            if stream.set_nodelay(true).is_err() {
                return;
            }
            match tls {
                None => connection::serve_http1(stream, intake, activity, ends).await,
                Some(tls) => secure(stream, &tls, intake, activity, ends).await,
            }
        };
        async move {
            // Whatever it does by then.
            let farewell = async {
                place.activity.evicted.cancelled().await;
                tokio::time::sleep(FAREWELL).await;
            };
            tokio::select! {
                () = serve => {}
                () = farewell => {}
                () = cut.cancelled() => {}
            }
            // Last, when the socket is closed: until then it takes a place.
            drop(place);
        }
    }
}

/// The next connection and its place. May be dropped and called again: what was accepted stays with `newcomer`.
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

/// Whether the peer went away: as probes of balancers do, which only connect.
fn is_gone(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

/// The handshake is bounded like a head: a peer that never ends it holds a place, and is the first to lose it.
async fn secure<E: Enqueue>(stream: TcpStream, tls: &Tls, intake: Arc<Intake<E>>, activity: Arc<Activity>, ends: Ends) {
    let handshake = tokio::time::timeout(ends.header_timeout, tls.acceptor().accept(stream));
    let shaken = tokio::select! {
        shaken = handshake => shaken,
        () = activity.evicted.cancelled() => return,
    };
    let mut stream = match shaken {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) if is_gone(&error) => return,
        Ok(Err(_)) | Err(_) => return intake.log.unreadable(Reason::TlsFailed, activity.peer()),
    };
    match stream.get_ref().1.alpn_protocol() {
        Some(b"h2") => connection::serve_http2(stream, intake, activity, ends).await,
        // The handshake was all that the authority came for; it may have gone already.
        Some(acme::PROTOCOL) => drop(tokio::time::timeout(FAREWELL, stream.shutdown()).await),
        Some(_) | None => connection::serve_http1(stream, intake, activity, ends).await,
    }
}
