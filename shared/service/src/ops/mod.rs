//! The operator's port, which is never the public one. Each page is a file here.

mod health;
mod metrics;
mod readiness;

pub use readiness::{Readiness, all, unless_draining};

use crate::metrics::Metrics;
use bytes::Bytes;
use health::HealthPage;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics::MetricsPage;
use readiness::ReadyPage;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Enough for a scraper and a few probes; beyond it the oldest connection is closed.
const MAX_CONNECTIONS: usize = 64;
/// Also the longest that a probe's connection may be idle.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Wait after an `accept` that failed for lack of file descriptors: others must be closed first.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// A page of this port, with its path.
pub trait Page: Send + Sync + 'static {
    /// Its path, like `/metrics`.
    fn path(&self) -> &'static str;
    /// The answer to GET; that to HEAD is the same without its body.
    fn answer<'a>(&'a self, request: &'a Parts) -> Answering<'a>;
}

pub type Answering<'a> = Pin<Box<dyn Future<Output = Response<Full<Bytes>>> + Send + 'a>>;

/// The pages of every service.
pub fn pages(metrics: Arc<Metrics>, readiness: Readiness) -> Vec<Box<dyn Page>> {
    vec![Box::new(MetricsPage(metrics)), Box::new(HealthPage), Box::new(ReadyPage(readiness))]
}

/// Serves until `stop`. At the limit the oldest connection is closed for the new one: a client that opens connections
/// and sends nothing must not keep a probe waiting.
pub async fn serve(listener: TcpListener, pages: Vec<Box<dyn Page>>, stop: CancellationToken) {
    let pages: Arc<[Box<dyn Page>]> = pages.into();
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
        let (pages, stop) = (Arc::clone(&pages), stop.clone());
        connections.push_back(AbortOnDropHandle::new(tokio::spawn(async move {
            let service = service_fn(|request| {
                let pages = Arc::clone(&pages);
                async move { Ok::<_, Infallible>(answer(&pages, &request.into_parts().0).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // A scraper that disconnects is not worth a line.
                ended = connection => drop(ended),
                () = stop.cancelled() => {}
            }
        })));
    }
}

async fn answer(pages: &[Box<dyn Page>], request: &Parts) -> Response<Full<Bytes>> {
    if !matches!(request.method, Method::GET | Method::HEAD) {
        let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    match pages.iter().find(|page| page.path() == request.uri.path()) {
        Some(page) => page.answer(request).await,
        None => {
            let paths: Vec<_> = pages.iter().map(|page| page.path()).collect();
            text(StatusCode::NOT_FOUND, format!("pages: {}\n", paths.join(", ")))
        }
    }
}

pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
