//! The client for the services that events and hooks are forwarded to. If a connection that existed before breaks, that
//! says nothing about the service: the call is made once more, on a new one.

use super::failure::CallFailure;
use super::transport::{Usage, Watching};
use super::{ClientError, connector, roots_with, system_roots, tcp, trusting};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, Uri, body::Incoming};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{CaptureConnection, HttpConnector, capture_connection};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use std::error::Error;
use std::time::{Duration, Instant};
use tower_service::Service;

/// How long an idle connection is kept. Servers close theirs after 2 s (gunicorn), 5 s (uvicorn, Apache) or 5 to 6 s
/// (Node): below the least of these, a request seldom meets a connection that is just being closed.
const MAX_IDLE: Duration = Duration::from_millis(1500);
/// Oldest age of a connection, however busy: a service whose address has changed is found by then.
const MAX_AGE: Duration = Duration::from_secs(30);
/// Node's clients accept this many headers of a response; the HTTP library's own limit is 100.
const MAX_HEADERS: usize = 2000;

type Pool = Client<Watching<HttpsConnector<HttpConnector>>, Full<Bytes>>;

/// Calls services over HTTP/1.1. Clones share their connections.
#[derive(Clone, Debug)]
pub struct ServiceClient {
    pooled: Pool,
    /// Opens a connection for each request.
    unpooled: Pool,
    connector: HttpsConnector<HttpConnector>,
    longest: Duration,
}

impl ServiceClient {
    /// `authorities`: PEM certificates of authorities to trust in addition to the system's.
    pub fn new(authorities: Option<&str>) -> Result<ServiceClient, ClientError> {
        let roots = match authorities {
            Some(pem) => roots_with(pem.as_bytes())?,
            None => system_roots(),
        };
        let connector = connector(trusting(roots)?, tcp());
        let mut builder = Client::builder(TokioExecutor::new());
        builder
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(MAX_IDLE)
            // Go's and Node's clients accept these too.
            .http1_allow_obsolete_multiline_headers_in_responses(true)
            .http1_allow_spaces_after_header_name_in_responses(true)
            .http1_ignore_invalid_headers_in_responses(true)
            .http1_max_headers(MAX_HEADERS);
        let pooled = builder.build(Watching(connector.clone()));
        let unpooled = builder.pool_max_idle_per_host(0).build(Watching(connector.clone()));
        Ok(ServiceClient { pooled, unpooled, connector, longest: MAX_AGE })
    }

    /// Sends the request, and sends it once more if the failure was the fault of a reused connection and not of the
    /// service. `within`: the time until the head of the reply.
    pub async fn call(
        &self,
        within: Duration,
        request: impl Fn() -> Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, CallFailure> {
        let (mut first, began) = (request(), Instant::now());
        let url = first.uri().clone();
        let connection = capture_connection(&mut first);
        let calls = async {
            let error = match self.pooled.request(first).await {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            let is_stale = usage(&error).is_some_and(|usage| usage.failed_before_a_reply(began));
            if is_stale || is_unsent(&error) { self.unpooled.request(request()).await } else { Err(error) }
        };
        match tokio::time::timeout(within, calls).await {
            Ok(Ok(response)) => {
                self.retire(&response, &connection);
                Ok(response)
            }
            Ok(Err(error)) => {
                let was_heard = usage(&error).is_some_and(|usage| !usage.is_silent());
                Err(CallFailure::of(&url, is_unsent(&error), error.is_connect(), was_heard, &error))
            }
            Err(_) => Err(CallFailure::timeout(&url, within, connection.connection_metadata().is_some())),
        }
    }

    /// Opens a connection to this URL's host, including TLS, and closes it without a request.
    pub async fn try_connection(&self, url: &Uri, within: Duration) -> Result<(), CallFailure> {
        let mut connector = self.connector.clone();
        match tokio::time::timeout(within, connector.call(url.clone())).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(CallFailure::of(url, false, true, false, &*error)),
            Err(_) => Err(CallFailure::timeout(url, within, false)),
        }
    }

    /// Keeps a connection that is too old from being used again.
    fn retire(&self, response: &Response<Incoming>, connection: &CaptureConnection) {
        let is_old = response.extensions().get::<Usage>().is_some_and(|usage| usage.age() > self.longest);
        if is_old && let Some(connection) = &*connection.connection_metadata() {
            connection.poison();
        }
    }
}

/// How the connection of a failed call was used.
fn usage(error: &super::CallError) -> Option<Usage> {
    let mut extras = hyper::http::Extensions::new();
    error.connect_info()?.get_extras(&mut extras);
    extras.remove()
}

/// Whether the connection ended before anything of the request was written.
fn is_unsent(error: &super::CallError) -> bool {
    let http = error.source().and_then(|source| source.downcast_ref::<hyper::Error>());
    http.is_some_and(hyper::Error::is_canceled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A service that keeps its connections open, and the number of connections that it accepted.
    async fn service() -> (Uri, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        let taken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&taken);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    let mut bytes = Vec::new();
                    while matches!(stream.read_buf(&mut bytes).await, Ok(1..)) {
                        if bytes.ends_with(b"\r\n\r\n") {
                            bytes.clear();
                            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
                        }
                    }
                });
            }
        });
        (url, taken)
    }

    #[tokio::test]
    async fn a_connection_is_used_again_until_it_is_too_old() {
        let client = ServiceClient::new(None).unwrap();
        let old = ServiceClient { longest: Duration::ZERO, ..client.clone() };
        for (client, connections) in [(client, 1), (old, 3)] {
            let (url, taken) = service().await;
            for _ in 0..3 {
                let request = || {
                    let mut request = Request::new(Full::default());
                    *request.uri_mut() = url.clone();
                    request
                };
                let reply = client.call(Duration::from_secs(60), request).await.unwrap();
                reply.into_body().collect().await.unwrap();
                // The pool takes the connection back in its own task.
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
            }
            assert_eq!(taken.load(Ordering::Relaxed), connections);
        }
    }
}
