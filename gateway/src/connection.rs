//! One connection: handshake, protocol by ALPN, timeouts, and a graceful end.

use crate::activity::{Activity, Phase};
use crate::receive::{AnswerBody, Arrival, Intake};
use crate::repoll::Repoll;
use crate::response;
use crate::watched::Watched;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::{Service, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use streamgate_core::ports::{Enqueue, Seen};
use streamgate_service::config::GatewayConfig;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

/// Heads over this are answered 431. It is also the most that a connection buffers.
const MAX_HEAD: usize = 16 << 10;
/// HTTP/2: streams of one connection, and bytes that it may send ahead of being read.
const MAX_STREAMS: u32 = 128;
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 128 << 10;
/// Longer than a request is on its way to us, and far shorter than a drain.
const DRAIN_GRACE: Duration = Duration::from_millis(250);
/// How long the last words of a connection may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// What ends a connection from outside.
#[derive(Clone, Debug)]
pub(crate) struct Ends {
    pub(crate) drain: CancellationToken,
    pub(crate) evicted: CancellationToken,
    pub(crate) header_timeout: Duration,
    pub(crate) keep_alive: Duration,
    pub(crate) arrival: Arrival,
}

impl Ends {
    pub(crate) fn new(
        config: &GatewayConfig,
        drain: CancellationToken,
        evicted: CancellationToken,
        arrival: Arrival,
    ) -> Ends {
        Ends { drain, evicted, header_timeout: config.header_timeout, keep_alive: config.keep_alive, arrival }
    }
}

/// What the clock, or somebody outside, wants of a connection.
enum Stop {
    /// The peer or the protocol has ended it.
    Ended,
    /// A head did not come whole in time.
    HeadTimeout(std::time::Instant),
    /// To be told that it ends, gracefully.
    Tell,
    /// To be dropped: it was told, and is idle.
    Now,
}

/// How far a connection is on its way out.
#[derive(Clone, Copy)]
enum Leaving {
    No,
    /// The drain began then. What the peer sent before it could know is still taken.
    Grace(std::time::Instant),
    /// Told then; the answers in hand are the last.
    Told(std::time::Instant),
    /// Its place is given away: a head that is on its way is not waited for.
    Evicted(std::time::Instant),
}

/// A hyper connection, of either version.
trait Graceful: Future<Output = hyper::Result<()>> {
    /// How long an idle connection is kept when a drain begins, for what is under way.
    const GRACE: Duration;
    /// How long an idle connection may take for its goodbye.
    const GOODBYE: Duration;
    fn begin_shutdown(self: Pin<&mut Self>);
}

/// What hyper calls for each request, whatever the protocol.
fn answering<E: Enqueue, S: Seen>(
    intake: Arc<Intake<E, S>>,
    activity: Arc<Activity>,
    arrival: Arrival,
) -> impl Service<Request<Incoming>, Response = Response<AnswerBody>, Error = Infallible, Future: Send + 'static> {
    service_fn(move |request| {
        // Here and not within the future: HTTP/2 runs that in a task of its own, later.
        let (first_byte, in_hand) = activity.begin();
        let answer = Arc::clone(&intake).answer(request, first_byte, in_hand, arrival);
        async { Ok(answer.await) }
    })
}

pub(crate) async fn serve_http1<IO, E, S>(stream: IO, intake: Arc<Intake<E, S>>, activity: Arc<Activity>, ends: Ends)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    E: Enqueue,
    S: Seen,
{
    let service = answering(Arc::clone(&intake), Arc::clone(&activity), ends.arrival);
    activity.expect_heads();
    let io = TokioIo::new(Watched::new(stream, Arc::clone(&activity)));
    // Time is kept by the activity, not by hyper: its header timeout would run on idle connections too, and close without
    // an answer.
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .half_close(true)
        .max_buf_size(MAX_HEAD)
        .serve_connection(io, service);
    if let Stop::HeadTimeout(first_byte) = run(Pin::new(&mut connection), &activity, &ends).await {
        intake.told_header_timeout(first_byte);
        let mut stream = connection.into_parts().io.into_inner();
        let farewell = async {
            stream.write_all(response::header_timeout().as_bytes()).await?;
            stream.shutdown().await
        };
        // The peer was given its chance; whether it listens is its own affair.
        drop(tokio::time::timeout(FAREWELL, farewell).await);
    }
}

pub(crate) async fn serve_http2<IO, E, S>(stream: IO, intake: Arc<Intake<E, S>>, activity: Arc<Activity>, ends: Ends)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    E: Enqueue,
    S: Seen,
{
    let service = answering(intake, Arc::clone(&activity), ends.arrival);
    let io = TokioIo::new(Watched::new(stream, Arc::clone(&activity)));
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD as u32)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .serve_connection(io, service);
    run(pin!(connection), &activity, &ends).await;
}

/// Drives a connection until it ends by itself or by one of its timeouts.
async fn run<C: Graceful>(mut connection: Pin<&mut C>, activity: &Activity, ends: &Ends) -> Stop {
    let mut timer = pin!(tokio::time::sleep(ends.keep_alive));
    let (mut leaving, repoll) = (Leaving::No, Repoll::new());
    loop {
        let (stays, evicted) = (matches!(leaving, Leaving::No), matches!(leaving, Leaving::Evicted(_)));
        let now = std::time::Instant::now;
        tokio::select! {
            biased;
            stop = poll_fn(|cx| match repoll.poll(cx, |cx| connection.as_mut().poll(cx)) {
                Poll::Ready(_) => Poll::Ready(Stop::Ended),
                Poll::Pending => clock::<C>(timer.as_mut(), activity, ends, leaving, cx),
            }) => match stop {
                Stop::Tell => leaving = Leaving::Told(now()),
                Stop::Ended | Stop::HeadTimeout(_) | Stop::Now => return stop,
            },
            () = ends.evicted.cancelled(), if !evicted => leaving = Leaving::Evicted(now()),
            () = ends.drain.cancelled(), if stays => {
                leaving = Leaving::Grace(now());
                continue;
            }
        }
        connection.as_mut().begin_shutdown();
    }
}

/// Polled after the connection: which timeout runs depends on what that has just done.
fn clock<C: Graceful>(
    mut timer: Pin<&mut Sleep>,
    activity: &Activity,
    ends: &Ends,
    leaving: Leaving,
    cx: &mut Context<'_>,
) -> Poll<Stop> {
    let (stop, deadline) = match (activity.poll_phase(cx), leaving) {
        (Phase::Busy, Leaving::Grace(_)) => return Poll::Ready(Stop::Tell),
        // Requests have deadlines of their own.
        (Phase::Busy, Leaving::No | Leaving::Told(_) | Leaving::Evicted(_)) => return Poll::Pending,
        (Phase::Head(_), Leaving::Evicted(_)) => return Poll::Ready(Stop::Now),
        (Phase::Head(since), Leaving::No | Leaving::Grace(_) | Leaving::Told(_)) => {
            (Stop::HeadTimeout(since), since + ends.header_timeout)
        }
        (Phase::Idle(since), Leaving::No) => (Stop::Tell, since + ends.keep_alive),
        (Phase::Idle(since), Leaving::Grace(began)) => (Stop::Tell, since.max(began) + C::GRACE),
        (Phase::Idle(since), Leaving::Told(at) | Leaving::Evicted(at)) => (Stop::Now, since.max(at) + C::GOODBYE),
    };
    let deadline = Instant::from_std(deadline);
    if timer.deadline() != deadline {
        timer.as_mut().reset(deadline);
    }
    timer.poll(cx).map(|()| stop)
}

impl<IO, S, B> Graceful for http1::Connection<IO, S>
where
    Self: Future<Output = hyper::Result<()>> + Unpin,
    S: hyper::service::HttpService<hyper::body::Incoming, ResBody = B>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    IO: hyper::rt::Read + hyper::rt::Write + Unpin,
    B: hyper::body::Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// There is no way to say that the next request will not be taken: one that is on its way meets a closed connection.
    const GRACE: Duration = DRAIN_GRACE;
    /// hyper closes it at once, but for one that never carried a request: on that there is nothing to say.
    const GOODBYE: Duration = Duration::ZERO;

    fn begin_shutdown(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<IO, S, B, X> Graceful for http2::Connection<IO, S, X>
where
    Self: Future<Output = hyper::Result<()>>,
    S: hyper::service::HttpService<hyper::body::Incoming, ResBody = B>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    IO: hyper::rt::Read + hyper::rt::Write + Unpin,
    B: hyper::body::Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    X: hyper::rt::bounds::Http2ServerConnExec<S::Future, B>,
{
    const GRACE: Duration = Duration::ZERO;
    /// GOAWAY, and a ping to learn that the peer has seen it.
    const GOODBYE: Duration = FAREWELL;

    fn begin_shutdown(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}
