//! The accept loop, and the drain.

use crate::activity::Activity;
use crate::connection::{self, Ends};
use crate::connections::{Connections, Place};
use crate::receive::{Arrival, Intake};
use crate::tls::Tls;
use futures_util::FutureExt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streamgate_core::ports::{Enqueue, Seen};
use streamgate_service::{config::GatewayConfig, shutdown::Shutdown};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::future::FutureExt as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// After an `accept` that failed for want of descriptors or memory: others must give something back first.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// How long a drain looks for connections that the kernel has made already.
const BACKLOG: Duration = Duration::from_millis(10);
/// After this long without a new connection a balancer has seen that this gateway is not ready any more, or there is none. Half
/// of the drain's time is waited for that at the most: without a balancer there is always another.
const QUIET: Duration = Duration::from_millis(300);
/// Errors of `accept` that tell of ourselves, by their numbers in Linux: ENOMEM, ENFILE, EMFILE, ENOBUFS. The others tell of
/// a peer that has gone again.
const EXHAUSTED: [i32; 4] = [12, 23, 24, 105];
/// After the drain's time is over: long enough to write the answers that are due then.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// The public port.
#[derive(Debug)]
pub struct Gateway<E, S> {
    config: GatewayConfig,
    intake: Arc<Intake<E, S>>,
    tls: Option<Tls>,
}

impl<E: Enqueue, S: Seen> Gateway<E, S> {
    /// `tls`: absent for plain HTTP.
    pub fn new(config: GatewayConfig, intake: Arc<Intake<E, S>>, tls: Option<Tls>) -> Gateway<E, S> {
        Gateway { config, intake, tls }
    }

    /// Serves until the drain, then until what is in hand is answered or the drain's time is over.
    pub async fn run(&self, listener: TcpListener, shutdown: Shutdown) {
        let connections = Connections::new(self.config.max_connections, Arc::clone(&self.intake.metrics));
        let tasks = TaskTracker::new();
        let ends = Shutdown { drain: shutdown.drain.clone(), abort: CancellationToken::new() };
        let mut last = None;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = shutdown.drain.cancelled() => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    last = Some(Instant::now());
                    let activity = connections.activity();
                    let place = tokio::select! {
                        place = connections.place(&activity) => place,
                        () = shutdown.abort.cancelled() => return,
                    };
                    tasks.spawn(self.connection(stream, activity, place, &ends, Arrival::InTime));
                }
                Err(error) if error.raw_os_error().is_some_and(|number| EXHAUSTED.contains(&number)) => {
                    tracing::error!(%error, "cannot accept a connection; raise the limit of open files");
                    // The longest idle connection gives a descriptor back.
                    connections.evict();
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
                Err(error) => tracing::debug!(%error, "a connection was gone before it was accepted"),
            }
        }
        // Connections that were made before the stop have been promised an answer: the kernel took them for us. And a balancer
        // sends others until it looks at /readyz again.
        let began = Instant::now();
        while began.elapsed() < self.config.drain_timeout / 2 && !shutdown.abort.is_cancelled() {
            let quiet = last.map_or(BACKLOG, |last| QUIET.saturating_sub(last.elapsed()).max(BACKLOG));
            // Unconstrained, or tokio would stop after its usual share of a turn.
            let accepted = tokio::task::unconstrained(tokio::time::timeout(quiet, listener.accept()));
            let stream = match accepted.await {
                Ok(Ok((stream, _))) => stream,
                Ok(Err(_)) => {
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                    continue;
                }
                Err(_) => break,
            };
            last = Some(Instant::now());
            let activity = connections.activity();
            let Some(place) = connections.place(&activity).now_or_never() else { break };
            tasks.spawn(self.connection(stream, activity, place, &ends, Arrival::InTime));
        }
        tasks.close();
        let late = TaskTracker::new();
        tokio::select! {
            () = tasks.wait() => {}
            () = self.turn_away(&listener, &connections, &late, &ends) => {}
            () = tokio::time::sleep(self.config.drain_timeout.saturating_sub(began.elapsed())) => {
                tracing::warn!(connections = tasks.len(), "drain timeout: what is left is answered 503");
            }
            () = shutdown.abort.cancelled() => {}
        }
        drop(listener);
        late.close();
        self.intake.give_up();
        let all = || async { tokio::join!(tasks.wait(), late.wait()) };
        if tokio::time::timeout(LAST_ANSWERS, all()).await.is_err() {
            ends.abort.cancel();
            all().await;
        }
    }

    /// Takes connections that still come, to tell them to come back: a refused connection costs the sender an
    /// attempt more than a 503.
    async fn turn_away(
        &self,
        listener: &TcpListener,
        connections: &Arc<Connections>,
        late: &TaskTracker,
        ends: &Shutdown,
    ) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let activity = connections.activity();
                    if let Some(place) = connections.place(&activity).now_or_never() {
                        late.spawn(self.connection(stream, activity, place, ends, Arrival::Late));
                    }
                }
                Err(_) => tokio::time::sleep(ACCEPT_BACKOFF).await,
            }
        }
    }

    /// One connection to its end. `ends`: the drain, and the moment after it at which what is left is cut.
    fn connection(
        &self,
        stream: TcpStream,
        activity: Arc<Activity>,
        place: Place,
        ends: &Shutdown,
        arrival: Arrival,
    ) -> impl Future<Output = Option<()>> + Send + use<E, S> {
        let cut = ends.abort.clone();
        let ends = Ends::new(&self.config, ends.drain.clone(), place.evicted.clone(), arrival);
        let (intake, tls) = (Arc::clone(&self.intake), self.tls.clone());
        let serve = async move {
            // An answer is one small write: it should not wait for another.
            if stream.set_nodelay(true).is_err() {
                return;
            }
            match tls {
                None => connection::serve_http1(stream, intake, activity, ends).await,
                Some(tls) => secure(stream, &tls, intake, activity, ends).await,
            }
            drop(place);
        };
        serve.with_cancellation_token_owned(cut)
    }
}

/// The handshake is bounded like a head: a peer that never ends it holds a place, and is the first to lose it.
async fn secure<E: Enqueue, S: Seen>(
    stream: TcpStream,
    tls: &Tls,
    intake: Arc<Intake<E, S>>,
    activity: Arc<Activity>,
    ends: Ends,
) {
    let handshake = tokio::time::timeout(ends.header_timeout, tls.acceptor().accept(stream));
    let shaken = tokio::select! {
        shaken = handshake => shaken,
        () = ends.evicted.cancelled() => return,
    };
    // A peer that does not speak TLS, or too slowly, is no news of ours.
    let Ok(Ok(stream)) = shaken else { return };
    if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
        connection::serve_http2(stream, intake, activity, ends).await;
    } else {
        connection::serve_http1(stream, intake, activity, ends).await;
    }
}
