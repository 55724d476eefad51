//! RabbitMQ and Redis, and a gateway's spool: for separate services that scale horizontally.

pub(super) mod limits;
mod prefetch;
mod reloaded;

use super::{GatewayParts, WorkerParts};
use crate::reload::Part;
use crate::wiring;
use arc_swap::ArcSwap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::ports::{Deliveries, Enqueue, Lifecycle, RouteRecords, Spool};
use streamgate_gateway::{Deduplicated, SpoolPolicy, Spooled};
use streamgate_service::config::reader::Problem;
use streamgate_service::config::{self, Config, ConfigError, Loaded, Source};
use streamgate_service::metrics::{IntGaugeVec, Metrics};
use streamgate_store::rabbitmq::{CallQueue, Caller, Consumer, Endpoint, EndpointError, Exchange, Topology};
use streamgate_store::redis::{
    Address, AddressError, Redis, RedisAnswers, RedisClaims, RedisInstances, RedisRoutes, SeenKeys,
};
use streamgate_store::sqlite::{OpenError, SpoolFile, SpoolOptions};
use streamgate_worker::Router;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// How long a stop waits for Redis to take the last marks of seen events.
const MARKS: Duration = Duration::from_secs(2);

pub type Gateway =
    GatewayParts<Deduplicated<Spooled<Exchange, SpoolFile>, SeenKeys>, Caller, RedisAnswers, GatewaySide>;
pub type Worker = WorkerParts<Consumer, RedisClaims, CallQueue, RedisRoutes, WorkerSide>;

/// Loads a configuration for `gateway` and `worker`.
pub fn load(source: &Source) -> Result<Loaded, ConfigError> {
    config::load(source, super::problems).and_then(for_services)
}

/// A configuration for `gateway` and `worker`, which work on RabbitMQ whatever it names.
pub fn for_services(loaded: Loaded) -> Result<Loaded, ConfigError> {
    let loaded = loaded.for_services()?;
    loaded.fail_if_any(limits::problems(&loaded.config))?;
    Ok(loaded)
}

/// RabbitMQ and Redis as configured, not connected yet.
#[derive(Debug)]
pub struct Servers {
    pub endpoint: Endpoint,
    pub topology: Topology,
    pub address: Address,
}

impl Servers {
    /// Reads the URLs and the files that they need.
    pub fn of(loaded: &Loaded) -> Result<Servers, ConfigError> {
        let (endpoint, address) = (endpoint(&loaded.config), address(&loaded.config));
        let problem = |key: &str, what: String| Problem::new(key, what);
        match (endpoint, address) {
            (Ok(endpoint), Ok(address)) => Ok(Servers { endpoint, topology: topology(&loaded.config), address }),
            (endpoint, address) => {
                let endpoint = endpoint.err().map(|error| problem("rabbitmq.url", error.to_string()));
                let address = address.err().map(|error| problem("redis.url", error.to_string()));
                Err(loaded.error_of(endpoint.into_iter().chain(address).collect()))
            }
        }
    }
}

/// RabbitMQ's address and credentials.
pub fn endpoint(config: &Config) -> Result<Endpoint, EndpointError> {
    let rabbitmq = &config.rabbitmq;
    let identity = rabbitmq.identity.as_ref().map(|(cert, key)| (cert.as_path(), key.as_path()));
    Endpoint::parse(rabbitmq.url.expose(), rabbitmq.ca.as_deref(), identity)
}

/// The exchanges and queues that a gateway needs.
pub fn topology(config: &Config) -> Topology {
    let rabbitmq = &config.rabbitmq;
    Topology::new(&rabbitmq.prefix, rabbitmq.events_max as u64, rabbitmq.declare)
}

/// Redis's address and credentials.
pub fn address(config: &Config) -> Result<Address, AddressError> {
    Address::parse(config.redis.url.expose(), config.redis.ca.as_deref())
}

pub fn spool_options(config: &Config) -> SpoolOptions {
    SpoolOptions {
        data_dir: config.store.data_dir.clone(),
        max_bytes: config.store.spool_max as u64,
        seen_window: config.dedup.window,
        // In addition to writes of requests: those of the hand-over and of late confirms.
        max_waiting: config.gateway.max_in_flight,
    }
}

/// The queue, with the disk as its fallback.
pub fn spooled(
    config: &Config,
    exchange: &Arc<Exchange>,
    spool: &Arc<SpoolFile>,
    metrics: &Arc<Metrics>,
) -> Spooled<Exchange, SpoolFile> {
    let policy =
        SpoolPolicy { spool_after: config.rabbitmq.spool_after, confirm_timeout: config.rabbitmq.confirm_timeout };
    Spooled::new(Arc::clone(exchange), Arc::clone(spool), policy, Arc::clone(metrics))
}

/// The running backend of a gateway.
#[derive(Debug)]
pub struct GatewaySide {
    endpoint: Endpoint,
    redis: Redis,
    exchange: Arc<Exchange>,
    spool: Arc<SpoolFile>,
    spooled: Arc<Spooled<Exchange, SpoolFile>>,
    seen: Arc<SeenKeys>,
    calls: Arc<Caller>,
    metrics: Arc<Metrics>,
    /// The workers' waits between attempts.
    ladder: Vec<Duration>,
    data_dir: PathBuf,
    stopping: CancellationToken,
    /// The hand-over from the spool to RabbitMQ. `None` before it begins, and after the stop.
    handing_over: Mutex<Option<AbortOnDropHandle<()>>>,
}

/// Takes the data directory, and starts to connect to both servers. Call within a tokio runtime.
pub fn gateway(config: &Config, servers: Servers, metrics: &Arc<Metrics>) -> Result<Gateway, OpenError> {
    let Servers { endpoint, topology, address } = servers;
    let spool = Arc::new(SpoolFile::open(&spool_options(config))?);
    let redis = Redis::start(address, &config.redis.prefix, config.redis.timeout);
    let counted = Arc::clone(metrics);
    let on_lost = Arc::new(move |lost| counted.gateway_dedup_errors.inc_by(lost));
    let seen = Arc::new(SeenKeys::start(redis.clone(), config.dedup.window, on_lost));
    let counted = Arc::clone(metrics);
    let on_return: Arc<dyn Fn() + Send + Sync> = Arc::new(move || counted.gateway_returned.inc());
    let counted = Arc::clone(metrics);
    let on_late = Arc::new(move || counted.hook_late_answers.inc());
    let calls = Arc::new(Caller::start(endpoint.clone(), topology.clone(), on_late));
    let answers = Arc::new(RedisAnswers::new(redis.clone()));
    let exchange = Arc::new(Exchange::start(endpoint.clone(), topology, config.gateway.max_in_flight, &on_return));
    let spooled = Arc::new(spooled(config, &exchange, &spool, metrics));
    let lifecycle = Arc::new(GatewaySide {
        endpoint,
        redis,
        exchange,
        spool,
        spooled: Arc::clone(&spooled),
        seen: Arc::clone(&seen),
        calls: Arc::clone(&calls),
        metrics: Arc::clone(metrics),
        ladder: config.worker.retry_steps(),
        data_dir: config.store.data_dir.clone(),
        stopping: CancellationToken::new(),
        handing_over: Mutex::default(),
    });
    let enqueue = Arc::new(Deduplicated::new(spooled, seen, Arc::clone(metrics)));
    Ok(GatewayParts { enqueue, calls, answers, lifecycle })
}

impl GatewaySide {
    fn handing_over(&self) -> MutexGuard<'_, Option<AbortOnDropHandle<()>>> {
        self.handing_over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The parts that are reloaded with the configuration.
    pub fn reloaded(&self) -> [Box<dyn Part>; 2] {
        reloaded::parts(self.endpoint.clone(), self.redis.clone())
    }
}

impl Lifecycle for GatewaySide {
    type Instances = RedisInstances;

    fn instances(&self) -> Arc<RedisInstances> {
        Arc::new(RedisInstances::new(self.redis.clone()))
    }

    fn ready(&self) -> Result<Option<String>, String> {
        // While RabbitMQ is down, events go to the spool, wherever they went before.
        if let (Ok(()), Some(why)) = (self.exchange.ready(), self.exchange.diverted()) {
            return Err(why.to_string());
        }
        self.spooled.ready().map_err(|error| error.to_string())?;
        Ok(self.exchange.ready().err().map(|why| format!("events go to the spool: {why}")))
    }

    /// Also hands the spool over, until the stop; it must not begin before the service has started.
    async fn watch(&self) {
        if !self.stopping.is_cancelled() {
            let (spooled, stopping) = (Arc::clone(&self.spooled), self.stopping.clone());
            let handing_over = tokio::spawn(async move { spooled.hand_over(&stopping).await });
            self.handing_over().replace(AbortOnDropHandle::new(handing_over));
        }
        let metrics = &self.metrics;
        let depth = |queue, messages: u32| metrics.queue_messages.with_label_values(&[queue]).set(messages.into());
        tokio::join!(
            self.exchange.watch_up(show(&metrics.gateway_broker_up)),
            self.exchange.watch_queues(&self.ladder, depth),
            self.calls.watch_workers(show(&metrics.gateway_hook_workers)),
            self.redis.watch_up(show(&metrics.gateway_redis_up)),
        );
    }

    /// Hands over what is in the spool.
    async fn stop(&self, by: Instant) {
        self.stopping.cancel();
        let handing_over = self.handing_over().take();
        if let Some(handing_over) = handing_over {
            drop(tokio::time::timeout_at(by.into(), handing_over).await);
        }
    }

    async fn close(&self) {
        drop(self.handing_over().take());
        self.spooled.settle().await;
        self.spooled.give_up();
        let left = self.spool.usage().events;
        if left > 0 {
            tracing::warn!(
                events = left, data_dir = %self.data_dir.display(),
                "events are left in the spool: the next gateway on this directory hands them over, or `streamgate drain`"
            );
        }
        // A lost mark costs a repeat at worst.
        let marks = tokio::time::timeout(MARKS, self.seen.close());
        drop(tokio::join!(marks, self.exchange.close(), self.calls.close()));
        // A connection may outlive the drain: what it was promised is committed by now, and it is promised nothing
        // more.
        self.spool.close().await;
    }
}

/// The running backend of a worker.
#[derive(Debug)]
pub struct WorkerSide {
    endpoint: Endpoint,
    topology: Topology,
    redis: Redis,
    records: Arc<RedisRoutes>,
    router: Arc<ArcSwap<Router>>,
    consumer: Arc<Consumer>,
    calls: Option<Arc<CallQueue>>,
    metrics: Arc<Metrics>,
}

/// Starts to connect to both servers. `answers`: whether there are hook handlers; without any, gateways find no worker
/// for hooks. Call within a tokio runtime.
pub fn worker(
    config: &Config,
    servers: Servers,
    router: &Arc<ArcSwap<Router>>,
    answers: bool,
    metrics: &Arc<Metrics>,
) -> Worker {
    let Servers { endpoint, topology, address } = servers;
    let redis = Redis::start(address, &config.redis.prefix, config.redis.timeout);
    let claims = Arc::new(RedisClaims::new(redis.clone(), config.worker.claim_window));
    let records = Arc::new(RedisRoutes::new(redis.clone()));
    let topology = topology.with_steps(&config.worker.retry_steps());
    let topology = topology.with_parked(&router.load().names(), config.rabbitmq.parked_max as u64);
    let limits = wiring::limits(config, &router.load());
    let prefetch = prefetch::prefetch(wiring::in_hand(config, &limits), &limits);
    let counted = Arc::clone(metrics);
    let on_return: Arc<dyn Fn() + Send + Sync> = Arc::new(move || counted.worker_returned.inc());
    let consumer = Arc::new(Consumer::connect(&endpoint, &topology, prefetch, &on_return));
    let concurrency = u16::try_from(config.hooks.concurrency).unwrap_or(u16::MAX);
    let calls = answers.then(|| Arc::new(CallQueue::start(&endpoint, &topology, concurrency)));
    let lifecycle = Arc::new(WorkerSide {
        endpoint,
        topology,
        redis,
        records: Arc::clone(&records),
        router: Arc::clone(router),
        consumer: Arc::clone(&consumer),
        calls: calls.clone(),
        metrics: Arc::clone(metrics),
    });
    WorkerParts {
        deliveries: consumer,
        prefetch: usize::from(prefetch.fresh),
        longest_wait: Some(prefetch::LONGEST_WAIT),
        claims,
        records,
        calls,
        lifecycle,
    }
}

impl WorkerSide {
    /// The parts that are reloaded with the configuration.
    pub fn reloaded(&self) -> [Box<dyn Part>; 2] {
        reloaded::parts(self.endpoint.clone(), self.redis.clone())
    }
}

/// Interval between searches for events that are parked for removed routes; and the shorter one while Redis or RabbitMQ
/// does not answer.
const ORPHANS: Duration = Duration::from_secs(60 * 60);
const ORPHANS_AGAIN: Duration = Duration::from_secs(5);

impl WorkerSide {
    /// Logs removed routes that have parked events. AMQP lists no queues, but Redis has the names of all routes that
    /// ever had a worker. Never returns.
    async fn look_for_orphans(&self) {
        loop {
            let wait = match self.orphans().await {
                Ok(orphans) => {
                    orphans.iter().for_each(|(route, events)| super::log_orphan(route, *events));
                    ORPHANS
                }
                Err(why) => {
                    tracing::debug!(why, "cannot look for events of removed routes");
                    ORPHANS_AGAIN
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    async fn orphans(&self) -> Result<Vec<(String, u64)>, String> {
        let records = self.records.read().await.map_err(|error| error.to_string())?;
        let router = self.router.load_full();
        let gone: Vec<_> = records.into_keys().filter(|name| !router.names().contains(&name.as_str())).collect();
        if gone.is_empty() {
            return Ok(Vec::new());
        }
        let parked = streamgate_store::rabbitmq::parked(&self.endpoint, &self.topology, &gone).await?;
        Ok(parked.into_iter().filter(|(_, events)| *events > 0).collect())
    }
}

impl Lifecycle for WorkerSide {
    type Instances = RedisInstances;

    fn instances(&self) -> Arc<RedisInstances> {
        Arc::new(RedisInstances::new(self.redis.clone()))
    }

    fn ready(&self) -> Result<Option<String>, String> {
        self.consumer.ready().map(|()| None).map_err(|error| error.to_string())
    }

    async fn watch(&self) {
        let metrics = &self.metrics;
        let parked = |route: &str, events: u32| {
            metrics.worker_parked_events.with_label_values(&[route]).set(events.into());
        };
        tokio::join!(
            self.consumer.watch_up(show(&metrics.worker_broker_up)),
            self.consumer.watch_parked(parked),
            self.look_for_orphans(),
            self.redis.watch_up(show(&metrics.worker_redis_up)),
        );
    }

    /// Does not wait for deliveries in hand.
    async fn stop(&self, by: Instant) {
        let calls = async {
            if let Some(calls) = &self.calls {
                calls.stop().await;
            }
        };
        let stop = async { tokio::join!(self.consumer.stop(), calls) };
        drop(tokio::time::timeout_at(by.into(), stop).await);
    }

    async fn close(&self) {
        let calls = async {
            if let Some(calls) = &self.calls {
                calls.close().await;
            }
        };
        tokio::join!(self.consumer.close(), calls);
    }
}

/// Sets a gauge at each change of a state.
fn show(gauge: &IntGaugeVec) -> impl Fn(bool) + Send + '_ {
    |up| gauge.with_label_values(&[] as &[&str]).set(up.into())
}
