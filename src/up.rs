//! `streamgate up`: gateway and worker in one process on the embedded store.

use crate::cli::Global;
use crate::reload::Reload;
use crate::{dev, limits, output, wiring};
use anyhow::Context;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use streamgate_core::ports::{Deliveries, Enqueue};
use streamgate_gateway::{Gateway, Intake, Tls};
use streamgate_service::config::{AppConfig, Config, Source};
use streamgate_service::metrics::Metrics;
use streamgate_service::ops::{self, Readiness};
use streamgate_service::shutdown::{self, Shutdown};
use streamgate_store::sqlite::{Embedded, SeenWithinEnqueue};
use streamgate_worker::{Router, Worker};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

/// What `run` needs. Listeners are bound by the caller, so that tests can choose free ports.
#[derive(Debug)]
pub struct Up {
    pub config: Config,
    pub router: Router,
    pub listener: TcpListener,
    pub ops_listener: TcpListener,
    /// Where apps and certificates are read again.
    pub source: Source,
    /// Asks for that at once.
    pub reload: Arc<Notify>,
    pub metrics: Arc<Metrics>,
}

pub async fn command(global: &Global) -> anyhow::Result<ExitCode> {
    let loaded = global.load()?;
    let mut config = loaded.config;
    let development = config.apps.is_empty();
    // The reload compares with what the files say, so the development app is not part of it.
    let as_loaded = config.clone();
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
    let listener = bind(config.gateway.listen, "gateway.listen").await?;
    let ops_listener = bind(config.gateway.ops_listen, "gateway.ops_listen").await?;
    let greeting = greeting(&config, loaded.path.as_deref(), development, &listener, &ops_listener)?;
    let router = wiring::router(&config)?;
    let (source, metrics) = (global.source(), Metrics::new());
    let up = Up { config, router, listener, ops_listener, source, reload, metrics };
    run(up, as_loaded, shutdown.clone(), || output::line(&greeting)).await?;
    Ok(if shutdown.abort.is_cancelled() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Serves until the drain is done. `ready` is called when everything is open.
pub async fn run(
    up: Up,
    as_loaded: Config,
    shutdown: Shutdown,
    ready: impl FnOnce() -> std::io::Result<()>,
) -> anyhow::Result<()> {
    let Up { config, router, listener, ops_listener, source, reload, metrics } = up;
    let tls = config.gateway.tls.as_ref().map(|files| Tls::load(files, &metrics)).transpose()?;
    let store = Arc::new(Embedded::open(&wiring::store_options(&config))?);
    let names: Vec<_> = config.apps.iter().map(|app| app.name.as_str()).collect();
    metrics.begin(&names, &router.names());
    let apps = AppConfig::table(&config.apps);
    let seen = Arc::new(SeenWithinEnqueue);
    let intake = Arc::new(Intake::new(&config.gateway, apps, Arc::clone(&store), seen, Arc::clone(&metrics)));
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).context("cannot get random bytes from the system")?;
    let seed = u64::from_ne_bytes(seed);
    let policy = wiring::policy(&config);
    let worker = Worker::new(Arc::clone(&store), Arc::clone(&store), router, policy, Arc::clone(&metrics), seed);
    let readiness = readiness(&store, &shutdown);
    let ops = ops::serve(ops_listener, Arc::clone(&metrics), readiness, shutdown.abort.clone());
    let ops = AbortOnDropHandle::new(tokio::spawn(ops));
    let watch = Reload { source, intake: Arc::clone(&intake), tls: tls.clone(), metrics };
    let watch = AbortOnDropHandle::new(tokio::spawn(watch.watch(as_loaded, reload)));
    let gateway = Gateway::new(config.gateway, intake, tls);
    ready().context("cannot write to stdout")?;
    // Both drain at once: events that come in meanwhile are durable, and delivered after the next start.
    tokio::join!(gateway.run(listener, shutdown.clone()), worker.run(shutdown.clone()));
    for helper in [ops, watch] {
        helper.abort();
        drop(helper.await);
    }
    drop((gateway, worker));
    match Arc::try_unwrap(store) {
        Ok(store) => store.close().await,
        // A connection outlived the drain; what it was promised is committed, and the kernel frees the lock.
        Err(_) => tracing::warn!("the store is still in use; leaving it to the kernel"),
    }
    tracing::info!("stopped");
    Ok(())
}

fn readiness(store: &Arc<Embedded>, shutdown: &Shutdown) -> Readiness {
    let (store, draining) = (Arc::downgrade(store), shutdown.drain.clone());
    Arc::new(move || {
        if draining.is_cancelled() {
            return Err("draining".to_owned());
        }
        let store = store.upgrade().ok_or("the store is closed")?;
        let told = Enqueue::ready(&*store).and_then(|()| Deliveries::ready(&*store));
        told.map_err(|error| error.to_string())
    })
}

async fn bind(address: SocketAddr, key: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        let variable = format!("STREAMGATE__{}", key.to_uppercase().replace('.', "__"));
        format!("cannot listen on {address}; set {key} (or {variable}) to another address, port 0 for any free one")
    })
}

/// What a person needs at the start, with a command to paste that works as it stands.
fn greeting(
    config: &Config,
    path: Option<&Path>,
    is_dev: bool,
    listener: &TcpListener,
    ops_listener: &TcpListener,
) -> anyhow::Result<String> {
    let scheme = if config.gateway.tls.is_some() { "https" } else { "http" };
    let base = format!("{scheme}://{}", reachable(listener.local_addr()?));
    let data_dir = std::path::absolute(&config.store.data_dir)?;
    let key = config.apps.first().and_then(|app| app.keys.first()).map_or("", |key| key.api_key.as_str());
    let secret = if is_dev { format!(", secret in {}", dev::secret_file(&data_dir).display()) } else { String::new() };
    let mut words = vec![program(), "send".into(), "--url".into(), base.clone()];
    words.extend(["--data-dir".into(), data_dir.display().to_string()]);
    if let Some(path) = path {
        words.extend(["--config".into(), std::path::absolute(path)?.display().to_string()]);
    }
    let note = match (path, is_dev, scheme) {
        (_, _, "https") => "\n\n(Put the certificate's host name into --url, and name a private authority by --ca.)",
        (None, false, _) => "\n\n(There, too, the environment must hold the API key and its secret.)",
        (Some(_), _, _) | (_, true, _) => "",
    };
    let command = shlex::try_join(words.iter().map(String::as_str)).context("a path holds a zero byte")?;
    Ok(format!(
        "Streamgate {version} is up.\n\n\
         \x20 webhooks  {base}/webhooks/stream/push\n\
         \x20 metrics   http://{ops}/metrics\n\
         \x20 data      {data}\n\
         \x20 API key   {key}{secret}\n\n\
         Send a signed event from another terminal:\n\n\
         \x20 {command}{note}\n",
        version = env!("CARGO_PKG_VERSION"),
        ops = reachable(ops_listener.local_addr()?),
        data = data_dir.display(),
    ))
}

/// An address that a client on this machine can use.
fn reachable(address: SocketAddr) -> SocketAddr {
    let mut reachable = address;
    if address.ip().is_unspecified() {
        reachable.set_ip(if address.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
    }
    reachable
}

/// This program, by a path that works from any directory.
fn program() -> String {
    let path = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("streamgate"));
    path.display().to_string()
}
