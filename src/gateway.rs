//! `streamgate gateway`: verifies, deduplicates in Redis, publishes to RabbitMQ, answers.

use crate::cli::Global;
use crate::exit::BadUsage;
use crate::greeting::{self, Greeting};
use crate::reload::{self, Apps, Certificates, Part, Reload};
use crate::wiring::{Backends, GatewayStores};
use crate::{limits, output, wiring};
use anyhow::Context;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::path::PUSH;
use streamgate_core::ports::{Enqueue, Spool};
use streamgate_gateway::{AccessLog, AnswerHook, Gateway, Hooks, Intake, Tls};
use streamgate_service::config::{AppConfig, Loaded, Source};
use streamgate_service::metrics::Metrics;
use streamgate_service::ops;
use streamgate_service::shutdown::{self, Shutdown};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Balancers commonly look every second.
const DRAIN_LEAST: Duration = Duration::from_secs(1);

/// What `run` needs. Listeners are bound by the caller, so that tests can choose free ports.
#[derive(Debug)]
pub struct Front {
    pub loaded: Loaded,
    pub listener: TcpListener,
    pub ops_listener: TcpListener,
    /// Where apps and certificates are read again.
    pub source: Source,
    /// Asks for that at once.
    pub reload: Arc<Notify>,
    pub metrics: Arc<Metrics>,
}

pub async fn command(global: &Global) -> anyhow::Result<ExitCode> {
    let source = global.source();
    // Its routes are the worker's, with their secrets.
    let source = Source { environment: source.environment.without_route_secrets(), ..source };
    let loaded = global.load_from(&source)?.for_services()?;
    let config = &loaded.config;
    if config.apps.is_empty() {
        let what = "no app is configured: add [[apps]], or set STREAM_API_KEY and STREAM_API_SECRET";
        return Err(BadUsage(what.to_owned()).into());
    }
    let backends = Backends::of(&loaded)?;
    limits::raise_open_files(config.gateway.max_connections);
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
        .line("RabbitMQ", backends.endpoint.address())
        .line("Redis", &backends.address)
        .line("API key", greeting::key(&loaded, false)?)
        .try_it(&loaded, false, &listener)?
        .into_text();
    let front = Front { loaded, listener, ops_listener, source, reload, metrics: Metrics::new() };
    run(front, shutdown.clone(), || output::greet(greeting)).await?;
    Ok(shutdown.code())
}

/// Serves until the drain is done. `ready` is called when everything is open; the backends may not be there yet.
pub async fn run(front: Front, shutdown: Shutdown, ready: impl FnOnce()) -> anyhow::Result<()> {
    let Front { loaded, listener, ops_listener, source, reload, metrics } = front;
    let backends = Backends::of(&loaded)?;
    let mut config = loaded.config;
    config.gateway.drain_least.get_or_insert(DRAIN_LEAST.min(config.gateway.drain_timeout / 2));
    let data_dir = config.store.data_dir.clone();
    metrics.begin(&AppConfig::names(&config.apps), &[]);
    let endpoint = backends.endpoint.clone();
    let stores = GatewayStores::start(&config, backends, &metrics)?;
    let GatewayStores { exchange, spool, seen, calls, answers, redis } = stores;
    // After the stores: the data directory is this process's now.
    let tls = config.gateway.tls.as_ref().map(|tls| Tls::load(tls, &data_dir, &metrics)).transpose()?;
    let spooled = Arc::new(wiring::spooled(&config, &exchange, &spool, &metrics));
    let apps = AppConfig::table(&config.apps);
    let hooks =
        Hooks::new(&config.hooks, wiring::command_names(&config), Arc::clone(&calls), answers, Arc::clone(&metrics));
    let hooked: Arc<dyn AnswerHook> = Arc::<Hooks<_, _>>::clone(&hooks);
    let (store, keys) = (Arc::clone(&spooled), Arc::clone(&seen));
    let log = AccessLog::new(config.log.requests, Arc::clone(&metrics));
    let intake = Arc::new(Intake::new(&config.gateway, &config.dedup, apps, store, keys, hooked, log));
    let (durable, broker) = (Arc::downgrade(&spooled), Arc::clone(&exchange));
    let patience = config.gateway.drain_timeout;
    let gateway = Gateway::new(config.gateway.clone(), Arc::clone(&intake), tls.clone());
    let (accepting, secured) = (gateway.accepting(), tls.clone());
    let readiness = ops::unless_draining(&shutdown, move || {
        accepting()?;
        // Without RabbitMQ events go to the spool, wherever they went before.
        if let (Ok(()), Some(why)) = (broker.ready(), broker.diverted()) {
            return Err(why.to_string());
        }
        let but = secured.as_ref().map_or(Ok(None), Tls::ready)?;
        let durable = durable.upgrade().ok_or("the spool is closed")?;
        durable.ready().map_err(|error| error.to_string())?;
        let broken = broker.ready().err().map(|why| format!("events go to the spool: {why}"));
        Ok(ops::all([but, broken]))
    });
    let helpers = [
        tokio::spawn(ops::serve(ops_listener, Arc::clone(&metrics), readiness, shutdown.abort.clone())),
        tokio::spawn({
            let (exchange, metrics) = (Arc::clone(&exchange), Arc::clone(&metrics));
            async move {
                exchange.watch_up(|up| metrics.gateway_broker_up.with_label_values(&[] as &[&str]).set(up.into())).await
            }
        }),
        tokio::spawn({
            let (exchange, metrics, ladder) =
                (Arc::clone(&exchange), Arc::clone(&metrics), config.worker.retry.clone());
            async move {
                let depth =
                    |queue, messages: u32| metrics.queue_messages.with_label_values(&[queue]).set(messages.into());
                exchange.watch_queues(&ladder, depth).await
            }
        }),
        tokio::spawn({
            let (calls, metrics) = (Arc::clone(&calls), Arc::clone(&metrics));
            async move {
                let there = metrics.gateway_hook_workers.with_label_values(&[] as &[&str]);
                calls.watch_workers(|is_there| there.set(is_there.into())).await
            }
        }),
        tokio::spawn({
            let (redis, metrics) = (redis.clone(), Arc::clone(&metrics));
            async move {
                redis.watch_up(|up| metrics.gateway_redis_up.with_label_values(&[] as &[&str]).set(up.into())).await
            }
        }),
        tokio::spawn({
            let apps = Apps::new(Arc::clone(&intake), config.apps.clone());
            let parts: [Box<dyn Part>; 2] = [Box::new(apps), Box::new(Certificates(tls.clone()))];
            let parts = parts.into_iter().chain(reload::backends(endpoint, redis)).collect();
            let reloading = Reload::new(source, parts);
            reloading.watch(config.clone(), reload)
        }),
    ]
    .map(AbortOnDropHandle::new);
    let renewing = tls.map(|tls| AbortOnDropHandle::new(tokio::spawn(tls.run())));
    drop(intake);
    ready();
    let answered = CancellationToken::new();
    let receiving = async {
        gateway.run(listener, shutdown.clone()).await;
        answered.cancel();
    };
    // A second signal ends that too: what is on the disk stays there.
    let draining = async {
        tokio::select! {
            left = spooled.drain(&answered, patience) => left,
            () = shutdown.abort.cancelled() => spool.usage().events,
        }
    };
    let ((), left) = tokio::join!(receiving, draining);
    for helper in helpers.into_iter().chain(renewing) {
        helper.abort();
        drop(helper.await);
    }
    drop(gateway);
    hooks.close().await;
    seen.close().await;
    drop(spooled);
    tokio::join!(exchange.close(), calls.close());
    // A connection may outlive the drain: what it was promised is committed, and it is promised nothing more.
    spool.close().await;
    if left > 0 {
        tracing::warn!(
            events = left, data_dir = %data_dir.display(),
            "events are left in the spool: the next gateway on this directory hands them over, or `streamgate drain`"
        );
    }
    tracing::info!("stopped");
    Ok(())
}
