//! `streamgate worker`: consumes from RabbitMQ, claims in Redis, runs business logic.

use crate::app::Code;
#[cfg(feature = "cli")]
use crate::cli::Global;
use crate::greeting::{self, Greeting};
use crate::reload::{self, Reload};
use crate::wiring::{self, Backends, WorkerStores};
use crate::{limits, output};
use anyhow::Context;
use arc_swap::ArcSwap;
use std::process::ExitCode;
use std::sync::Arc;
use streamgate_core::ports::Deliveries;
use streamgate_service::config::{Loaded, Source};
use streamgate_service::metrics::Metrics;
use streamgate_service::ops;
use streamgate_service::shutdown::{self, Shutdown};
use streamgate_worker::{CallWorker, Hooks, Router, Worker};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

/// What `run` needs. The listener is bound by the caller, so that tests can choose a free port.
#[derive(Debug)]
pub struct Back {
    pub loaded: Loaded,
    pub router: Router,
    pub hooks: Hooks,
    /// Where routes and hooks are read again, if they are, and which of them do not come from there.
    pub reload: Option<(Source, Code)>,
    pub ops_listener: TcpListener,
    pub metrics: Arc<Metrics>,
}

#[cfg(feature = "cli")]
pub async fn command(global: &Global) -> anyhow::Result<ExitCode> {
    let source = global.source();
    // It verifies no webhook, so Stream's secrets need not be there.
    let source = Source { environment: source.environment.without_app_secrets(), ..source };
    start(global.load_from(&source)?, Some(source), Code::default()).await
}

/// Binds, greets, and works until a signal.
pub async fn start(loaded: Loaded, source: Option<Source>, code: Code) -> anyhow::Result<ExitCode> {
    let loaded = loaded.for_services()?;
    let backends = Backends::of(&loaded)?;
    limits::raise_open_files(loaded.config.worker.concurrency);
    let shutdown = Shutdown::new();
    shutdown.listen().context("cannot listen to signals")?;
    let ops_listener = greeting::bind(loaded.config.worker.ops_listen, "worker.ops_listen").await?;
    let router = wiring::router(&loaded.config, code.routes.clone())?;
    let hooks = wiring::hooks(&loaded.config, code.hooks.clone())?;
    let greeting = Greeting::new("Streamgate worker")
        .metrics(&ops_listener)?
        .line("RabbitMQ", backends.endpoint.address())
        .line("Redis", &backends.address)
        .line("hooks", greeting::hooks(&hooks))
        .line("routes", router.names().join(", "))
        .into_text();
    let reload = source.map(|source| (source, code));
    let back = Back { loaded, router, hooks, reload, ops_listener, metrics: Metrics::new() };
    run(back, shutdown.clone(), || output::greet(greeting)).await?;
    Ok(shutdown.code())
}

/// Works until the drain is done. `ready` is called when everything is open; the backends may not be there yet.
pub async fn run(back: Back, shutdown: Shutdown, ready: impl FnOnce()) -> anyhow::Result<()> {
    let Back { loaded, router, hooks, reload: again, ops_listener, metrics } = back;
    let hangup = Arc::new(Notify::new());
    shutdown::on_hangup(Arc::clone(&hangup)).context("cannot listen to signals")?;
    let backends = Backends::of(&loaded)?;
    let config = loaded.config;
    metrics.begin(&[], &router.names());
    let endpoint = backends.endpoint.clone();
    let WorkerStores { consumer, claims, calls, redis } =
        WorkerStores::start(&config, backends, !hooks.is_empty(), &metrics);
    let addressed = redis.clone();
    let (policy, seed) = (wiring::policy(&config), wiring::holder_seed()?);
    let (router, hooks) = (Arc::new(ArcSwap::from_pointee(router)), Arc::new(ArcSwap::from_pointee(hooks)));
    let worker = Worker::new(Arc::clone(&consumer), claims, Arc::clone(&router), policy, Arc::clone(&metrics), seed)
        .context("cannot start the threads for handlers of events")?;
    let source = Arc::clone(&consumer);
    let readiness =
        ops::unless_draining(&shutdown, move || source.ready().map(|()| None).map_err(|error| error.to_string()));
    let helpers = [
        tokio::spawn(ops::serve(ops_listener, Arc::clone(&metrics), readiness, shutdown.abort.clone())),
        tokio::spawn({
            let (consumer, metrics) = (Arc::clone(&consumer), Arc::clone(&metrics));
            async move {
                consumer.watch_up(|up| metrics.worker_broker_up.with_label_values(&[] as &[&str]).set(up.into())).await
            }
        }),
        tokio::spawn({
            let metrics = Arc::clone(&metrics);
            async move {
                redis.watch_up(|up| metrics.worker_redis_up.with_label_values(&[] as &[&str]).set(up.into())).await
            }
        }),
    ]
    .map(AbortOnDropHandle::new);
    let watch = again.map(|(source, code)| {
        let handlers = reload::handlers(router, Arc::clone(&hooks), code, &config);
        let parts = handlers.into_iter().chain(reload::backends(endpoint, addressed)).collect();
        let reloading = Reload::new(source, parts);
        AbortOnDropHandle::new(tokio::spawn(reloading.watch(config.clone(), hangup)))
    });
    ready();
    let stop = async {
        shutdown.drain.cancelled().await;
        consumer.stop().await;
    };
    let answering = async {
        let Some(calls) = calls else { return };
        let answering = CallWorker::new(Arc::clone(&calls), hooks, wiring::call_policy(&config), Arc::clone(&metrics));
        let stop = async {
            shutdown.drain.cancelled().await;
            calls.stop().await;
        };
        tokio::join!(answering.run(shutdown.clone()), stop);
        calls.close().await;
    };
    tokio::join!(worker.run(shutdown.clone()), stop, answering);
    for helper in helpers.into_iter().chain(watch) {
        helper.abort();
        drop(helper.await);
    }
    consumer.close().await;
    tracing::info!("stopped");
    Ok(())
}
