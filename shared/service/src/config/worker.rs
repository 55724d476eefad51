//! `[worker]` and its routes.

use super::{
    AppConfig, KIB, MIB, RouteConfig,
    environment::Environment,
    reader::{Report, Section},
    route::{self, MOST_HANDLERS, RouteDefaults},
};
use std::collections::{BTreeSet, HashSet};
use std::net::SocketAddr;
use std::time::Duration;
use streamgate_core::retry::Ladder;

/// `[worker]`
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Address where `worker` serves /metrics, /healthz and /readyz. Default 127.0.0.1:9465.
    pub ops_listen: SocketAddr,
    /// Most handlers of each route at a time, unless the route sets its own. Default 64.
    pub concurrency: usize,
    /// Most deliveries in hand, running or about to; at least twice what all routes may handle at a time. Default 256.
    pub prefetch: usize,
    /// Most bytes of bodies in hand. Default 64 MiB.
    pub memory_budget: usize,
    /// How long a handler may take. Default 30 s.
    pub handler_timeout: Duration,
    /// How long handlers may take to finish after SIGTERM. Default: the gateway's.
    pub drain_timeout: Option<Duration>,
    /// How long a handled key is remembered. Default 24 h.
    pub claim_window: Duration,
    /// The waits between attempts; after the last one the event becomes a dead letter. Default 1s, 5s, 30s, 2m, 10m,
    /// 1h.
    pub retry: Vec<Duration>,
    /// What to do with an event that no route matches, if there are routes. Default `ack`.
    pub unmatched: Unmatched,
    /// The first match wins. Without any routes, events are logged and acknowledged.
    pub routes: Vec<RouteConfig>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmatched {
    Ack,
    Dead,
}

impl WorkerConfig {
    pub(super) fn read(mut section: Section<'_>, environment: &Environment) -> WorkerConfig {
        let defaults = RouteDefaults {
            retry: route::ladder(&mut section).unwrap_or_else(default_ladder),
            handler_timeout: section.duration("handler_timeout", Duration::from_secs(30)),
            concurrency: section.count("concurrency", 64, MOST_HANDLERS),
        };
        let unmatched = section.parsed("unmatched", |text| match text {
            "ack" => Ok(Unmatched::Ack),
            "dead" => Ok(Unmatched::Dead),
            other => Err(format!("{other:?} is neither \"ack\" nor \"dead\"")),
        });
        let routes = section.sections("routes");
        let of = routes.len();
        let read = |(place, route)| RouteConfig::read(route, (place + 1, of), &defaults, environment);
        let routes = routes.into_iter().enumerate().filter_map(read).collect();
        let config = WorkerConfig {
            ops_listen: super::address(&mut section, "ops_listen", ([127, 0, 0, 1], 9465)),
            concurrency: defaults.concurrency,
            prefetch: section.count("prefetch", 256, 2000),
            memory_budget: section.size("memory_budget", 64 * MIB),
            handler_timeout: defaults.handler_timeout,
            drain_timeout: section.parsed("drain_timeout", super::reader::duration),
            claim_window: section.duration("claim_window", Duration::from_secs(24 * 3600)),
            unmatched: unmatched.unwrap_or(Unmatched::Ack),
            retry: defaults.retry,
            routes,
        };
        section.finish();
        config
    }
}

impl WorkerConfig {
    /// The longest that any handler may take.
    pub fn longest_handler_timeout(&self) -> Duration {
        self.routes.iter().map(|route| route.handler_timeout).max().unwrap_or_default().max(self.handler_timeout)
    }

    /// Every wait between attempts, of all routes; and one for a route without retries, whose deliveries may wait for
    /// another worker's lease.
    pub fn retry_steps(&self) -> Vec<Duration> {
        let ladders: Vec<&[Duration]> = self.routes.iter().map(|route| &*route.retry).chain([&*self.retry]).collect();
        let lease = ladders.iter().any(|ladder| ladder.is_empty()).then(|| Ladder::new(Vec::new()).shortest());
        let steps: BTreeSet<_> = ladders.into_iter().flatten().copied().chain(lease).collect();
        steps.into_iter().collect()
    }
}

fn default_ladder() -> Vec<Duration> {
    [1, 5, 30, 120, 600, 3600].map(Duration::from_secs).to_vec()
}

pub(super) fn cross_check(worker: &WorkerConfig, apps: &[AppConfig], report: &Report) {
    if worker.memory_budget < 64 * KIB {
        report.problem("worker.memory_budget", "must be at least 64KiB");
    }
    route::doubt_patterns(&worker.routes, report);
    let mut names = HashSet::new();
    for (place, route) in worker.routes.iter().enumerate() {
        let path = |key: &str| format!("worker.routes[{}].{key}", place + 1);
        if !names.insert(&route.name) {
            report.problem(path("name"), format!("{:?} is the name of an earlier route", route.name));
        }
        let table = format!("worker.routes[{}]", place + 1);
        let cut_by = "handler_timeout (the route's own, or worker.handler_timeout)";
        route.handler.doubt_timeout(&table, route.handler_timeout, cut_by, report);
        for app in route.apps.iter().filter(|name| !apps.is_empty() && apps.iter().all(|app| app.name != **name)) {
            report.problem(path("apps"), format!("there is no app {app:?}"));
        }
    }
}
