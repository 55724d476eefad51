//! Tasks that go on alongside a service until it has stopped.

use crate::heartbeat::Heartbeat;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::instance::Role;
use streamgate_core::ports::Lifecycle;
use streamgate_service::metrics::Metrics;
use streamgate_service::ops::{self, Readiness};
use streamgate_service::shutdown::Shutdown;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// A process that cannot record its end counts as gone 20 s after its last heartbeat.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(crate) struct Background {
    tasks: Vec<AbortOnDropHandle<()>>,
    heartbeat: AbortOnDropHandle<()>,
    /// Ends the heartbeat, which then records that the process has ended.
    ended: CancellationToken,
}

impl Background {
    /// Starts what every service has: the operator's port, the watch over its backend, and its heartbeat.
    pub(crate) fn start(
        role: Role,
        ops_listener: TcpListener,
        metrics: Arc<Metrics>,
        readiness: Readiness,
        backend: &Arc<impl Lifecycle>,
        shutdown: &Shutdown,
    ) -> Background {
        let heartbeat = Heartbeat::new(role, Arc::clone(&metrics), Arc::clone(&readiness));
        let ended = CancellationToken::new();
        let heartbeat = tokio::spawn(heartbeat.run(backend.instances(), ended.clone()));
        let mut background = Background { tasks: Vec::new(), heartbeat: AbortOnDropHandle::new(heartbeat), ended };
        let pages = ops::pages(metrics, readiness);
        background.spawn(ops::serve(ops_listener, pages, shutdown.abort.clone()));
        let backend = Arc::clone(backend);
        background.spawn(async move { backend.watch().await });
        background
    }

    pub(crate) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(AbortOnDropHandle::new(tokio::spawn(task)));
    }

    /// Aborts the tasks, and returns when they have released what they held.
    pub(crate) async fn end(self) {
        for task in self.tasks {
            task.abort();
            drop(task.await);
        }
        self.ended.cancel();
        drop(tokio::time::timeout(LEAVE_TIMEOUT, self.heartbeat).await);
    }
}
