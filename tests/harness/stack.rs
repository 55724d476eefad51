//! A stack: gateway and worker over some store, in this process, for the behaviours that every store must show.

use super::process::{Setup, Site};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use streamgate::{BoxFuture, Context, Event, Handler, HandlerError, Metrics, Pattern, Route, Router, Shutdown, up};
use streamgate_core::letter::Letter;
use streamgate_core::ports::Letters;
use streamgate_service::config::{self, Environment, Source};
use streamgate_store::sqlite::LetterBox;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinHandle;

/// What the behaviour suite needs of a store's stack. What outlives a stack is in its [`Site`].
pub trait Stack: Sized {
    fn start(site: &Site, setup: &Setup, router: Router) -> impl Future<Output = Self>;
    fn public(&self) -> SocketAddr;
    fn metrics(&self) -> &Metrics;
    /// As SIGTERM does; returns when everything has ended.
    fn drain(self) -> impl Future<Output = ()>;
    fn letters(site: &Site) -> impl Future<Output = Vec<Letter>>;
    fn replay(site: &Site, numbers: Vec<i64>) -> impl Future<Output = usize>;
}

/// `streamgate up` on the embedded store.
#[derive(Debug)]
pub struct Embedded {
    public: SocketAddr,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    task: JoinHandle<()>,
}

impl Stack for Embedded {
    async fn start(site: &Site, setup: &Setup, router: Router) -> Embedded {
        site.configure(setup);
        let source = Source { file: Some(site.config()), environment: Environment::default() };
        let config = config::load(&source).unwrap().config;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ops_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let public = listener.local_addr().unwrap();
        let (metrics, reload) = (Metrics::new(), Arc::new(Notify::new()));
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let shutdown = Shutdown::new();
        let as_loaded = config.clone();
        let parts = up::Up { config, router, listener, ops_listener, source, reload, metrics: Arc::clone(&metrics) };
        let stop = shutdown.clone();
        let task = tokio::spawn(async move {
            let told = || {
                ready.send(()).unwrap();
                Ok(())
            };
            up::run(parts, as_loaded, stop, told).await.unwrap();
        });
        is_ready.await.expect("the stack starts");
        Embedded { public, metrics, shutdown, task }
    }

    fn public(&self) -> SocketAddr {
        self.public
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    async fn drain(self) {
        self.shutdown.drain.cancel();
        self.task.await.unwrap();
    }

    async fn letters(site: &Site) -> Vec<Letter> {
        LetterBox::open(&site.data_dir()).unwrap().page(0, 1000).await.unwrap()
    }

    async fn replay(site: &Site, numbers: Vec<i64>) -> usize {
        let nonce = format!("nonce-{}", super::unique());
        LetterBox::open(&site.data_dir()).unwrap().replay(numbers, nonce).await.unwrap()
    }
}

/// What a scripted handler does with a delivery.
#[derive(Clone, Debug)]
pub enum Act {
    Succeed,
    Retry,
    Reject,
    Panic,
    /// Succeeds once it gets a permit, which it uses up.
    Await(Arc<Semaphore>),
}

/// One call of a handler.
#[derive(Clone, Debug)]
pub struct Call {
    pub id: String,
    pub key: String,
    pub event_type: String,
    pub attempt: u32,
    pub body: bytes::Bytes,
}

/// A handler that does as its script says, and tells of each call.
pub struct Scripted {
    script: Box<dyn Fn(&Call) -> Act + Send + Sync>,
    calls: mpsc::UnboundedSender<Call>,
    pub running: Arc<AtomicUsize>,
}

/// The calls of a scripted handler, and a router that leads everything to it.
pub struct Script {
    pub calls: mpsc::UnboundedReceiver<Call>,
    pub router: Router,
    /// Calls that have begun and not ended.
    pub running: Arc<AtomicUsize>,
}

impl Script {
    pub fn new(script: impl Fn(&Call) -> Act + Send + Sync + 'static) -> Script {
        let (calls, heard) = mpsc::unbounded_channel();
        let running = Arc::new(AtomicUsize::new(0));
        let handler = Scripted { script: Box::new(script), calls, running: Arc::clone(&running) };
        let events = vec![Pattern::parse("*").unwrap()];
        let route = Route { name: "app".into(), events, apps: Vec::new(), handler: Arc::new(handler) };
        Script { calls: heard, router: Router::new(vec![route]), running }
    }

    pub fn willing() -> Script {
        Script::new(|_| Act::Succeed)
    }

    pub async fn next(&mut self) -> Call {
        let waited = tokio::time::timeout(super::PATIENCE, self.calls.recv()).await;
        waited.expect("a delivery arrives").expect("the handler lives")
    }

    /// All calls so far that nobody asked for.
    pub fn rest(&mut self) -> Vec<Call> {
        std::iter::from_fn(|| self.calls.try_recv().ok()).collect()
    }
}

impl Handler for Scripted {
    fn handle(&self, event: Event, context: Context) -> BoxFuture<Result<(), HandlerError>> {
        let call = Call {
            id: event.id().to_owned(),
            key: event.key().to_owned(),
            event_type: event.event_type().unwrap_or_default(),
            attempt: context.attempt,
            body: event.body().clone(),
        };
        let act = (self.script)(&call);
        let running = Arc::clone(&self.running);
        running.fetch_add(1, Ordering::SeqCst);
        drop(self.calls.send(call));
        Box::pin(async move {
            let result = match act {
                Act::Succeed => Ok(()),
                Act::Retry => Err(HandlerError::retry("scripted to be tried again")),
                Act::Reject => Err(HandlerError::reject("scripted to be rejected")),
                Act::Panic => panic!("scripted to panic"),
                Act::Await(told) => {
                    told.acquire().await.unwrap().forget();
                    Ok(())
                }
            };
            running.fetch_sub(1, Ordering::SeqCst);
            result
        })
    }
}
