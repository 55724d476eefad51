//! A stack: gateway and worker over some store, in this process, for the behaviours that every store must show.

use super::eventually;
use super::process::{Setup, Site};
use super::servers::Backends;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use streamgate::{
    BoxFuture, Context, Event, Handler, HandlerError, Hooks, Metrics, Pattern, Route, Router, Shutdown, backends,
    gateway, up, wiring, worker,
};
use streamgate_core::dead_letter::{DeadLetter, DeadLetterId};
use streamgate_core::ports::DeadLetters;
use streamgate_service::config::{self, Environment, Source};
use streamgate_store::rabbitmq::DeadLetterQueue;
use streamgate_store::sqlite::DeadLetterBox;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinHandle;

/// What the behaviour suite needs of a store's stack. State that outlives a stack is in its [`Site`].
pub trait Stack: Sized {
    fn start(site: &Site, setup: &Setup, router: Router) -> impl Future<Output = Self> {
        Self::with_hooks(site, setup, router, Hooks::default())
    }
    /// With handlers of hooks in addition to those of the setup.
    fn with_hooks(site: &Site, setup: &Setup, router: Router, hooks: Hooks) -> impl Future<Output = Self>;
    fn public(&self) -> SocketAddr;
    fn metrics(&self) -> &Metrics;
    /// As SIGTERM does; returns when everything has ended.
    fn drain(self) -> impl Future<Output = ()>;
    fn shutdown(&self) -> &Shutdown;
    /// As a second SIGTERM does.
    fn abort(self) -> impl Future<Output = ()> {
        self.shutdown().abort.cancel();
        self.drain()
    }
    fn dead_letters(site: &Site) -> impl Future<Output = Vec<DeadLetter>>;
    fn replay(site: &Site, dead_letters: Vec<DeadLetterId>) -> impl Future<Output = usize>;
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
    async fn with_hooks(site: &Site, setup: &Setup, router: Router, hooks: Hooks) -> Embedded {
        site.configure(setup);
        let source = Source { file: Some(site.config()), environment: Environment::default() };
        let config = config::load(&source, backends::problems).unwrap().config;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ops_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let public = listener.local_addr().unwrap();
        let (metrics, reload) = (Metrics::new(), Arc::new(Notify::new()));
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let shutdown = Shutdown::new();
        let as_loaded = config.clone();
        let hooks = wiring::hooks(&config, hooks).unwrap();
        let (source, counted) = (Some(source), Arc::clone(&metrics));
        let parts =
            up::Up { config, router, hooks, code: None, listener, ops_listener, source, reload, metrics: counted };
        let stop = shutdown.clone();
        let task = tokio::spawn(async move {
            let on_ready = || {
                ready.send(()).unwrap();
            };
            up::run(parts, as_loaded, stop, on_ready).await.unwrap();
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

    fn shutdown(&self) -> &Shutdown {
        &self.shutdown
    }

    async fn dead_letters(site: &Site) -> Vec<DeadLetter> {
        DeadLetterBox::open(&site.data_dir()).unwrap().page(None, 1000).await.unwrap().dead_letters
    }

    async fn replay(site: &Site, dead_letters: Vec<DeadLetterId>) -> usize {
        DeadLetterBox::open(&site.data_dir()).unwrap().replay(dead_letters).await.count
    }
}

/// `streamgate gateway` and `streamgate worker` on RabbitMQ and Redis.
#[derive(Debug)]
pub struct Services {
    public: SocketAddr,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    tasks: Vec<JoinHandle<()>>,
}

impl Services {
    /// Drops the worker's task, as a program may that goes on without it: no part of the worker is asked to stop.
    pub async fn abandon_worker(&mut self) {
        let worker = self.tasks.pop().unwrap();
        worker.abort();
        assert!(worker.await.unwrap_err().is_cancelled());
    }

    async fn load(site: &Site, setup: &Setup) -> (config::Loaded, Source) {
        let servers = Backends::shared().await;
        site.configure(&Setup { rest: format!("{}{}", setup.rest, servers.tables(&site.name())), ..setup.clone() });
        let source = Source { file: Some(site.config()), environment: Environment::default() };
        (backends::rabbitmq::for_services(config::load(&source, backends::problems).unwrap()).unwrap(), source)
    }

    async fn dead_letter_queue(site: &Site) -> DeadLetterQueue {
        let (loaded, _) = Services::load(site, &Setup::default()).await;
        let found = backends::rabbitmq::Servers::of(&loaded).unwrap();
        DeadLetterQueue::dead(found.endpoint, &found.topology)
    }
}

impl Stack for Services {
    async fn with_hooks(site: &Site, setup: &Setup, router: Router, hooks: Hooks) -> Services {
        let (loaded, source) = Services::load(site, setup).await;
        let [listener, gateway_ops, worker_ops] = [
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
        ];
        let public = listener.local_addr().unwrap();
        let (metrics, shutdown) = (Metrics::new(), Shutdown::new());
        let front = gateway::GatewayInputs {
            loaded: loaded.clone(),
            listener,
            ops_listener: gateway_ops,
            source,
            reload: Arc::new(Notify::new()),
            metrics: Arc::clone(&metrics),
        };
        let hooks = wiring::hooks(&loaded.config, hooks).unwrap();
        let answers = !hooks.is_empty();
        let back = worker::WorkerInputs {
            loaded,
            router,
            hooks,
            reload: None,
            ops_listener: worker_ops,
            metrics: Arc::clone(&metrics),
        };
        let (front_stop, back_stop) = (shutdown.clone(), shutdown.clone());
        let tasks = vec![
            tokio::spawn(async move { gateway::run(front, front_stop, || ()).await.unwrap() }),
            tokio::spawn(async move { worker::run(back, back_stop, || ()).await.unwrap() }),
        ];
        let up = [
            &metrics.gateway_broker_up,
            &metrics.gateway_redis_up,
            &metrics.worker_broker_up,
            &metrics.worker_redis_up,
        ];
        eventually("the backends are up", || async {
            up.iter().all(|gauge| gauge.with_label_values(&[] as &[&str]).get() == 1)
        })
        .await;
        let workers = metrics.gateway_hook_workers.with_label_values(&[] as &[&str]);
        eventually("the gateway sees the workers that answer hooks", || async { workers.get() == i64::from(answers) })
            .await;
        Services { public, metrics, shutdown, tasks }
    }

    fn public(&self) -> SocketAddr {
        self.public
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    async fn drain(self) {
        self.shutdown.drain.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
    }

    fn shutdown(&self) -> &Shutdown {
        &self.shutdown
    }

    async fn dead_letters(site: &Site) -> Vec<DeadLetter> {
        let queue = Services::dead_letter_queue(site).await;
        let dead_letters = queue.page(None, 1000).await.unwrap().dead_letters;
        queue.close().await.unwrap();
        dead_letters
    }

    async fn replay(site: &Site, dead_letters: Vec<DeadLetterId>) -> usize {
        let queue = Services::dead_letter_queue(site).await;
        let replayed = queue.replay(dead_letters).await.count;
        queue.close().await.unwrap();
        replayed
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

/// A handler that does as its script says and reports each call.
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
        let (calls, received) = mpsc::unbounded_channel();
        let running = Arc::new(AtomicUsize::new(0));
        let handler = Scripted { script: Box::new(script), calls, running: Arc::clone(&running) };
        let events = vec![Pattern::parse("*").unwrap()];
        let route = Route::new("app", events, Arc::new(handler));
        Script { calls: received, router: Router::new(vec![route]), running }
    }

    pub fn willing() -> Script {
        Script::new(|_| Act::Succeed)
    }

    pub async fn next(&mut self) -> Call {
        let waited = tokio::time::timeout(super::PATIENCE, self.calls.recv()).await;
        waited.expect("a delivery arrives").expect("the handler lives")
    }

    /// All calls so far that `next` has not returned.
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
                Act::Await(permits) => {
                    permits.acquire().await.unwrap().forget();
                    Ok(())
                }
            };
            running.fetch_sub(1, Ordering::SeqCst);
            result
        })
    }
}
