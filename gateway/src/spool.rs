//! Makes events durable: by a confirmed publish, else by a committed row on the gateway's own disk; else the answer is 503. Rows
//! on the disk are handed over when the queue takes events again (`hand_over`).

use crate::progress::Progress;
use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use streamgate_core::{
    envelope::Envelope,
    gate::{Ended, Gate},
    ports::{Accepted, Enqueue, Spool, StoreError},
};
use streamgate_service::metrics::Metrics;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The longest wait between tries to release a row while the disk fails. The tries never end: the event is in the queue, and
/// would be handed over a second time.
const RELEASE_BACKOFF: Duration = Duration::from_secs(2);

/// When the gateway stops waiting for the queue.
#[derive(Clone, Copy, Debug)]
pub struct SpoolPolicy {
    /// When the oldest unconfirmed publish is this old, new events go to the disk at once.
    pub spool_after: Duration,
    /// When a publish is this old, its event goes to the disk too. A confirm that still comes removes it there.
    pub confirm_timeout: Duration,
}

/// A queue with a disk as its fallback.
#[derive(Debug)]
pub struct Spooled<Q, D> {
    pub(crate) state: Arc<SpoolState<Q, D>>,
}

/// State shared by callers and the hand-over.
#[derive(Debug)]
pub(crate) struct SpoolState<Q, D> {
    pub(crate) queue: Arc<Q>,
    pub(crate) spool: Arc<D>,
    gate: Mutex<Gate>,
    /// Keys of events on the disk whose publish is still under way, with the number of publishes. They are not handed over while
    /// one of these may be confirmed.
    late: Mutex<HashMap<String, usize>>,
    confirm_timeout: Duration,
    pub(crate) progress: tokio::sync::Mutex<Progress>,
    /// Notifies the hand-over of an event on the disk or an opened gate.
    pub(crate) changed: Notify,
    /// Cancelled at the end of a stop, when whatever still runs has had its time.
    pub(crate) given_up: CancellationToken,
    /// Confirms that are awaited after their callers have left, and the releases that follow.
    pub(crate) tasks: TaskTracker,
    pub(crate) metrics: Arc<Metrics>,
}

impl<Q: Enqueue, D: Spool> Spooled<Q, D> {
    pub fn new(queue: Arc<Q>, spool: Arc<D>, policy: SpoolPolicy, metrics: Arc<Metrics>) -> Spooled<Q, D> {
        Spooled {
            state: Arc::new(SpoolState {
                queue,
                spool,
                gate: Mutex::new(Gate::new(policy.spool_after)),
                late: Mutex::default(),
                confirm_timeout: policy.confirm_timeout,
                progress: tokio::sync::Mutex::default(),
                changed: Notify::new(),
                given_up: CancellationToken::new(),
                tasks: TaskTracker::new(),
                metrics,
            }),
        }
    }
}

impl<Q: Enqueue, D: Spool> Enqueue for Spooled<Q, D> {
    async fn enqueue(&self, envelope: Envelope) -> Result<Accepted, StoreError> {
        let state = &self.state;
        if !state.is_open() {
            return state.keep_or_publish(envelope).await;
        }
        let mut publish = state.publish(envelope.clone());
        match tokio::time::timeout(state.confirm_timeout, &mut publish).await {
            Ok(Ok(())) => Ok(Accepted::Enqueued),
            Ok(Err(error)) => {
                tracing::debug!(%error, key = envelope.key, "not published, writing to the spool");
                state.keep(envelope).await.map(kept)
            }
            Err(_) => {
                let late = Late::mark(state, envelope.key.clone());
                state.either(late, state.keep(envelope), publish).await
            }
        }
    }

    fn ready(&self) -> Result<(), StoreError> {
        let Err(spool) = self.state.spool.ready() else { return Ok(()) };
        // Events still go to RabbitMQ, but there is no fallback any more.
        if matches!(spool, StoreError::Gone(_)) {
            return Err(spool);
        }
        if self.state.is_open() {
            return Ok(());
        }
        let queue = self.state.queue.ready().err();
        let queue = queue.as_ref().map_or("the queue refuses or does not confirm", StoreError::reason);
        Err(StoreError::Unavailable(format!("{queue}; and the spool: {spool}")))
    }
}

/// What a committed row means for its caller.
fn kept(row: Option<i64>) -> Accepted {
    row.map_or(Accepted::Duplicate, |_| Accepted::Spooled)
}

type Publish = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send>>;
type Keep = Pin<Box<dyn Future<Output = Result<Option<i64>, StoreError>> + Send>>;

impl<Q: Enqueue, D: Spool> SpoolState<Q, D> {
    pub(crate) fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether new events go to the queue now.
    pub(crate) fn is_open(&self) -> bool {
        self.queue.ready().is_ok() && self.gate().is_open(Instant::now().into_std())
    }

    fn late_ones(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn late(&self) -> HashSet<String> {
        self.late_ones().keys().cloned().collect()
    }

    pub(crate) fn is_late(&self, key: &str) -> bool {
        self.late_ones().contains_key(key)
    }

    /// Publishes an event and reports the result to the gate.
    fn publish(self: &Arc<Self>, envelope: Envelope) -> Publish {
        self.publish_as(envelope, Ended::Failed)
    }

    /// `refused` is what the gate gets if the event is not confirmed.
    pub(crate) fn publish_as(self: &Arc<Self>, envelope: Envelope, refused: Ended) -> Publish {
        let ticket = self.gate().begin(Instant::now().into_std());
        let ticket = Ticket { state: Arc::clone(self), ticket, ended: Ended::GivenUp };
        Box::pin(async move {
            let result = ticket.state.queue.enqueue(envelope).await;
            ticket.end(if result.is_ok() { Ended::Confirmed } else { refused });
            result.map(drop)
        })
    }

    /// Makes an event durable on the disk and notifies the hand-over.
    fn keep(self: &Arc<Self>, envelope: Envelope) -> Keep {
        let state = Arc::clone(self);
        Box::pin(async move {
            let row = state.spool.keep(envelope).await?;
            state.changed.notify_one();
            Ok(row)
        })
    }

    /// Tries the disk first because the queue is slow or refuses; but if the disk fails or is slow too, the queue is tried as
    /// well.
    async fn keep_or_publish(self: &Arc<Self>, envelope: Envelope) -> Result<Accepted, StoreError> {
        let mut keep = self.keep(envelope.clone());
        match tokio::time::timeout(self.confirm_timeout, &mut keep).await {
            Ok(Err(error)) if self.queue.ready().is_ok() => {
                self.publish(envelope).await.map(|()| Accepted::Enqueued).map_err(|_| error)
            }
            Ok(result) => result.map(kept),
            Err(_) if self.queue.ready().is_ok() => {
                let late = Late::mark(self, envelope.key.clone());
                self.either(late, keep, self.publish(envelope)).await
            }
            Err(_) => keep.await.map(kept),
        }
    }

    /// Waits for the row or the confirm, whichever makes the event durable first; a confirmed event's row is released. `late` was
    /// marked before the row or the publish became visible, so that the hand-over does not publish the event too.
    async fn either(
        self: &Arc<Self>,
        late: Late<Q, D>,
        mut keep: Keep,
        mut publish: Publish,
    ) -> Result<Accepted, StoreError> {
        let state = Arc::clone(self);
        let row = tokio::select! {
            row = &mut keep => row,
            result = &mut publish => {
                // The publish failed: only the disk can make the event durable.
                let Ok(()) = result else {
                    return keep.await.map(kept);
                };
                // While the disk hangs no task waits for it, or such tasks would pile up. A row that it writes after all is a
                // repeat.
                if self.spool.ready().is_ok() {
                    self.tasks.spawn(async move {
                        if let Ok(Some(row)) = keep.await {
                            state.release(vec![row]).await;
                        }
                        drop(late);
                    });
                }
                return Ok(Accepted::Enqueued);
            }
        };
        let row = match row {
            Ok(row) => row,
            // The queue may still take it, for as long as the caller waits.
            Err(error) => return publish.await.map(|()| Accepted::Enqueued).map_err(|_| error),
        };
        self.tasks.spawn(async move {
            if let (Ok(()), Some(row)) = (publish.await, row) {
                state.release(vec![row]).await;
            }
            drop(late);
            state.changed.notify_one();
        });
        Ok(kept(row))
    }

    /// Releases rows whose events are in the queue.
    pub(crate) async fn release(&self, rows: Vec<i64>) {
        let mut wait = Duration::from_millis(50);
        while let Err(error) = self.spool.release(rows.clone()).await {
            tracing::warn!(%error, events = rows.len(), "cannot remove events from the spool, trying again");
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // The disk is closed after this. The rows stay, and are handed over once more.
                () = self.given_up.cancelled() => return,
            }
            wait = (wait * 2).min(RELEASE_BACKOFF);
        }
        self.metrics.spool_released.inc_by(rows.len() as u64);
    }
}

/// A publish under way, registered with the gate; its end is reported on drop.
struct Ticket<Q: Enqueue, D: Spool> {
    state: Arc<SpoolState<Q, D>>,
    ticket: u64,
    ended: Ended,
}

impl<Q: Enqueue, D: Spool> Ticket<Q, D> {
    fn end(mut self, how: Ended) {
        self.ended = how;
    }
}

impl<Q: Enqueue, D: Spool> Drop for Ticket<Q, D> {
    fn drop(&mut self) {
        if self.state.gate().end(self.ticket, self.ended) {
            self.state.changed.notify_one();
        }
    }
}

/// A mark in `late`, removed on drop.
struct Late<Q: Enqueue, D: Spool> {
    state: Arc<SpoolState<Q, D>>,
    key: String,
}

impl<Q: Enqueue, D: Spool> Late<Q, D> {
    fn mark(state: &Arc<SpoolState<Q, D>>, key: String) -> Late<Q, D> {
        *state.late_ones().entry(key.clone()).or_default() += 1;
        Late { state: Arc::clone(state), key }
    }
}

impl<Q: Enqueue, D: Spool> Drop for Late<Q, D> {
    fn drop(&mut self) {
        let mut late = self.state.late_ones();
        if let Some(count) = late.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                late.remove(&self.key);
            }
        }
    }
}
