//! `streamgate up`: gateway and worker in one process on the embedded store.

use crate::app::Code;
#[cfg(feature = "cli")]
use crate::cli::Global;
use crate::greeting::{self, Greeting};
use crate::reload::{self, Apps, Certificates, Part, Reload};
use crate::{dev, limits, output, wiring};
use anyhow::Context;
use arc_swap::ArcSwap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::path::PUSH;
use streamgate_core::ports::{Deliveries, Enqueue};
use streamgate_gateway::{self as gateway, AccessLog, AnswerHook, Gateway, Intake, Tls};
use streamgate_service::config::{AppConfig, Config, Loaded, Source};
use streamgate_service::metrics::Metrics;
use streamgate_service::ops::{self, Readiness};
use streamgate_service::shutdown::{self, Shutdown};
use streamgate_store::memory::InProcess;
use streamgate_store::sqlite::{Depths, Embedded, SeenWithinEnqueue};
use streamgate_worker::{CallWorker, Hooks, Router, Worker};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Between looks at what waits in the store.
const LOOK: Duration = Duration::from_secs(5);

/// What `run` needs. Listeners are bound by the caller, so that tests can choose free ports.
#[derive(Debug)]
pub struct Up {
    pub config: Config,
    pub router: Router,
    pub hooks: Hooks,
    /// Which of them do not come from the configuration; none where neither does.
    pub code: Option<Code>,
    pub listener: TcpListener,
    pub ops_listener: TcpListener,
    /// Where apps and certificates are read again, if they are.
    pub source: Option<Source>,
    /// Asks for that at once.
    pub reload: Arc<Notify>,
    pub metrics: Arc<Metrics>,
}

#[cfg(feature = "cli")]
pub async fn command(global: &Global) -> anyhow::Result<ExitCode> {
    start(global.load()?, Some(global.source()), Code::default()).await
}

/// Binds, greets, and serves until a signal.
pub async fn start(loaded: Loaded, source: Option<Source>, code: Code) -> anyhow::Result<ExitCode> {
    let mut loaded = loaded.for_one_process()?;
    let development = loaded.config.apps.is_empty();
    // The reload compares with what the files say, so the development app is not part of it.
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
    limits::raise_open_files(config.gateway.max_connections);
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

/// Serves until the drain is done. `ready` is called when everything is open.
pub async fn run(up: Up, as_loaded: Config, shutdown: Shutdown, ready: impl FnOnce()) -> anyhow::Result<()> {
    let Up { config, router, hooks, code, listener, ops_listener, source, reload: hangup, metrics } = up;
    let store = Arc::new(Embedded::open(&wiring::store_options(&config))?);
    // After the store: the data directory is this process's now.
    let tls = config.gateway.tls.as_ref().map(|tls| Tls::load(tls, &config.store.data_dir, &metrics)).transpose()?;
    metrics.begin(&AppConfig::names(&config.apps), &router.names());
    let apps = AppConfig::table(&config.apps);
    let seen = Arc::new(SeenWithinEnqueue);
    let calls = Arc::new(InProcess::new(config.gateway.max_in_flight, !hooks.is_empty()));
    let names = wiring::command_names(&config).into_iter().chain(hooks.commands.keys().cloned()).collect();
    let asking =
        gateway::Hooks::new(&config.hooks, names, Arc::clone(&calls), Arc::clone(&store), Arc::clone(&metrics));
    let hooked: Arc<dyn AnswerHook> = Arc::<gateway::Hooks<_, _>>::clone(&asking);
    let intake = Arc::new(Intake::new(
        &config.gateway,
        &config.dedup,
        apps,
        Arc::clone(&store),
        seen,
        hooked,
        AccessLog::new(config.log.requests, Arc::clone(&metrics)),
    ));
    let (router, hooks) = (Arc::new(ArcSwap::from_pointee(router)), Arc::new(ArcSwap::from_pointee(hooks)));
    let answering = CallWorker::new(calls, Arc::clone(&hooks), wiring::call_policy(&config), Arc::clone(&metrics));
    let (policy, seed) = (wiring::policy(&config), wiring::holder_seed()?);
    let (deliveries, claims) = (Arc::clone(&store), Arc::clone(&store));
    let worker = Worker::new(deliveries, claims, Arc::clone(&router), policy, Arc::clone(&metrics), seed)
        .context("cannot start the threads for handlers of events")?;
    let gateway = Gateway::new(config.gateway, Arc::clone(&intake), tls.clone());
    let readiness = readiness(&store, gateway.accepting(), tls.clone(), &shutdown);
    let ops = ops::serve(ops_listener, Arc::clone(&metrics), readiness, shutdown.abort.clone());
    let ops = AbortOnDropHandle::new(tokio::spawn(ops));
    let renewing = tls.clone().map(|tls| AbortOnDropHandle::new(tokio::spawn(tls.run())));
    let mut parts: Vec<Box<dyn Part>> =
        vec![Box::new(Apps::new(intake, as_loaded.apps.clone())), Box::new(Certificates(tls))];
    parts.extend(
        code.into_iter().flat_map(|code| reload::handlers(Arc::clone(&router), Arc::clone(&hooks), code, &as_loaded)),
    );
    let depths = AbortOnDropHandle::new(tokio::spawn(show_depths(Arc::clone(&store), Arc::clone(&metrics))));
    let watch = source.map(|source| Reload::new(source, parts));
    let watch = watch.map(|watch| AbortOnDropHandle::new(tokio::spawn(watch.watch(as_loaded, hangup))));
    ready();
    // Events that come in during the drain are durable, and delivered after the next start; hooks are answered to the end.
    let answered = Shutdown { drain: CancellationToken::new(), abort: shutdown.abort.clone() };
    let receiving = async {
        gateway.run(listener, shutdown.clone()).await;
        answered.drain.cancel();
    };
    tokio::join!(receiving, worker.run(shutdown.clone()), answering.run(answered.clone()));
    for helper in [Some(ops), Some(depths), renewing, watch].into_iter().flatten() {
        helper.abort();
        drop(helper.await);
    }
    asking.close().await;
    drop((gateway, worker, answering, asking));
    // A connection or a handler may outlive the drain: what it was promised is committed, and it is promised nothing more.
    store.close().await;
    tracing::info!("stopped");
    Ok(())
}

/// Shows what waits in the store; until it is dropped.
async fn show_depths(store: Arc<Embedded>, metrics: Arc<Metrics>) {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match store.depths().await {
            Ok(Depths { waiting, retrying, dead }) => {
                for (queue, events) in [("waiting", waiting), ("retrying", retrying), ("dead", dead)] {
                    metrics.queue_messages.with_label_values(&[queue]).set(events);
                }
            }
            Err(error) => tracing::debug!(%error, "cannot count what waits"),
        }
    }
}

fn readiness(
    store: &Arc<Embedded>,
    accepting: impl Fn() -> Result<(), &'static str> + Send + Sync + 'static,
    tls: Option<Tls>,
    shutdown: &Shutdown,
) -> Readiness {
    let store = Arc::downgrade(store);
    ops::unless_draining(shutdown, move || {
        accepting()?;
        let but = tls.as_ref().map_or(Ok(None), Tls::ready)?;
        let store = store.upgrade().ok_or("the store is closed")?;
        let told = Enqueue::ready(&*store).and_then(|()| Deliveries::ready(&*store));
        told.map(|()| but).map_err(|error| error.to_string())
    })
}
