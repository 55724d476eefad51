//! The working side, over any backend: event handlers, and the loop that answers hooks.

use crate::backends::WorkerParts;
use crate::code::Code;
use crate::reload::{self, Part};
use crate::wiring;
use anyhow::Context;
use arc_swap::ArcSwap;
use std::sync::Arc;
use streamgate_core::ports::{Calls, Claims, Deliveries, RouteRecords};
use streamgate_service::config::Config;
use streamgate_service::metrics::Metrics;
use streamgate_service::shutdown::Shutdown;
use streamgate_worker::{CallWorker, Hooks, Router, Stores, Worker};

#[derive(Debug)]
pub(crate) struct Working<D, C, Q, R> {
    worker: Worker<D, C, R>,
    calls: Option<CallWorker<Q>>,
    router: Arc<ArcSwap<Router>>,
    hooks: Arc<ArcSwap<Hooks>>,
}

impl<D: Deliveries, C: Claims, Q: Calls, R: RouteRecords> Working<D, C, Q, R> {
    pub(crate) fn new<L>(
        config: &Config,
        router: Arc<ArcSwap<Router>>,
        hooks: Hooks,
        parts: &WorkerParts<D, C, Q, R, L>,
        metrics: &Arc<Metrics>,
    ) -> anyhow::Result<Working<D, C, Q, R>> {
        let hooks = Arc::new(ArcSwap::from_pointee(hooks));
        let stores = Stores {
            deliveries: Arc::clone(&parts.deliveries),
            claims: Arc::clone(&parts.claims),
            records: Arc::clone(&parts.records),
        };
        let (policy, seed) = (wiring::policy(config, parts.prefetch, parts.longest_wait), wiring::holder_seed()?);
        let worker = Worker::new(stores, Arc::clone(&router), policy, Arc::clone(metrics), seed)
            .context("cannot start the threads for handlers of events")?;
        let answering = |calls: &Arc<Q>| {
            CallWorker::new(Arc::clone(calls), Arc::clone(&hooks), wiring::call_policy(config), Arc::clone(metrics))
        };
        let calls = parts.calls.as_ref().map(answering);
        Ok(Working { worker, calls, router, hooks })
    }

    /// The parts that are reloaded with the configuration. `code`: the handlers in code.
    pub(crate) fn reloaded(&self, code: Code, config: &Config) -> [Box<dyn Part>; 2] {
        reload::handlers(Arc::clone(&self.router), Arc::clone(&self.hooks), code, config)
    }

    /// Runs until both drains are done, that of the events and that of the hooks.
    pub(crate) async fn run(&self, events: Shutdown, hooks: Shutdown) {
        let answering = async {
            if let Some(calls) = &self.calls {
                calls.run(hooks).await;
            }
        };
        tokio::join!(self.worker.run(events), answering);
    }
}
