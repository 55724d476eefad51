//! Tasks that go on alongside a service until it has stopped.

use std::future::Future;
use tokio_util::task::AbortOnDropHandle;

#[derive(Debug, Default)]
pub(crate) struct Background(Vec<AbortOnDropHandle<()>>);

impl Background {
    pub(crate) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.push(AbortOnDropHandle::new(tokio::spawn(task)));
    }

    /// Ends them, and returns when they have let go of what they held.
    pub(crate) async fn end(self) {
        for task in self.0 {
            task.abort();
            drop(task.await);
        }
    }
}
