//! What a gateway and a worker work on, a file for each backend: from the configuration to the ports, and their lifecycle.

pub mod embedded;
#[cfg(feature = "services")]
pub mod rabbitmq;

use std::sync::Arc;

/// What a gateway works on.
#[derive(Debug)]
pub struct GatewayParts<E, S, A, W, L> {
    /// Makes events durable.
    pub enqueue: Arc<E>,
    /// Remembers which events are durable.
    pub seen: Arc<S>,
    /// Asks workers for the answers to hooks.
    pub calls: Arc<A>,
    /// Remembers the answers to hooks.
    pub answers: Arc<W>,
    pub lifecycle: Arc<L>,
}

/// What a worker works on.
#[derive(Debug)]
pub struct WorkerParts<D, C, Q, L> {
    pub deliveries: Arc<D>,
    /// Most fresh deliveries that it hands out before the first of them is settled.
    pub prefetch: usize,
    pub claims: Arc<C>,
    /// None where nothing answers hooks.
    pub calls: Option<Arc<Q>>,
    pub lifecycle: Arc<L>,
}
