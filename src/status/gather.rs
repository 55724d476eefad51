//! Asks everything that `status` reports, all at the same time and each within a limit: what does not answer is reported as such, and
//! keeps nothing else back.

use super::report::{DeadLetters, Known, Queue, QueueKind, Report, RouteState, Server, short};
use crate::backends::rabbitmq as backend;
use crate::dead;
use crate::route::states::{RouteStates, until_there};
use crate::route::{self, View};
use crate::wiring;
use std::collections::BTreeMap;
use std::time::Duration;
use streamgate_core::instance::{Instance, Role};
use streamgate_core::ports::Instances;
use streamgate_core::route_record::Records;
use streamgate_service::config::{Config, Loaded, StoreKind};
use streamgate_store::rabbitmq::{self, QueueDepth, Topology};
use streamgate_store::redis::{Redis, RedisInstances};
use streamgate_store::sqlite::{self, Depths, InstanceFile};

/// Time limit for each part: somebody waits for the report.
const LIMIT: Duration = Duration::from_secs(5);
/// Dead letters are read one by one for their causes, up to this many.
const MOST_READ: u64 = 1_000;

pub(super) async fn report(loaded: &Loaded) -> Report {
    match loaded.config.store.kind {
        StoreKind::Embedded => embedded(loaded).await,
        StoreKind::RabbitMq => services(loaded).await,
    }
}

async fn embedded(loaded: &Loaded) -> Report {
    let config = &loaded.config;
    let data_dir = &config.store.data_dir;
    let file = InstanceFile::of(data_dir);
    let (instances, depths, records) =
        tokio::join!(within(file.list()), within(sqlite::depths_of(data_dir)), records(config));
    let error = depths.as_ref().err().cloned();
    let parked = depths.as_ref().ok().map(|depths| parked_of(&depths.parked));
    let dead = depths.as_ref().map(|depths| count(depths.dead)).map_err(Clone::clone);
    let report = Report {
        ok: false,
        attention: Vec::new(),
        servers: vec![Server { name: "the embedded store", at: data_dir.display().to_string(), error }],
        routes: Known::of(routes(config, &instances, records, parked.as_ref())),
        queues: Known::of(depths.map(|depths| queues_of(&depths))),
        dead_letters: Known::of(dead_letters(loaded, dead).await),
        instances: Known::of(instances),
    };
    report.judged(&[Role::Up])
}

fn parked_of(parked: &[(String, i64)]) -> BTreeMap<String, u64> {
    parked.iter().map(|(route, events)| (route.clone(), count(*events))).collect()
}

fn count(rows: i64) -> u64 {
    u64::try_from(rows).unwrap_or_default()
}

fn queues_of(depths: &Depths) -> Vec<Queue> {
    let queue = |name: &str, kind, rows| Queue { name: name.into(), kind, messages: count(rows), consumers: None };
    let mut queues = vec![
        queue("waiting", QueueKind::Waiting, depths.waiting),
        queue("retrying", QueueKind::Retrying, depths.retrying),
        queue("dead", QueueKind::Dead, depths.dead),
    ];
    queues
        .extend(depths.parked.iter().map(|(route, rows)| queue(&format!("parked.{route}"), QueueKind::Parked, *rows)));
    queues
}

async fn services(loaded: &Loaded) -> Report {
    let config = &loaded.config;
    let (instances, records) = tokio::join!(redis_instances(config), records(config));
    let redis_error = instances.as_ref().err().cloned();
    // Redis has the names of all routes that ever had a worker; without it only those of the configuration are known.
    let known = records.as_ref().map(|records| records.keys().cloned().collect()).unwrap_or_default();
    let (topology, at) = (topology(config, known), backend::endpoint(config).map(|endpoint| endpoint.address()));
    let depths = queue_depths(config, &topology).await;
    let server = |name, at: Result<String, String>, error| Server { name, at: at.unwrap_or_else(|error| error), error };
    let address = backend::address(config).map(|address| address.to_string()).map_err(|error| error.to_string());
    let servers = vec![
        server("RabbitMQ", at.map_err(|error| error.to_string()), depths.as_ref().err().cloned()),
        server("Redis", address, redis_error),
    ];
    let queues = depths
        .map(|depths| depths.into_iter().map(|depth| queue_of(depth, &config.rabbitmq.prefix)).collect::<Vec<_>>());
    let of_kind =
        |queues: &[Queue], kind| queues.iter().filter(|queue| queue.kind == kind).cloned().collect::<Vec<_>>();
    let before = topology.parked("");
    let parked_for = |queue: Queue| Some((queue.name.strip_prefix(&before)?.to_owned(), queue.messages));
    let parked: Option<BTreeMap<_, _>> = queues
        .as_ref()
        .ok()
        .map(|queues| of_kind(queues, QueueKind::Parked).into_iter().filter_map(parked_for).collect());
    let dead = queues.as_ref().map_err(Clone::clone);
    let dead = dead.map(|queues| of_kind(queues, QueueKind::Dead).iter().map(|queue| queue.messages).sum());
    let report = Report {
        ok: false,
        attention: Vec::new(),
        servers,
        routes: Known::of(routes(config, &instances, records, parked.as_ref())),
        queues: Known::of(queues),
        dead_letters: Known::of(dead_letters(loaded, dead).await),
        instances: Known::of(instances),
    };
    report.judged(&[Role::Gateway, Role::Worker])
}

async fn redis_instances(config: &Config) -> Result<Vec<Instance>, String> {
    let address = backend::address(config).map_err(|error| error.to_string())?;
    let instances = RedisInstances::new(Redis::start(address, &config.redis.prefix, config.redis.timeout));
    until_there(|| instances.list()).await.map_err(|error| error.to_string())
}

async fn records(config: &Config) -> Result<Records, String> {
    let states = RouteStates::of(config).map_err(|error| format!("{error:#}"))?;
    within(states.read()).await
}

/// The queues of gateways and workers, and of every route that is known.
fn topology(config: &Config, known: Vec<String>) -> Topology {
    let mut routes = known;
    routes.extend(wiring::route_names(config).into_iter().map(str::to_owned));
    let routes: Vec<&str> = routes.iter().map(String::as_str).collect();
    let topology = backend::topology(config).with_steps(&config.worker.retry_steps()).with_calls();
    topology.with_parked(&routes, config.rabbitmq.parked_max as u64)
}

async fn queue_depths(config: &Config, topology: &Topology) -> Result<Vec<QueueDepth>, String> {
    let endpoint = backend::endpoint(config).map_err(|error| error.to_string())?;
    within(rabbitmq::queue_depths(&endpoint, topology)).await
}

fn queue_of(depth: QueueDepth, prefix: &str) -> Queue {
    let QueueDepth { name, messages, consumers } = depth;
    let rest = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.')).unwrap_or(&name);
    let kind = match rest.split('.').next().unwrap_or_default() {
        "retry" => QueueKind::Retrying,
        "parked" => QueueKind::Parked,
        "dead" => QueueKind::Dead,
        "unrouted" => QueueKind::Unrouted,
        "calls" => QueueKind::Calls,
        _ => QueueKind::Waiting,
    };
    Queue { name, kind, messages: messages.into(), consumers: Some(consumers) }
}

fn routes(
    config: &Config,
    instances: &Result<Vec<Instance>, String>,
    records: Result<Records, String>,
    parked: Option<&BTreeMap<String, u64>>,
) -> Result<Vec<RouteState>, String> {
    let configured: Vec<_> = wiring::route_names(config).into_iter().map(str::to_owned).collect();
    let states = route::views(&configured, &records?, parked).into_iter().map(|view| {
        let View { name, state, by, why, since, parked, configured } = view;
        let open = instances.iter().flatten().filter(|instance| instance.open_routes.contains(&name));
        let open_in = open.map(short).collect();
        let since = since.filter(|_| by.is_some());
        RouteState { name, state, since, by, why, parked, open_in, configured }
    });
    Ok(states.collect())
}

async fn dead_letters(loaded: &Loaded, count: Result<u64, String>) -> Result<DeadLetters, String> {
    let count = count?;
    if count > MOST_READ {
        return Ok(DeadLetters { count, causes: None });
    }
    let causes = match count {
        0 => Vec::new(),
        _ => within(dead::causes_of(loaded)).await?,
    };
    Ok(DeadLetters { count, causes: Some(causes) })
}

async fn within<T, E: std::fmt::Display>(asked: impl Future<Output = Result<T, E>>) -> Result<T, String> {
    match tokio::time::timeout(LIMIT, asked).await {
        Ok(result) => result.map_err(|error| format!("{error:#}")),
        Err(_) => Err(format!("no answer within {LIMIT:?}")),
    }
}
