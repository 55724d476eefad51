//! Where configuration becomes adapters: the one place that knows both services and the stores.

use anyhow::Context;
use std::path::Path;
use std::sync::Arc;
use streamgate_core::{pattern::Pattern, retry::Ladder};
use streamgate_service::config::reader::Problem;
use streamgate_service::config::{Config, ConfigError, Loaded};
use streamgate_service::http_client;
use streamgate_service::metrics::Metrics;
use streamgate_store::rabbitmq::{Consumer, Endpoint, Exchange, Topology};
use streamgate_store::redis::{Address, Redis, RedisClaims, SeenKeys};
use streamgate_store::sqlite;
use streamgate_worker::{Forward, Observe, Policy, Route, Router};

/// Writes that wait for a commit beside those of requests: settlements, at most one for each handler.
pub fn store_options(config: &Config) -> sqlite::Options {
    sqlite::Options {
        data_dir: config.store.data_dir.clone(),
        max_bytes: config.store.spool_max as u64,
        seen_window: config.dedup.window,
        remember: config.worker.claim_window,
        max_waiting: config.gateway.max_in_flight + config.worker.concurrency,
        prefetch: config.worker.prefetch.max(config.worker.concurrency),
        in_hand_bytes: config.worker.memory_budget,
        longest_wait: ladder(config).longest(),
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
        let (rabbitmq, redis) = (&loaded.config.rabbitmq, &loaded.config.redis);
        let identity = rabbitmq.identity.as_ref().map(|(cert, key)| (cert.as_path(), key.as_path()));
        let endpoint = Endpoint::parse(rabbitmq.url.expose(), rabbitmq.ca.as_deref(), identity);
        let address = Address::parse(redis.url.expose(), redis.ca.as_deref().map(Path::new));
        let problem = |key: &str, what: String| Problem { key: key.to_owned(), what };
        match (endpoint, address) {
            (Ok(endpoint), Ok(address)) => {
                let topology = Topology::new(&rabbitmq.prefix, rabbitmq.events_max as u64, rabbitmq.declare);
                Ok(Backends { endpoint, topology, address })
            }
            (endpoint, address) => {
                let endpoint = endpoint.err().map(|error| problem("rabbitmq.url", error.to_string()));
                let address = address.err().map(|error| problem("redis.url", error.to_string()));
                Err(ConfigError::Wrong {
                    path: loaded.path.clone(),
                    problems: endpoint.into_iter().chain(address).collect(),
                })
            }
        }
    }
}

/// What a gateway works on.
#[derive(Debug)]
pub struct GatewayStores {
    pub exchange: Arc<Exchange>,
    pub seen: Arc<SeenKeys>,
    pub redis: Redis,
}

impl GatewayStores {
    /// Starts to connect to both.
    pub fn start(config: &Config, backends: Backends, metrics: &Arc<Metrics>) -> GatewayStores {
        let Backends { endpoint, topology, address } = backends;
        let redis = Redis::start(address, &config.redis.prefix, config.redis.timeout);
        let counted = Arc::clone(metrics);
        let on_lost = Arc::new(move |lost| counted.gateway_dedup_errors.inc_by(lost));
        let seen = Arc::new(SeenKeys::start(redis.clone(), config.dedup.window, on_lost));
        let counted = Arc::clone(metrics);
        let on_return: Arc<dyn Fn() + Send + Sync> = Arc::new(move || counted.gateway_returned.inc());
        let timeout = config.rabbitmq.confirm_timeout;
        let exchange = Exchange::start(endpoint, topology, timeout, config.gateway.max_in_flight, &on_return);
        GatewayStores { exchange: Arc::new(exchange), seen, redis }
    }
}

/// What a worker works on.
#[derive(Debug)]
pub struct WorkerStores {
    pub consumer: Arc<Consumer>,
    pub claims: Arc<RedisClaims>,
    pub redis: Redis,
}

impl WorkerStores {
    /// Starts to connect to both.
    pub fn start(config: &Config, backends: Backends, metrics: &Arc<Metrics>) -> WorkerStores {
        let Backends { endpoint, topology, address } = backends;
        let redis = Redis::start(address, &config.redis.prefix, config.redis.timeout);
        let claims = Arc::new(RedisClaims::new(redis.clone(), config.worker.claim_window));
        let topology = topology.with_steps(&config.worker.retry);
        let counted = Arc::clone(metrics);
        let on_return: Arc<dyn Fn() + Send + Sync> = Arc::new(move || counted.worker_returned.inc());
        let consumer = Consumer::connect(
            &endpoint,
            &topology,
            config.rabbitmq.confirm_timeout,
            config.worker.broker_prefetch(),
            &on_return,
        );
        WorkerStores { consumer: Arc::new(consumer), claims, redis }
    }
}

/// The routes of the configuration; without any, every event is logged.
pub fn router(config: &Config) -> anyhow::Result<Router> {
    let routes = &config.worker.routes;
    if routes.is_empty() {
        let every = Pattern::parse("*").context("\"*\" is a pattern")?;
        let log = Route { name: "log".into(), events: vec![every], apps: Vec::new(), handler: Arc::new(Observe) };
        return Ok(Router::new(vec![log]));
    }
    let client = http_client::client(None)?;
    let forward = |route: &streamgate_service::config::RouteConfig| Route {
        name: route.name.as_str().into(),
        events: route.events.clone(),
        apps: route.apps.clone(),
        handler: Arc::new(Forward::new(client.clone(), &route.forward)),
    };
    Ok(Router::new(routes.iter().map(forward).collect()))
}

fn ladder(config: &Config) -> Ladder {
    Ladder::new(config.worker.retry.clone())
}

pub fn policy(config: &Config) -> Policy {
    Policy {
        concurrency: config.worker.concurrency,
        handler_timeout: config.worker.handler_timeout,
        drain_timeout: config.worker.drain_timeout.unwrap_or(config.gateway.drain_timeout),
        ladder: ladder(config),
        unmatched: config.worker.unmatched,
    }
}

/// Random, so that holders of claims differ between workers.
pub fn holder_seed() -> anyhow::Result<u64> {
    getrandom::u64().context("cannot get random bytes from the system")
}
