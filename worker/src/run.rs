//! The worker's life: it dispatches until the drain begins, and then settles what is in hand.

use crate::attempts::AttemptLog;
use crate::delivery::{Policy, Processor};
use crate::dispatch::Dispatcher;
use crate::isolation::Isolation;
use crate::pauses::Pauses;
use crate::router::Router;
use crate::threads::Threads;
use crate::unmatched_log::UnmatchedLog;
use arc_swap::ArcSwap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::ports::{Claims, Deliveries, RouteRecords};
use streamgate_service::{metrics::Metrics, shutdown::Shutdown};
use tokio_util::task::AbortOnDropHandle;

/// How long an abort waits for what is in hand: a handler that blocks its thread does not notice the abort.
const CUT: Duration = Duration::from_secs(1);

/// The stores a worker works with.
#[derive(Debug)]
pub struct Stores<D, C, R> {
    pub deliveries: Arc<D>,
    pub claims: Arc<C>,
    /// Who has paused which route.
    pub records: Arc<R>,
}

/// Consumes deliveries until the drain begins.
#[derive(Debug)]
pub struct Worker<D, C, R> {
    processor: Arc<Processor<D, C>>,
    records: Arc<R>,
    threads: Threads,
    holder_seed: u64,
}

impl<D: Deliveries, C: Claims, R: RouteRecords> Worker<D, C, R> {
    /// Starts the threads for handlers. `holder_seed` is random, so that holders of claims differ between workers.
    pub fn new(
        stores: Stores<D, C, R>,
        router: Arc<ArcSwap<Router>>,
        policy: Policy,
        metrics: Arc<Metrics>,
        holder_seed: u64,
    ) -> io::Result<Worker<D, C, R>> {
        let Stores { deliveries, claims, records } = stores;
        let (isolation, attempts) = (Isolation::default(), Arc::new(AttemptLog::new(policy.lines)));
        let unmatched_log = UnmatchedLog::default();
        let processor = Processor { deliveries, claims, router, policy, isolation, attempts, unmatched_log, metrics };
        Ok(Worker { processor: Arc::new(processor), records, threads: Threads::start()?, holder_seed })
    }

    /// Runs until the drain begins, then until what was in hand is settled or `drain_timeout` is over.
    pub async fn run(&self, shutdown: Shutdown) {
        let cut = shutdown.abort.child_token();
        let _last = LastSummary(&self.processor.attempts);
        // Holds the log alone: an aborted task may keep what it owns for a while, and the store is closed after this.
        let attempts = Arc::clone(&self.processor.attempts);
        let _summaries = AbortOnDropHandle::new(tokio::spawn(async move { attempts.summaries().await }));
        let (pauses, paused) = Pauses::new(Arc::clone(&self.records), Arc::clone(&self.processor.router));
        let _pauses = AbortOnDropHandle::new(tokio::spawn(pauses.run()));
        let (dispatcher, copied) =
            Dispatcher::new(Arc::clone(&self.processor), self.threads.handle().clone(), self.holder_seed, cut.clone());
        let tasks = dispatcher.run(copied, paused, &shutdown.drain).await;
        let in_hand = tasks.len();
        tokio::select! {
            () = tasks.wait() => return,
            () = tokio::time::sleep(self.processor.policy.drain_timeout) => tracing::warn!(
                in_hand,
                left = tasks.len(),
                "drain timeout: what is left is delivered again after the next start"
            ),
            () = cut.cancelled() => {}
        }
        cut.cancel();
        if tokio::time::timeout(CUT, tasks.wait()).await.is_err() {
            tracing::warn!(
                left = tasks.len(),
                "left behind: handlers that block their threads, or a store that does not answer"
            );
        }
    }
}

/// Logs the last summary, however the worker ends.
struct LastSummary<'a>(&'a AttemptLog);

impl Drop for LastSummary<'_> {
    fn drop(&mut self) {
        self.0.summary();
    }
}
