//! A service that events are forwarded to: it records requests and answers them as the test says.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, body::Incoming, header::HeaderMap};
use hyper_util::rt::TokioIo;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

#[derive(Clone, Debug)]
pub struct Received {
    pub method: Method,
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// The client's side of the connection: distinguishes connections.
    pub from: SocketAddr,
    pub began: Instant,
    pub ended: Instant,
    /// The status of the answer; 0 before it.
    pub status: u16,
}

impl Received {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

type Reply = dyn Fn(&Received) -> Response<Full<Bytes>> + Send + Sync;

/// Serves until it is dropped.
#[derive(Debug)]
pub struct Receiver {
    pub address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
    _server: AbortOnDropHandle<()>,
}

impl Receiver {
    pub async fn start(reply: impl Fn(&Received) -> Response<Full<Bytes>> + Send + Sync + 'static) -> Receiver {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let (reply, log): (Arc<Reply>, _) = (Arc::new(reply), Arc::clone(&received));
        let server = tokio::spawn(async move {
            loop {
                let (stream, from) = listener.accept().await.unwrap();
                let (reply, log) = (Arc::clone(&reply), Arc::clone(&log));
                let service = service_fn(move |request| answer(request, from, Arc::clone(&reply), Arc::clone(&log)));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Receiver { address, received, _server: AbortOnDropHandle::new(server) }
    }

    /// Answers 200 to everything.
    pub async fn willing() -> Receiver {
        Receiver::start(|_| Response::default()).await
    }

    /// Answers 200 to everything, once the gate is open.
    pub async fn gated() -> (Receiver, Gate) {
        let gate = Gate::default();
        let closed = gate.clone();
        let receiver = Receiver::start(move |_| {
            closed.wait();
            Response::default()
        });
        (receiver.await, gate)
    }

    pub fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    /// A route that forwards everything here.
    pub fn route(&self) -> String {
        format!("[[worker.routes]]\nname = \"app\"\nevents = [\"*\"]\nforward = {{ url = \"{}\" }}", self.url())
    }

    pub fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    /// Deliveries beyond the first of each id, counted in one snapshot.
    pub fn repeats(&self) -> usize {
        let received = self.received();
        received.len() - received.iter().map(|one| one.header("x-webhook-id")).collect::<HashSet<_>>().len()
    }

    pub fn ids(&self) -> HashSet<String> {
        self.received.lock().unwrap().iter().map(|one| one.header("x-webhook-id").to_owned()).collect()
    }
}

async fn answer(
    request: Request<Incoming>,
    from: SocketAddr,
    reply: Arc<Reply>,
    log: Arc<Mutex<Vec<Received>>>,
) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let path = parts.uri.path_and_query().unwrap().to_string();
    let began = Instant::now();
    let mut received =
        Received { method: parts.method, path, headers: parts.headers, body, from, began, ended: began, status: 0 };
    // On a thread of its own: a reply may wait for the test's gate.
    let request = received.clone();
    let response = tokio::task::spawn_blocking(move || reply(&request)).await.unwrap();
    (received.ended, received.status) = (Instant::now(), response.status().as_u16());
    log.lock().unwrap().push(received);
    Ok(response)
}

/// Replies wait at it until it is opened.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    pub fn wait(&self) {
        // Bounded, or a test that fails before it opens the gate would never end.
        drop(self.0.1.wait_timeout_while(self.0.0.lock().unwrap(), 2 * super::PATIENCE, |open| !*open).unwrap());
    }
}

/// An answer with this status and these headers.
pub fn reply(status: u16, headers: &[(&'static str, &str)]) -> Response<Full<Bytes>> {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(Full::from("a text of the service's own")).unwrap()
}
