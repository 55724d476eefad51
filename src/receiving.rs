//! The receiving side, over any backend: the public port, its intake, and the hooks.

use crate::backends::GatewayParts;
use crate::reload::{Apps, Certificates, Part};
use std::collections::HashSet;
use std::sync::Arc;
use streamgate_core::ports::{Answers, Ask, Enqueue, Lifecycle};
use streamgate_gateway::{AccessLog, AnswerHook, Gateway, Hooks, Intake, Tls};
use streamgate_service::config::{AppConfig, Config};
use streamgate_service::metrics::Metrics;
use streamgate_service::ops::{self, Readiness};
use streamgate_service::shutdown::Shutdown;
use tokio::net::TcpListener;

#[derive(Debug)]
pub(crate) struct Receiving<E, A, W> {
    gateway: Gateway<E>,
    intake: Arc<Intake<E>>,
    hooks: Arc<Hooks<A, W>>,
    tls: Option<Tls>,
}

impl<E: Enqueue, A: Ask, W: Answers> Receiving<E, A, W> {
    /// `commands`: names of commands with an answer of their own. The backend owns the data directory by now, where
    /// certificates are kept too.
    pub(crate) fn new<L>(
        config: &Config,
        commands: HashSet<String>,
        parts: &GatewayParts<E, A, W, L>,
        metrics: &Arc<Metrics>,
    ) -> anyhow::Result<Receiving<E, A, W>> {
        let tls = config.gateway.tls.as_ref().map(|tls| Tls::load(tls, &config.store.data_dir, metrics)).transpose()?;
        let (calls, answers) = (Arc::clone(&parts.calls), Arc::clone(&parts.answers));
        let hooks = Hooks::new(&config.hooks, commands, calls, answers, Arc::clone(metrics));
        let answering: Arc<dyn AnswerHook> = Arc::<Hooks<_, _>>::clone(&hooks);
        let apps = AppConfig::table(&config.apps);
        let enqueue = Arc::clone(&parts.enqueue);
        let log = AccessLog::new(config.log.requests, Arc::clone(metrics));
        let intake = Arc::new(Intake::new(&config.gateway, &config.dedup, apps, enqueue, answering, log));
        let gateway = Gateway::new(config.gateway.clone(), Arc::clone(&intake), tls.clone());
        Ok(Receiving { gateway, intake, hooks, tls })
    }

    /// Whether webhooks would be accepted now.
    pub(crate) fn readiness(&self, backend: &Arc<impl Lifecycle>, shutdown: &Shutdown) -> Readiness {
        let (accepting, tls, backend) = (self.gateway.accepting(), self.tls.clone(), Arc::clone(backend));
        ops::unless_draining(shutdown, move || {
            accepting()?;
            let certificate = tls.as_ref().map_or(Ok(None), Tls::ready)?;
            Ok(ops::all([certificate, backend.ready()?]))
        })
    }

    /// The parts that are reloaded with the configuration. `apps`: those that the configuration has.
    pub(crate) fn reloaded(&self, apps: Vec<AppConfig>) -> [Box<dyn Part>; 2] {
        [Box::new(Apps::new(Arc::clone(&self.intake), apps)), Box::new(Certificates(self.tls.clone()))]
    }

    /// Renews the certificate, if it is obtained by ACME.
    pub(crate) fn renewing(&self) -> Option<impl Future<Output = ()> + Send + use<E, A, W>> {
        self.tls.clone().map(Tls::run)
    }

    /// Runs until the drain is done.
    pub(crate) async fn run(&self, listener: TcpListener, shutdown: Shutdown) {
        self.gateway.run(listener, shutdown).await;
    }

    /// Waits until the last answers are stored, before their store is closed.
    pub(crate) async fn close(&self) {
        self.hooks.close().await;
    }
}
