//! A queue that cannot recognise repeats, with a memory of what was seen next to it. Whatever the store, a repeat shows in one place:
//! what [`Enqueue::enqueue`] returns.

use std::sync::Arc;
use streamgate_core::envelope::Envelope;
use streamgate_core::ports::{Accepted, Enqueue, Seen, StoreError};
use streamgate_service::metrics::Metrics;

#[derive(Debug)]
pub struct Deduplicated<Q, S> {
    queue: Arc<Q>,
    seen: Arc<S>,
    metrics: Arc<Metrics>,
}

impl<Q: Enqueue, S: Seen> Deduplicated<Q, S> {
    pub fn new(queue: Arc<Q>, seen: Arc<S>, metrics: Arc<Metrics>) -> Deduplicated<Q, S> {
        Deduplicated { queue, seen, metrics }
    }
}

impl<Q: Enqueue, S: Seen> Enqueue for Deduplicated<Q, S> {
    /// Marks an event as seen only after it is durable: a memory that is lost or ahead costs duplicates, never events.
    async fn enqueue(&self, envelope: Envelope) -> Result<Accepted, StoreError> {
        match self.seen.contains(&envelope.key).await {
            Ok(true) => return Ok(Accepted::Duplicate),
            Ok(false) => {}
            Err(error) => {
                self.metrics.gateway_dedup_errors.inc();
                tracing::debug!(%error, "cannot look up whether an event was seen; going on without");
            }
        }
        let key = envelope.key.clone();
        let accepted = self.queue.enqueue(envelope).await?;
        if let Err(error) = self.seen.mark(&key).await {
            self.metrics.gateway_dedup_errors.inc();
            tracing::debug!(%error, "cannot mark an event as seen; a repeat of it would be enqueued again");
        }
        Ok(accepted)
    }

    fn ready(&self) -> Result<(), StoreError> {
        self.queue.ready()
    }

    fn connections_lost(&self) -> u64 {
        self.queue.connections_lost()
    }
}
