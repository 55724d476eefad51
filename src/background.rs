//! Tasks that go on alongside a service until it has stopped.

use std::future::Future;
use std::sync::Arc;
use streamgate_core::ports::Lifecycle;
use streamgate_service::metrics::Metrics;
use streamgate_service::ops::{self, Readiness};
use streamgate_service::shutdown::Shutdown;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

#[derive(Debug)]
pub(crate) struct Background(Vec<AbortOnDropHandle<()>>);

impl Background {
    /// Starts what every service has: the operator's port, and the watch over its backend.
    pub(crate) fn start(
        ops_listener: TcpListener,
        metrics: Arc<Metrics>,
        readiness: Readiness,
        backend: &Arc<impl Lifecycle>,
        shutdown: &Shutdown,
    ) -> Background {
        let mut background = Background(Vec::new());
        let pages = ops::pages(metrics, readiness);
        background.spawn(ops::serve(ops_listener, pages, shutdown.abort.clone()));
        let backend = Arc::clone(backend);
        background.spawn(async move { backend.watch().await });
        background
    }

    pub(crate) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.push(AbortOnDropHandle::new(tokio::spawn(task)));
    }

    /// Aborts the tasks, and returns when they have released what they held.
    pub(crate) async fn end(self) {
        for task in self.0 {
            task.abort();
            drop(task.await);
        }
    }
}
