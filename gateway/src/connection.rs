//! One connection: protocol by ALPN, timeouts, and a graceful end.

use crate::activity::Activity;
use crate::clock::{self, ClockAction, ConnectionStatus, Leaving, Times};
use crate::head::MAX_HEAD;
use crate::receive::{AnswerBody, Arrival, Intake};
use crate::repoll::Repoll;
use crate::response;
use crate::watched::Watched;
use futures_util::FutureExt;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::{Service, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::convert::Infallible;
use std::error::Error;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use streamgate_core::ports::Enqueue;
use streamgate_core::reason::Reason;
use streamgate_service::config::GatewayConfig;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

/// hyper refuses larger HTTP/2 heads without notifying us; heads between `MAX_HEAD` and this are refused here.
const MAX_HTTP2_HEAD: u32 = 64 << 10;
/// HTTP/2 limits: the streams of a connection, and the bytes that a peer may send before they are read.
const MAX_STREAMS: u32 = 128;
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 128 << 10;
/// Longer than a request takes to reach us, and far shorter than a drain.
const DRAIN_GRACE: Duration = Duration::from_millis(250);
/// How long the last bytes of a connection may take.
pub(crate) const FAREWELL: Duration = Duration::from_secs(1);

/// When and why a connection ends from outside.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionSettings {
    drain: CancellationToken,
    pub(crate) header_timeout: Duration,
    keep_alive: Duration,
    write_timeout: Duration,
    arrival: Arrival,
}

impl ConnectionSettings {
    pub(crate) fn new(config: &GatewayConfig, drain: CancellationToken, arrival: Arrival) -> ConnectionSettings {
        ConnectionSettings {
            drain,
            header_timeout: config.header_timeout,
            keep_alive: config.keep_alive,
            // As long as making the answer may take: nobody waits longer for one.
            write_timeout: config.answer_deadline,
            arrival,
        }
    }

    fn times<C: Graceful>(&self) -> Times {
        Times {
            header_timeout: self.header_timeout,
            keep_alive: self.keep_alive,
            write_timeout: self.write_timeout,
            grace: C::GRACE,
            goodbye: C::GOODBYE,
        }
    }
}

/// A hyper connection of either HTTP version.
trait Graceful: Future<Output = hyper::Result<()>> {
    /// How long an idle connection is kept when a drain begins, for requests on their way.
    const GRACE: Duration;
    /// How long an idle connection may take for its goodbye.
    const GOODBYE: Duration;
    fn begin_shutdown(self: Pin<&mut Self>);
}

/// The service that hyper calls for each request, in either protocol.
fn answering<E: Enqueue>(
    intake: Arc<Intake<E>>,
    activity: Arc<Activity>,
    arrival: Arrival,
) -> impl Service<Request<Incoming>, Response = Response<AnswerBody>, Error = Infallible, Future: Send + 'static> {
    service_fn(move |request| {
        // Here rather than in the future, which HTTP/2 runs later in a task of its own.
        let (first_byte, in_hand) = activity.begin();
        let answer = Arc::clone(&intake).answer(request, first_byte, in_hand, arrival);
        async { Ok(answer.await) }
    })
}

pub(crate) async fn serve_http1<IO, E>(
    stream: IO,
    intake: Arc<Intake<E>>,
    activity: Arc<Activity>,
    ends: ConnectionSettings,
) where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    E: Enqueue,
{
    let service = answering(Arc::clone(&intake), Arc::clone(&activity), ends.arrival);
    activity.expect_heads();
    let io = TokioIo::new(Watched::new(stream, Arc::clone(&activity)));
    // The activity keeps the time: hyper's header timeout would also run on idle connections, and close them without
    // an answer.
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .half_close(true)
        // Also limits what a connection buffers.
        .max_buf_size(MAX_HEAD)
        .serve_connection(io, service);
    match run(Pin::new(&mut connection), &activity, &ends).await {
        End::Over => {}
        End::Failed(error) if !error.is_parse() => {}
        // hyper has answered it.
        End::Failed(error) => {
            let stream = connection.into_parts().io.into_inner();
            intake.log.unreadable(stream.opening().reason(error.is_parse_too_large()), activity.peer());
        }
        End::HeadTimeout => {
            intake.log.head_timed_out(activity.peer());
            let mut stream = connection.into_parts().io.into_inner();
            let farewell = async {
                stream.write_all(response::header_timeout().as_bytes()).await?;
                stream.shutdown().await
            };
            // A peer that does not read the answer is not waited for.
            drop(tokio::time::timeout(FAREWELL, farewell).await);
        }
    }
}

pub(crate) async fn serve_http2<IO, E>(
    stream: IO,
    intake: Arc<Intake<E>>,
    activity: Arc<Activity>,
    ends: ConnectionSettings,
) where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    E: Enqueue,
{
    let service = answering(Arc::clone(&intake), Arc::clone(&activity), ends.arrival);
    // Boxed, because hyper keeps space for this future until its answer is taken, and a peer may leave 128 answers untaken.
    let service = service_fn(move |request| service.call(request).boxed());
    let io = TokioIo::new(Watched::new(stream, Arc::clone(&activity)));
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HTTP2_HEAD)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .serve_connection(io, service);
    // Logged only if hyper ended the connection because of its input; a peer that disconnects did nothing wrong.
    if let End::Failed(error) = run(pin!(connection), &activity, &ends).await
        && error.source().and_then(|source| source.downcast_ref::<h2::Error>()).is_some_and(h2::Error::is_library)
    {
        intake.log.unreadable(Reason::MalformedHttp, activity.peer());
    }
}

/// How a connection ended.
enum End {
    Over,
    /// A head was not complete in time.
    HeadTimeout,
    Failed(hyper::Error),
}

/// Drives a connection until it ends by itself or its clock ends it.
async fn run<C: Graceful>(mut connection: Pin<&mut C>, activity: &Activity, ends: &ConnectionSettings) -> End {
    let mut timer = pin!(tokio::time::sleep(ends.keep_alive));
    let (times, repoll, mut leaving) = (ends.times::<C>(), Repoll::new(), Leaving::No);
    let mut failed = None;
    loop {
        let (stays, has_place) = (matches!(leaving, Leaving::No), !matches!(leaving, Leaving::Evicted(_)));
        let now = std::time::Instant::now;
        tokio::select! {
            biased;
            stop = poll_fn(|cx| match repoll.poll(cx, |cx| connection.as_mut().poll(cx)) {
                Poll::Ready(ended) => {
                    failed = ended.err();
                    Poll::Ready(ClockAction::Now)
                }
                Poll::Pending => clock(timer.as_mut(), activity, leaving, &times, cx),
            }) => match stop {
                ClockAction::Notify => leaving = Leaving::Notified(now()),
                ClockAction::HeadTimeout => return End::HeadTimeout,
                ClockAction::Now => return failed.map_or(End::Over, End::Failed),
            },
            () = activity.evicted.cancelled(), if has_place => leaving = Leaving::Evicted(now()),
            () = ends.drain.cancelled(), if stays => {
                leaving = Leaving::Grace(now());
                continue;
            }
        }
        connection.as_mut().begin_shutdown();
    }
}

/// Polled after the connection, because what the connection just did decides which timeout runs.
fn clock(
    mut timer: Pin<&mut Sleep>,
    activity: &Activity,
    leaving: Leaving,
    times: &Times,
    cx: &mut Context<'_>,
) -> Poll<ClockAction> {
    let phase = activity.poll_phase(cx);
    if activity.is_struck_out() && matches!(leaving, Leaving::No | Leaving::Grace(_)) {
        return Poll::Ready(ClockAction::Notify);
    }
    let doing = ConnectionStatus { phase, unwritten: activity.unwritten_since(), is_verified: activity.is_verified() };
    let Some((at, stop)) = clock::next(&doing, leaving, times) else { return Poll::Pending };
    let at = Instant::from_std(at);
    if timer.deadline() != at {
        timer.as_mut().reset(at);
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
    /// HTTP/1.1 cannot announce that no further request is taken: one on its way would meet a closed connection.
    const GRACE: Duration = DRAIN_GRACE;
    /// hyper closes an idle connection at once; on one that never carried a request there is nothing to send.
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
