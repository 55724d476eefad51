//! Where configuration becomes adapters: the one place that knows both services and the stores.

use anyhow::{Context, bail};
use std::collections::HashSet;
use std::collections::hash_map::{Entry, HashMap};
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::{pattern::Pattern, retry::Ladder};
use streamgate_gateway::{SpoolPolicy, Spooled};
use streamgate_service::config::reader::Problem;
use streamgate_service::config::{CommandConfig, Config, ConfigError, ForwardConfig, Loaded};
use streamgate_service::http_client::{ClientError, ServiceClient};
use streamgate_service::metrics::Metrics;
use streamgate_store::rabbitmq::{CallQueue, Caller, Consumer, Endpoint, EndpointError, Exchange, Topology};
use streamgate_store::redis::{Address, AddressError, Redis, RedisAnswers, RedisClaims, SeenKeys};
use streamgate_store::sqlite::{self, OpenError, SpoolFile, SpoolOptions};
use streamgate_worker::{
    CallPolicy, Forward, ForwardHook, HookHandler, Hooks, Observe, Policy, Reply, Route, Router, Screen,
};

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
        // Its own handler's time, and that of those that run when it is to run alone.
        patience: config.worker.handler_timeout.saturating_mul(2),
    }
}

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
                Err(ConfigError::Wrong {
                    path: loaded.path.clone(),
                    problems: endpoint.into_iter().chain(address).collect(),
                })
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

/// One client for each set of authorities, so that what goes to one service shares its connections.
#[derive(Default)]
pub(crate) struct ServiceClients(HashMap<Option<String>, ServiceClient>);

impl ServiceClients {
    pub(crate) fn of(&mut self, to: &ForwardConfig) -> Result<ServiceClient, ClientError> {
        Ok(match self.0.entry(to.ca.clone()) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(place) => place.insert(ServiceClient::new(to.ca.as_deref())?).clone(),
        })
    }
}

/// The routes of the code, then those of the configuration; without any, every event is logged.
pub fn router(config: &Config, code: Vec<Route>) -> anyhow::Result<Router> {
    let (mut routes, configured) = (code, &config.worker.routes);
    if routes.is_empty() && configured.is_empty() {
        let every = Pattern::parse("*").context("\"*\" is a pattern")?;
        let log = Route { name: "log".into(), events: vec![every], apps: Vec::new(), handler: Arc::new(Observe) };
        return Ok(Router::new(vec![log]));
    }
    let mut clients = ServiceClients::default();
    for route in configured {
        routes.push(Route {
            name: route.name.as_str().into(),
            events: route.events.clone(),
            apps: route.apps.clone(),
            handler: Arc::new(Forward::new(clients.of(&route.forward)?, &route.forward)),
        });
    }
    Ok(Router::new(routes))
}

/// The hooks of the configuration, beside those of the code: each has one handler.
pub fn hooks(config: &Config, code: Hooks) -> anyhow::Result<Hooks> {
    let (moderation, commands) = (&config.hooks.before_message_send, &config.hooks.custom_commands);
    let mut clients = ServiceClients::default();
    let mut forward = |to: &ForwardConfig| -> anyhow::Result<Arc<dyn HookHandler>> {
        Ok(Arc::new(ForwardHook::new(clients.of(to)?, to)))
    };
    let mut hooks = code;
    let service = moderation.forward.as_ref().map(&mut forward).transpose()?;
    let asked = one(hooks.before_message_send, service, "before_message_send.forward")?;
    if asked.is_some() && moderation.rules.masks() {
        bail!(
            "hooks.before_message_send.rules that mask do not go with a handler in the code: it does as it likes itself"
        );
    }
    hooks.before_message_send = match moderation.rules.is_empty() && asked.is_none() {
        true => None,
        false => Some(Arc::new(Screen {
            rules: Arc::new(moderation.rules.clone()),
            on_unreadable: moderation.on_unreadable,
            failure_text: moderation.policy.failure_text.as_str().into(),
            then: asked,
        })),
    };
    let service = commands.forward.as_ref().map(&mut forward).transpose()?;
    hooks.any_command = one(hooks.any_command, service, "custom_commands.forward")?;
    for (name, command) in &commands.commands {
        let configured: Arc<dyn HookHandler> = match command {
            CommandConfig::Forward(to) => forward(to)?,
            CommandConfig::Reply { text, reply_type } => {
                Arc::new(Reply { text: text.clone(), reply_type: *reply_type })
            }
        };
        let key = format!("custom_commands.commands.{name}");
        let handler = one(hooks.commands.remove(name), Some(configured), &key)?;
        hooks.commands.extend(handler.map(|handler| (name.clone(), handler)));
    }
    Ok(hooks)
}

fn one<T>(code: Option<T>, configured: Option<T>, key: &str) -> anyhow::Result<Option<T>> {
    if code.is_some() && configured.is_some() {
        bail!("hooks.{key} is configured, and the code has a handler for it too: remove one of them");
    }
    Ok(code.or(configured))
}

/// Commands that a URL may name where the signed message has none.
pub fn command_names(config: &Config) -> HashSet<String> {
    let commands = &config.hooks.custom_commands;
    commands.commands.keys().chain(&commands.by_url).cloned().collect()
}

pub fn call_policy(config: &Config) -> CallPolicy {
    CallPolicy { concurrency: config.hooks.concurrency, drain_timeout: drain_timeout(config) }
}

fn drain_timeout(config: &Config) -> Duration {
    config.worker.drain_timeout.unwrap_or(config.gateway.drain_timeout)
}

fn ladder(config: &Config) -> Ladder {
    Ladder::new(config.worker.retry.clone())
}

pub fn policy(config: &Config) -> Policy {
    Policy {
        concurrency: config.worker.concurrency,
        handler_timeout: config.worker.handler_timeout,
        drain_timeout: drain_timeout(config),
        ladder: ladder(config),
        unmatched: config.worker.unmatched,
        lines: config.log.deliveries,
    }
}

/// Random, so that holders of claims differ between workers.
pub fn holder_seed() -> anyhow::Result<u64> {
    getrandom::u64().context("cannot get random bytes from the system")
}
