//! What `gateway` and `worker` work on: RabbitMQ, Redis, and a gateway's spool.

use std::sync::Arc;
use streamgate_gateway::{SpoolPolicy, Spooled};
use streamgate_service::config::reader::Problem;
use streamgate_service::config::{Config, ConfigError, Loaded};
use streamgate_service::metrics::Metrics;
use streamgate_store::rabbitmq::{CallQueue, Caller, Consumer, Endpoint, EndpointError, Exchange, Topology};
use streamgate_store::redis::{Address, AddressError, Redis, RedisAnswers, RedisClaims, SeenKeys};
use streamgate_store::sqlite::{OpenError, SpoolFile, SpoolOptions};

pub fn spool_options(config: &Config) -> SpoolOptions {
    SpoolOptions {
        data_dir: config.store.data_dir.clone(),
        max_bytes: config.store.spool_max as u64,
        seen_window: config.dedup.window,
        // Beside those of requests: the drain's, and confirms that come late.
        max_waiting: config.gateway.max_in_flight,
    }
}

/// RabbitMQ and Redis as the configuration names them, not yet connected.
#[derive(Debug)]
pub struct Backends {
    pub endpoint: Endpoint,
    pub topology: Topology,
    pub address: Address,
}

impl Backends {
    /// Reads the URLs and the files beside them.
    pub fn of(loaded: &Loaded) -> Result<Backends, ConfigError> {
        let rabbitmq = &loaded.config.rabbitmq;
        let (endpoint, address) = (endpoint(&loaded.config), address(&loaded.config));
        let problem = |key: &str, what: String| Problem::new(key, what);
        match (endpoint, address) {
            (Ok(endpoint), Ok(address)) => {
                let topology = Topology::new(&rabbitmq.prefix, rabbitmq.events_max as u64, rabbitmq.declare);
                Ok(Backends { endpoint, topology, address })
            }
            (endpoint, address) => {
                let endpoint = endpoint.err().map(|error| problem("rabbitmq.url", error.to_string()));
                let address = address.err().map(|error| problem("redis.url", error.to_string()));
                Err(loaded.wrongly(endpoint.into_iter().chain(address).collect()))
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

/// Redis's address and credentials.
pub fn address(config: &Config) -> Result<Address, AddressError> {
    Address::parse(config.redis.url.expose(), config.redis.ca.as_deref())
}

/// What a gateway works on.
#[derive(Debug)]
pub struct GatewayStores {
    pub exchange: Arc<Exchange>,
    pub spool: Arc<SpoolFile>,
    pub seen: Arc<SeenKeys>,
    pub calls: Arc<Caller>,
    pub answers: Arc<RedisAnswers>,
    pub redis: Redis,
}

impl GatewayStores {
    /// Takes the data directory, and starts to connect to both.
    pub fn start(config: &Config, backends: Backends, metrics: &Arc<Metrics>) -> Result<GatewayStores, OpenError> {
        let Backends { endpoint, topology, address } = backends;
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
        let exchange = Exchange::start(endpoint, topology, config.gateway.max_in_flight, &on_return);
        Ok(GatewayStores { exchange: Arc::new(exchange), spool, seen, calls, answers, redis })
    }
}

/// The queue, with the disk that stands in for it.
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

/// What a worker works on.
#[derive(Debug)]
pub struct WorkerStores {
    pub consumer: Arc<Consumer>,
    pub claims: Arc<RedisClaims>,
    /// None where nothing answers hooks: gateways then know that nobody is there.
    pub calls: Option<Arc<CallQueue>>,
    pub redis: Redis,
}

impl WorkerStores {
    /// Starts to connect to both. `answers`: whether there are handlers of hooks.
    pub fn start(config: &Config, backends: Backends, answers: bool, metrics: &Arc<Metrics>) -> WorkerStores {
        let Backends { endpoint, topology, address } = backends;
        let redis = Redis::start(address, &config.redis.prefix, config.redis.timeout);
        let claims = Arc::new(RedisClaims::new(redis.clone(), config.worker.claim_window));
        let topology = topology.with_steps(&config.worker.retry);
        let counted = Arc::clone(metrics);
        let on_return: Arc<dyn Fn() + Send + Sync> = Arc::new(move || counted.worker_returned.inc());
        let consumer = Consumer::connect(&endpoint, &topology, config.worker.broker_prefetch(), &on_return);
        let concurrency = u16::try_from(config.hooks.concurrency).unwrap_or(u16::MAX);
        let calls = answers.then(|| Arc::new(CallQueue::start(&endpoint, &topology, concurrency)));
        WorkerStores { consumer: Arc::new(consumer), claims, calls, redis }
    }
}
