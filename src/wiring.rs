//! Where configuration becomes adapters: the one place that knows both services and the stores.

use anyhow::Context;
use std::sync::Arc;
use streamgate_core::{pattern::Pattern, retry::Ladder};
use streamgate_service::{config::Config, http_client};
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
        drain_timeout: config.gateway.drain_timeout,
        ladder: ladder(config),
        unmatched: config.worker.unmatched,
    }
}
