//! `streamgate worker`: consumes from RabbitMQ, claims in Redis, runs handlers.

use crate::backends::rabbitmq::for_services;
use crate::backends::rabbitmq::{self, Servers};
use crate::background::Background;
use crate::code::Code;
#[cfg(feature = "cli")]
use crate::global::Global;
use crate::greeting::{self, Greeting};
use crate::reload::Reload;
use crate::working::Working;
use crate::{closing, open_files, output, wiring};
use anyhow::Context;
use arc_swap::ArcSwap;
use std::process::ExitCode;
use std::sync::Arc;
use streamgate_core::instance::Role;
use streamgate_core::ports::Lifecycle;
use streamgate_service::config::{Loaded, Source};
use streamgate_service::metrics::Metrics;
use streamgate_service::ops;
use streamgate_service::shutdown::{self, Shutdown};
use streamgate_worker::{Hooks, Router};
use tokio::net::TcpListener;
use tokio::sync::Notify;

/// What `run` needs. The listener is bound by the caller, so that tests can choose a free port.
#[derive(Debug)]
pub struct WorkerInputs {
    pub loaded: Loaded,
    pub router: Router,
    pub hooks: Hooks,
    /// Where routes and hooks are reloaded from, if they are, and the handlers in code.
    pub reload: Option<(Source, Code)>,
    pub ops_listener: TcpListener,
    pub metrics: Arc<Metrics>,
}

#[cfg(feature = "cli")]
pub async fn command(global: &Global) -> anyhow::Result<ExitCode> {
    let source = global.source();
    // A worker verifies no webhooks, so it needs none of Stream's secrets.
    let source = Source { environment: source.environment.without_app_secrets(), ..source };
    start(global.load_from(&source)?, Some(source), Code::default()).await
}

/// Binds, prints the greeting, and works until a signal.
pub async fn start(loaded: Loaded, source: Option<Source>, code: Code) -> anyhow::Result<ExitCode> {
    let loaded = for_services(loaded)?;
    let servers = Servers::of(&loaded)?;
    open_files::raise(wiring::files_of_handlers(&loaded.config));
    let shutdown = Shutdown::new();
    shutdown.listen().context("cannot listen to signals")?;
    let ops_listener = greeting::bind(loaded.config.worker.ops_listen, "worker.ops_listen").await?;
    let router = wiring::router(&loaded.config, code.routes.clone())?;
    let hooks = wiring::hooks(&loaded.config, code.hooks.clone())?;
    let greeting = Greeting::new("Streamgate worker")
        .metrics(&ops_listener)?
        .line("RabbitMQ", servers.endpoint.address())
        .line("Redis", &servers.address)
        .line("hooks", greeting::hooks(&hooks))
        .line("routes", router.names().join(", "))
        .into_text();
    let reload = source.map(|source| (source, code));
    let back = WorkerInputs { loaded, router, hooks, reload, ops_listener, metrics: Metrics::new() };
    run(back, shutdown.clone(), || output::greet(greeting)).await?;
    Ok(shutdown.code())
}

/// Works until the drain is done. Calls `ready` when everything is open; the backends may not be connected yet.
pub async fn run(back: WorkerInputs, shutdown: Shutdown, ready: impl FnOnce()) -> anyhow::Result<()> {
    let WorkerInputs { loaded, router, hooks, reload: again, ops_listener, metrics } = back;
    let hangup = Arc::new(Notify::new());
    shutdown::on_hangup(Arc::clone(&hangup)).context("cannot listen to signals")?;
    let servers = Servers::of(&loaded)?;
    let config = loaded.config;
    metrics.begin(&[], &router.names());
    let router = Arc::new(ArcSwap::from_pointee(router));
    let parts = rabbitmq::worker(&config, servers, &router, !hooks.is_empty(), &metrics);
    let working = Working::new(&config, router, hooks, &parts, &metrics)?;
    let (backend, drain_timeout) = (parts.lifecycle, wiring::drain_timeout(&config));
    let readiness = ops::unless_draining(&shutdown, {
        let backend = Arc::clone(&backend);
        move || backend.ready()
    });
    let mut background = Background::start(Role::Worker, ops_listener, metrics, readiness, &backend, &shutdown);
    if let Some((source, code)) = again {
        let reloaded = working.reloaded(code, &config).into_iter().chain(backend.reloaded()).collect();
        background.spawn(Reload::new(source, rabbitmq::load, reloaded).watch(config, hangup));
    }
    ready();
    let stop = async {
        let by = shutdown.deadline(drain_timeout).await;
        tokio::select! {
            () = backend.stop(by) => {}
            () = shutdown.abort.cancelled() => {}
        }
    };
    tokio::join!(working.run(shutdown.clone(), shutdown.clone()), stop);
    background.end().await;
    closing::close(&shutdown, backend.close()).await;
    Ok(())
}
