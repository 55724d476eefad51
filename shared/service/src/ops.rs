//! The ops listener: /metrics, /healthz, /readyz. Never on the public port.

use crate::metrics::Metrics;
use crate::shutdown::Shutdown;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, body::Incoming};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// A scraper and a few probes: of more than this the oldest is closed.
const MAX_CONNECTIONS: usize = 64;
/// Also the longest that a probe's connection may be idle.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// The Prometheus text format, by its content type.
const METRICS_FORMAT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
/// After an `accept` that failed for want of descriptors: others must give something back first.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Says whether the process would accept work now, or why not; and where it would, what is not as it should be all the same.
pub type Readiness = Arc<dyn Fn() -> Result<Option<String>, String> + Send + Sync>;

/// Everything that is not as it should be, as one.
pub fn all(troubles: impl IntoIterator<Item = Option<String>>) -> Option<String> {
    troubles.into_iter().flatten().reduce(|one, other| format!("{one}; {other}"))
}

/// Ready while `ready` says so and nobody drains.
pub fn unless_draining(
    shutdown: &Shutdown,
    ready: impl Fn() -> Result<Option<String>, String> + Send + Sync + 'static,
) -> Readiness {
    let draining = shutdown.drain.clone();
    Arc::new(move || if draining.is_cancelled() { Err("draining".to_owned()) } else { ready() })
}

/// Serves until `stop`. At the limit the oldest connection is closed for the new one: whoever opens connections and says nothing
/// must not keep a probe waiting.
pub async fn serve(listener: TcpListener, metrics: Arc<Metrics>, ready: Readiness, stop: CancellationToken) {
    let mut connections = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::error!(%error, "cannot accept a connection to the ops port");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        if connections.len() >= MAX_CONNECTIONS {
            connections.retain(|connection: &AbortOnDropHandle<()>| !connection.is_finished());
        }
        if connections.len() >= MAX_CONNECTIONS {
            connections.pop_front();
        }
        let (metrics, ready, stop) = (Arc::clone(&metrics), Arc::clone(&ready), stop.clone());
        connections.push_back(AbortOnDropHandle::new(tokio::spawn(async move {
            let service = service_fn(|request| {
                let answer = answer(&request, &metrics, &ready);
                async { Ok::<_, Infallible>(answer) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // A scraper that goes away is no news.
                ended = connection => drop(ended),
                () = stop.cancelled() => {}
            }
        })));
    }
}

fn answer(request: &Request<Incoming>, metrics: &Metrics, ready: &Readiness) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    match request.uri().path() {
        "/metrics" => match metrics.render() {
            Ok(rendered) => {
                let mut response = text(StatusCode::OK, rendered);
                response.headers_mut().insert(CONTENT_TYPE, METRICS_FORMAT);
                response
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        "/healthz" => text(StatusCode::OK, "ok\n"),
        "/readyz" => match ready() {
            Ok(None) => text(StatusCode::OK, "ready\n"),
            Ok(Some(but)) => text(StatusCode::OK, format!("ready, but {but}\n")),
            Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        },
        _ => text(StatusCode::NOT_FOUND, "here are /metrics, /healthz and /readyz\n"),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
