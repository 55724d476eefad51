//! `streamgate up`: gateway and worker in one process on the embedded store.

use crate::backends::embedded;
use crate::background::Background;
use crate::code::Code;
#[cfg(feature = "cli")]
use crate::global::Global;
use crate::greeting::{self, Greeting};
use crate::receiving::Receiving;
use crate::reload::Reload;
use crate::working::Working;
use crate::{closing, dev, open_files, output, wiring};
use anyhow::Context;
use arc_swap::ArcSwap;
use std::process::ExitCode;
use std::sync::Arc;
use streamgate_core::instance::Role;
use streamgate_core::path::PUSH;
use streamgate_core::ports::Lifecycle;
use streamgate_service::config::{AppConfig, Config, Loaded, Source};
use streamgate_service::metrics::Metrics;
use streamgate_service::shutdown::{self, Shutdown};
use streamgate_worker::{Hooks, Router};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// What `run` needs. Listeners are bound by the caller, so that tests can choose free ports.
#[derive(Debug)]
pub struct Up {
    pub config: Config,
    pub router: Router,
    pub hooks: Hooks,
    /// The handlers in code, if routes and hooks can be reloaded.
    pub code: Option<Code>,
    pub listener: TcpListener,
    pub ops_listener: TcpListener,
    /// Where the configuration is reloaded from, if it is.
    pub source: Option<Source>,
    /// Requests a reload at once.
    pub reload: Arc<Notify>,
    pub metrics: Arc<Metrics>,
}

#[cfg(feature = "cli")]
pub async fn command(global: &Global) -> anyhow::Result<ExitCode> {
    start(global.load()?, Some(global.source()), Code::default()).await
}

/// Binds, prints the greeting, and serves until a signal.
pub async fn start(loaded: Loaded, source: Option<Source>, code: Code) -> anyhow::Result<ExitCode> {
    let mut loaded = loaded.for_one_process()?;
    let development = loaded.config.apps.is_empty();
    // A reload compares with the files, which do not contain the development app.
    let as_loaded = loaded.config.clone();
    let config = &mut loaded.config;
    if development {
        if !config.gateway.listen.ip().is_loopback() {
            tracing::warn!(
                "no app is configured: only webhooks of the development app will be taken, Stream's will not"
            );
        }
        config.apps.push(dev::app(&config.store.data_dir)?);
    }
    open_files::raise(config.gateway.max_connections + wiring::files_of_handlers(config));
    let shutdown = Shutdown::new();
    shutdown.listen().context("cannot listen to signals")?;
    let reload = Arc::new(Notify::new());
    shutdown::on_hangup(Arc::clone(&reload)).context("cannot listen to signals")?;
    let listener = greeting::bind(config.gateway.listen, "gateway.listen").await?;
    let ops_listener = greeting::bind(config.gateway.ops_listen, "gateway.ops_listen").await?;
    let base = greeting::base(&loaded, &listener)?;
    let greeting = Greeting::new("Streamgate")
        .line("webhooks", format_args!("{base}{PUSH}"))
        .metrics(&ops_listener)?
        .line("data", std::path::absolute(&loaded.config.store.data_dir)?.display())
        .line("API key", greeting::key(&loaded, development)?)
        .try_it(&loaded, development, &listener)?
        .into_text();
    let config = loaded.config;
    let router = wiring::router(&config, code.routes.clone())?;
    let hooks = wiring::hooks(&config, code.hooks.clone())?;
    let metrics = Metrics::new();
    let up = Up { config, router, hooks, code: Some(code), listener, ops_listener, source, reload, metrics };
    run(up, as_loaded, shutdown.clone(), || output::greet(greeting)).await?;
    Ok(shutdown.code())
}

/// Serves until the drain is done. Calls `ready` when all listeners are open.
pub async fn run(up: Up, as_loaded: Config, shutdown: Shutdown, ready: impl FnOnce()) -> anyhow::Result<()> {
    let Up { config, router, hooks, code, listener, ops_listener, source, reload, metrics } = up;
    let router = Arc::new(ArcSwap::from_pointee(router));
    let (gateway, worker) = embedded::open(&config, &router, !hooks.is_empty(), &metrics)?;
    metrics.begin(&AppConfig::names(&config.apps), &router.load().names());
    let commands = wiring::command_names(&config).into_iter().chain(hooks.commands.keys().cloned()).collect();
    let receiving = Receiving::new(&config, commands, &gateway, &metrics)?;
    let working = Working::new(&config, router, hooks, &worker, &metrics)?;
    let store = gateway.lifecycle;
    let readiness = receiving.readiness(&store, &shutdown);
    let mut background = Background::start(Role::Up, ops_listener, metrics, readiness, &store, &shutdown);
    if let Some(renewing) = receiving.renewing() {
        background.spawn(renewing);
    }
    if let Some(source) = source {
        let handlers = code.map(|code| working.reloaded(code, &as_loaded));
        let reloaded = receiving.reloaded(as_loaded.apps.clone()).into_iter().chain(handlers.into_iter().flatten());
        background.spawn(Reload::new(source, embedded::load, reloaded.collect()).watch(as_loaded, reload));
    }
    ready();
    // The worker answers hooks until receiving has ended.
    let answered = Shutdown { drain: CancellationToken::new(), abort: shutdown.abort.clone() };
    let receive = async {
        receiving.run(listener, shutdown.clone()).await;
        answered.drain.cancel();
    };
    tokio::join!(receive, working.run(shutdown.clone(), answered.clone()));
    background.end().await;
    closing::close(&shutdown, async {
        receiving.close().await;
        store.close().await;
    })
    .await;
    Ok(())
}
