//! The reading thread: runs queries on a connection of its own, so that they never wait for an fsync.

use super::{OpenError, unavailable};
use rusqlite::Connection;
use std::thread::JoinHandle;
use streamgate_core::ports::StoreError;
use tokio::sync::{mpsc, oneshot};

/// Queries waiting at a time: the inbox and the spool ask one after another, and each hook once.
const MAX_WAITING: usize = 64;

/// Bytes of bodies after which a read of events stops, so that a batch of large ones stays small.
pub(super) const MAX_BYTES: usize = 4 << 20;

type Query = Box<dyn FnOnce(&Connection) + Send>;

#[derive(Debug)]
pub(super) struct Reader {
    queries: mpsc::Sender<Query>,
    thread: JoinHandle<()>,
}

impl Reader {
    pub(super) fn start(connection: Connection) -> Result<Reader, OpenError> {
        let (queries, mut waiting) = mpsc::channel::<Query>(MAX_WAITING);
        let run = move || {
            while let Some(query) = waiting.blocking_recv() {
                query(&connection);
            }
        };
        let thread = std::thread::Builder::new().name("store-reader".into()).spawn(run).map_err(OpenError::Thread)?;
        Ok(Reader { queries, thread })
    }

    /// Runs a query on the thread.
    pub(super) async fn query<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        // Whoever asked may be gone by then: the answer is of no use to anybody else.
        let run: Query = Box::new(move |connection| drop(answer.send(query(connection))));
        self.queries.send(run).await.map_err(|_| unavailable("the reading thread has ended"))?;
        answered.await.map_err(|_| unavailable("the reading thread has ended"))?.map_err(unavailable)
    }

    pub(super) async fn close(self) {
        drop(self.queries);
        let joined = tokio::task::spawn_blocking(move || self.thread.join()).await;
        if !matches!(joined, Ok(Ok(()))) {
            tracing::error!("the store's reading thread panicked");
        }
    }
}
