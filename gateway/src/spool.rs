//! The order of trust: a confirmed publish, else a committed row on the gateway's own disk, else 503. What is on the disk goes
//! on to the queue when that takes events again (`drain`).

use std::collections::HashSet;
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
use tokio_util::task::TaskTracker;

/// The longest wait between tries to let a row go while the disk fails. There is no last try: the event is in the queue, and
/// would be handed over a second time.
const RELEASE_BACKOFF: Duration = Duration::from_secs(2);

/// When a queue is not waited for any longer.
#[derive(Clone, Copy, Debug)]
pub struct SpoolPolicy {
    /// The oldest unconfirmed publish is this old: new events go to the disk at once.
    pub spool_after: Duration,
    /// A publish is this old: its event goes to the disk too. Its confirm, if it still comes, removes it there.
    pub confirm_timeout: Duration,
}

/// A queue with a disk behind it.
#[derive(Debug)]
pub struct Spooled<Q, D> {
    pub(crate) desk: Arc<Desk<Q, D>>,
}

#[derive(Debug)]
pub(crate) struct Desk<Q, D> {
    pub(crate) queue: Arc<Q>,
    pub(crate) spool: Arc<D>,
    gate: Mutex<Gate>,
    /// Keys of events on the disk whose publish is still under way: not handed over while it may be confirmed.
    late: Mutex<HashSet<String>>,
    confirm_timeout: Duration,
    /// Told of what changes for the drain: an event on the disk, an opened gate.
    pub(crate) news: Notify,
    /// Confirms that are awaited beyond their callers.
    pub(crate) tasks: TaskTracker,
    pub(crate) metrics: Arc<Metrics>,
}

impl<Q: Enqueue, D: Spool> Spooled<Q, D> {
    pub fn new(queue: Arc<Q>, spool: Arc<D>, policy: SpoolPolicy, metrics: Arc<Metrics>) -> Spooled<Q, D> {
        Spooled {
            desk: Arc::new(Desk {
                queue,
                spool,
                gate: Mutex::new(Gate::new(policy.spool_after)),
                late: Mutex::default(),
                confirm_timeout: policy.confirm_timeout,
                news: Notify::new(),
                tasks: TaskTracker::new(),
                metrics,
            }),
        }
    }
}

impl<Q: Enqueue, D: Spool> Enqueue for Spooled<Q, D> {
    async fn enqueue(&self, envelope: Envelope) -> Result<Accepted, StoreError> {
        let desk = &self.desk;
        if !desk.is_open() {
            return desk.keep_or_publish(envelope).await;
        }
        let mut publish = desk.publish(envelope.clone());
        match tokio::time::timeout(desk.confirm_timeout, &mut publish).await {
            Ok(Ok(())) => Ok(Accepted::Enqueued),
            Ok(Err(error)) => {
                tracing::debug!(%error, key = envelope.key, "not published: to the spool");
                desk.keep(envelope).await
            }
            Err(_) => desk.keep_late(envelope, publish).await,
        }
    }

    fn ready(&self) -> Result<(), StoreError> {
        let (queue, spool) = (self.desk.queue.ready(), self.desk.spool.ready());
        match (queue, spool) {
            (Err(queue), Err(spool)) => Err(StoreError::Unavailable(format!("{queue}; and the spool: {spool}"))),
            _ => Ok(()),
        }
    }
}

type Publish = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send>>;

impl<Q: Enqueue, D: Spool> Desk<Q, D> {
    pub(crate) fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether events go to the queue now.
    pub(crate) fn is_open(&self) -> bool {
        self.queue.ready().is_ok() && self.gate().is_open(Instant::now().into_std())
    }

    pub(crate) fn is_late(&self, key: &str) -> bool {
        self.late.lock().unwrap_or_else(PoisonError::into_inner).contains(key)
    }

    /// Publishes, and lets the gate know how that ends.
    pub(crate) fn publish(self: &Arc<Self>, envelope: Envelope) -> Publish {
        let ticket = self.gate().begin(Instant::now().into_std());
        let ticket = Ticket { desk: Arc::clone(self), ticket, ended: Ended::GivenUp };
        Box::pin(async move {
            let told = ticket.desk.queue.enqueue(envelope).await;
            ticket.end(if told.is_ok() { Ended::Confirmed } else { Ended::Failed });
            told.map(drop)
        })
    }

    async fn keep(&self, envelope: Envelope) -> Result<Accepted, StoreError> {
        let row = self.spool.keep(envelope).await?;
        self.news.notify_one();
        Ok(row.map_or(Accepted::Duplicate, |_| Accepted::Spooled))
    }

    /// The queue is slow or refuses; it is still better than a disk that does neither.
    async fn keep_or_publish(self: &Arc<Self>, envelope: Envelope) -> Result<Accepted, StoreError> {
        let Err(error) = self.spool.ready() else { return self.keep(envelope).await };
        match self.keep(envelope.clone()).await {
            Err(_) if self.queue.ready().is_ok() => {
                self.publish(envelope).await.map(|()| Accepted::Enqueued).map_err(|_| error)
            }
            told => told,
        }
    }

    /// The confirm is overdue: the disk makes the event durable, and whichever comes later is undone.
    async fn keep_late(self: &Arc<Self>, envelope: Envelope, publish: Publish) -> Result<Accepted, StoreError> {
        // Before it is on the disk: the drain must not see it there and publish it a second time.
        let late = Late::mark(self, envelope.key.clone());
        let row = match self.spool.keep(envelope).await {
            Ok(row) => row,
            // The queue still may take it, for as long as the caller waits.
            Err(error) => return publish.await.map(|()| Accepted::Enqueued).map_err(|_| error),
        };
        let desk = Arc::clone(self);
        self.tasks.spawn(async move {
            let told = publish.await;
            if let (Ok(()), Some(row)) = (told, row) {
                desk.release(vec![row]).await;
            }
            drop(late);
            desk.news.notify_one();
        });
        Ok(row.map_or(Accepted::Duplicate, |_| Accepted::Spooled))
    }

    /// Lets rows go whose events are in the queue.
    pub(crate) async fn release(&self, rows: Vec<i64>) {
        let mut wait = Duration::from_millis(50);
        while let Err(error) = self.spool.release(rows.clone()).await {
            tracing::warn!(%error, events = rows.len(), "cannot remove events from the spool, trying again");
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RELEASE_BACKOFF);
        }
        self.metrics.spool_released.inc_by(rows.len() as u64);
    }
}

/// A publish under way, as the gate knows it, however it ends.
struct Ticket<Q: Enqueue, D: Spool> {
    desk: Arc<Desk<Q, D>>,
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
        if self.desk.gate().end(self.ticket, self.ended) {
            self.desk.news.notify_one();
        }
    }
}

/// A mark in `late`, taken away however the wait ends.
struct Late<Q, D> {
    desk: Arc<Desk<Q, D>>,
    key: String,
}

impl<Q, D> Late<Q, D> {
    fn mark(desk: &Arc<Desk<Q, D>>, key: String) -> Late<Q, D> {
        desk.late.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone());
        Late { desk: Arc::clone(desk), key }
    }
}

impl<Q, D> Drop for Late<Q, D> {
    fn drop(&mut self) {
        self.desk.late.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}
