//! `streamgate gateway`: verifies, deduplicates in Redis, publishes to RabbitMQ, answers.

use crate::backends::rabbitmq::for_services;
use crate::backends::rabbitmq::{self, Servers};
use crate::background::Background;
use crate::exit::BadUsage;
use crate::global::Global;
use crate::greeting::{self, Greeting};
use crate::receiving::Receiving;
use crate::reload::Reload;
use crate::{closing, open_files, output, wiring};
use anyhow::Context;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streamgate_core::instance::Role;
use streamgate_core::path::PUSH;
use streamgate_core::ports::Lifecycle;
use streamgate_service::config::{AppConfig, Loaded, Source};
use streamgate_service::metrics::Metrics;
use streamgate_service::shutdown::{self, Shutdown};
use tokio::net::TcpListener;
use tokio::sync::Notify;

/// Shortest drain: load balancers commonly check health every second.
const DRAIN_LEAST: Duration = Duration::from_secs(1);
/// Time for the last hand-over: enough for a batch that RabbitMQ takes.
const LAST_HAND_OVER: Duration = Duration::from_secs(2);

/// What `run` needs. Listeners are bound by the caller, so that tests can choose free ports.
#[derive(Debug)]
pub struct GatewayInputs {
    pub loaded: Loaded,
    pub listener: TcpListener,
    pub ops_listener: TcpListener,
    /// Where apps and certificates are reloaded from.
    pub source: Source,
    /// Requests a reload at once.
    pub reload: Arc<Notify>,
    pub metrics: Arc<Metrics>,
}

pub async fn command(global: &Global) -> anyhow::Result<ExitCode> {
    let source = global.source();
    // The routes and their secrets are the worker's.
    let source = Source { environment: source.environment.without_route_secrets(), ..source };
    let loaded = for_services(global.load_from(&source)?)?;
    let config = &loaded.config;
    if config.apps.is_empty() {
        let what = "no app is configured: add [[apps]], or set STREAM_API_KEY and STREAM_API_SECRET";
        return Err(BadUsage(what.to_owned()).into());
    }
    let servers = Servers::of(&loaded)?;
    open_files::raise(config.gateway.max_connections);
    let shutdown = Shutdown::new();
    shutdown.listen().context("cannot listen to signals")?;
    let reload = Arc::new(Notify::new());
    shutdown::on_hangup(Arc::clone(&reload)).context("cannot listen to signals")?;
    let listener = greeting::bind(config.gateway.listen, "gateway.listen").await?;
    let ops_listener = greeting::bind(config.gateway.ops_listen, "gateway.ops_listen").await?;
    let base = greeting::base(&loaded, &listener)?;
    let greeting = Greeting::new("Streamgate gateway")
        .line("webhooks", format_args!("{base}{PUSH}"))
        .metrics(&ops_listener)?
        .line("spool", std::path::absolute(&loaded.config.store.data_dir)?.display())
        .line("RabbitMQ", servers.endpoint.address())
        .line("Redis", &servers.address)
        .line("API key", greeting::key(&loaded, false)?)
        .try_it(&loaded, false, &listener)?
        .into_text();
    let front = GatewayInputs { loaded, listener, ops_listener, source, reload, metrics: Metrics::new() };
    run(front, shutdown.clone(), || output::greet(greeting)).await?;
    Ok(shutdown.code())
}

/// Serves until the drain is done. Calls `ready` when all listeners are open; the backends may not be connected yet.
pub async fn run(front: GatewayInputs, shutdown: Shutdown, ready: impl FnOnce()) -> anyhow::Result<()> {
    let GatewayInputs { loaded, listener, ops_listener, source, reload, metrics } = front;
    let servers = Servers::of(&loaded)?;
    let mut config = loaded.config;
    config.gateway.drain_least.get_or_insert(DRAIN_LEAST.min(config.gateway.drain_timeout / 2));
    metrics.begin(&AppConfig::names(&config.apps), &[]);
    let drain_timeout = config.gateway.drain_timeout;
    let parts = rabbitmq::gateway(&config, servers, &metrics)?;
    let receiving = Receiving::new(&config, wiring::command_names(&config), &parts, &metrics)?;
    let backend = parts.lifecycle;
    let readiness = receiving.readiness(&backend, &shutdown);
    let mut background = Background::start(Role::Gateway, ops_listener, metrics, readiness, &backend, &shutdown);
    let reloaded = receiving.reloaded(config.apps.clone()).into_iter().chain(backend.reloaded()).collect();
    background.spawn(Reload::new(source, rabbitmq::load, reloaded).watch(config, reload));
    if let Some(renewing) = receiving.renewing() {
        background.spawn(renewing);
    }
    ready();
    let ((), by) = tokio::join!(receiving.run(listener, shutdown.clone()), shutdown.deadline(drain_timeout));
    // Granted even if receiving used up all of the time: events that were spooled last had no time yet.
    let by = by.max(Instant::now() + LAST_HAND_OVER);
    tokio::select! {
        () = backend.stop(by) => {}
        // After a second signal the spooled events stay on the disk.
        () = shutdown.abort.cancelled() => {}
    }
    background.end().await;
    closing::close(&shutdown, async {
        receiving.close().await;
        backend.close().await;
    })
    .await;
    Ok(())
}
