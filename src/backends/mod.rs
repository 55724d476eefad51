//! The backends of gateway and worker, one file each: from the configuration to the ports, and their lifecycle.

pub mod embedded;
#[cfg(feature = "services")]
pub mod rabbitmq;

use std::sync::Arc;
use std::time::Duration;
use streamgate_service::config::reader::Problem;
use streamgate_service::config::{Config, StoreKind};

/// One in this many deliveries in hand may be a parked event.
const PARKED_SHARE: usize = 4;

/// The values of a configuration that its backend cannot work with.
pub fn problems(config: &Config) -> Vec<Problem> {
    match config.store.kind {
        #[cfg(feature = "services")]
        StoreKind::RabbitMq => rabbitmq::limits::problems(config),
        #[cfg(not(feature = "services"))]
        StoreKind::RabbitMq => Vec::new(),
        // It has no limits of its own.
        StoreKind::Embedded => Vec::new(),
    }
}

/// The ports of a gateway.
#[derive(Debug)]
pub struct GatewayParts<E, A, W, L> {
    /// Makes events durable, and recognises repeats.
    pub enqueue: Arc<E>,
    /// Asks workers for the answers to hooks.
    pub calls: Arc<A>,
    /// Remembers first answers to hooks.
    pub answers: Arc<W>,
    pub lifecycle: Arc<L>,
}

/// The ports of a worker.
#[derive(Debug)]
pub struct WorkerParts<D, C, Q, R, L> {
    pub deliveries: Arc<D>,
    /// Most fresh deliveries that the store hands out before the first of them is settled.
    pub prefetch: usize,
    /// How long a delivery may wait before the store takes it back; `None` if it never does.
    pub longest_wait: Option<Duration>,
    pub claims: Arc<C>,
    /// Who has paused which route.
    pub records: Arc<R>,
    /// `None` if no handler answers hooks.
    pub calls: Option<Arc<Q>>,
    pub lifecycle: Arc<L>,
}

/// Warns about a removed route that has parked events.
fn log_orphan(route: &str, events: u64) {
    tracing::warn!(
        route,
        events,
        "events are parked for a route that is gone: bring it back, or put them back by `streamgate dead replay --queue parked.{route} --all`"
    );
}
