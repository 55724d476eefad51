//! The embedded store: gateway and worker in one process, on one file.

use super::{GatewayParts, PARKED_SHARE, WorkerParts};
use crate::wiring;
use arc_swap::ArcSwap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streamgate_core::ports::{Deliveries, Enqueue, Lifecycle};
use streamgate_service::config::{self, Config, ConfigError, Loaded, Source};
use streamgate_service::metrics::Metrics;
use streamgate_store::memory::InProcess;
use streamgate_store::sqlite::{Depths, Embedded, InstanceFile, OpenError, Options};
use streamgate_worker::Router;
use tokio::time::MissedTickBehavior;

/// Interval between counts of the store's rows.
const LOOK: Duration = Duration::from_secs(5);

/// The ports of both services over the store, and the lifecycle that they share.
pub type Gateway = GatewayParts<Embedded, InProcess, Embedded, Store>;
pub type Worker = WorkerParts<Embedded, Embedded, InProcess, Embedded, Store>;

/// The running store.
#[derive(Debug)]
pub struct Store {
    store: Arc<Embedded>,
    router: Arc<ArcSwap<Router>>,
    metrics: Arc<Metrics>,
    instances: Arc<InstanceFile>,
}

/// Interval between log lines about events that are parked for removed routes.
const ORPHANS: Duration = Duration::from_secs(60 * 60);
/// Loads a configuration for `up`.
pub fn load(source: &Source) -> Result<Loaded, ConfigError> {
    config::load(source, super::problems)
}

/// Takes the data directory, and starts the store. `answers`: whether there are hook handlers.
pub fn open(
    config: &Config,
    router: &Arc<ArcSwap<Router>>,
    answers: bool,
    metrics: &Arc<Metrics>,
) -> Result<(Gateway, Worker), OpenError> {
    let in_hand = wiring::in_hand(config, &wiring::limits(config, &router.load()));
    let store = Arc::new(Embedded::open(&options(config, in_hand))?);
    let calls = Arc::new(InProcess::new(config.gateway.max_in_flight, answers));
    let router = Arc::clone(router);
    let instances = Arc::new(InstanceFile::of(&config.store.data_dir));
    let lifecycle = Arc::new(Store { store: Arc::clone(&store), router, metrics: Arc::clone(metrics), instances });
    let gateway = GatewayParts {
        enqueue: Arc::clone(&store),
        calls: Arc::clone(&calls),
        answers: Arc::clone(&store),
        lifecycle: Arc::clone(&lifecycle),
    };
    let prefetch = in_hand - in_hand / PARKED_SHARE;
    let (deliveries, claims) = (Arc::clone(&store), Arc::clone(&store));
    let worker =
        WorkerParts { deliveries, prefetch, longest_wait: None, claims, records: store, calls: Some(calls), lifecycle };
    Ok((gateway, worker))
}

/// `in_hand`: writes for settlements, at most one for each delivery in hand, in addition to those of requests.
fn options(config: &Config, in_hand: usize) -> Options {
    Options {
        data_dir: config.store.data_dir.clone(),
        max_bytes: config.store.spool_max as u64,
        seen_window: config.dedup.window,
        remember: config.worker.claim_window,
        max_waiting: config.gateway.max_in_flight + in_hand,
        prefetch: in_hand,
        parked_share: PARKED_SHARE,
        in_hand_bytes: config.worker.memory_budget,
        // The timeout of its own handler, and of those before it if it has to run alone.
        patience: config.worker.longest_handler_timeout().saturating_mul(2),
    }
}

impl Lifecycle for Store {
    type Instances = InstanceFile;

    fn instances(&self) -> Arc<InstanceFile> {
        Arc::clone(&self.instances)
    }

    fn ready(&self) -> Result<Option<String>, String> {
        let ready = Enqueue::ready(&*self.store).and_then(|()| Deliveries::ready(&*self.store));
        ready.map(|()| None).map_err(|error| error.to_string())
    }

    async fn watch(&self) {
        let mut orphans_logged: Option<Instant> = None;
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match self.store.depths().await {
                Ok(Depths { waiting, retrying, parked, dead }) => {
                    for (queue, events) in [("waiting", waiting), ("retrying", retrying), ("dead", dead)] {
                        self.metrics.queue_messages.with_label_values(&[queue]).set(events);
                    }
                    let router = self.router.load_full();
                    let routes = || router.names().into_iter();
                    if orphans_logged.is_none_or(|at| at.elapsed() >= ORPHANS) {
                        orphans_logged = Some(Instant::now());
                        let is_gone = |name: &str| !routes().any(|route| route == name);
                        let orphans = parked.iter().filter(|(route, _)| is_gone(route));
                        orphans.for_each(|(route, events)| super::log_orphan(route, events.unsigned_abs()));
                    }
                    for route in routes() {
                        let events = parked.iter().find(|(parked_for, _)| parked_for == route);
                        let events = events.map_or(0, |(_, events)| *events);
                        self.metrics.worker_parked_events.with_label_values(&[route]).set(events);
                    }
                }
                Err(error) => tracing::debug!(%error, "cannot count waiting events"),
            }
        }
    }

    /// Nothing to stop: events that arrive during the drain are durable, and delivered after the next start.
    async fn stop(&self, _by: Instant) {}

    async fn close(&self) {
        self.store.close().await;
    }
}
