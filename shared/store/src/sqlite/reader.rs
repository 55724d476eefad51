//! The reading thread: runs queries on a connection of its own, so that they never wait for an fsync.

use super::thread::Thread;
use super::{OpenError, unavailable};
use rusqlite::Connection;
use streamgate_core::ports::StoreError;
use tokio::sync::{mpsc, oneshot};

/// Most queries that wait at a time: the inbox and the spool send one after another, and each hook sends one.
const MAX_WAITING: usize = 64;

/// Bytes of bodies after which a read of events stops, so that a batch of large ones stays small.
pub(super) const MAX_BYTES: usize = 4 << 20;

type Query = Box<dyn FnOnce(&Connection) + Send>;

#[derive(Debug)]
pub(super) struct Reader {
    /// `None` ends the thread.
    queries: mpsc::Sender<Option<Query>>,
    thread: Thread,
}

impl Reader {
    pub(super) fn start(connection: Connection) -> Result<Reader, OpenError> {
        let (queries, mut waiting) = mpsc::channel::<Option<Query>>(MAX_WAITING);
        let run = move || {
            while let Some(Some(query)) = waiting.blocking_recv() {
                query(&connection);
            }
        };
        Ok(Reader { queries, thread: Thread::start("store-reader", run)? })
    }

    /// Runs a query on the thread.
    pub(super) async fn query<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        // The receiver may be gone by then; nobody else needs the result.
        let run: Query = Box::new(move |connection| drop(answer.send(query(connection))));
        self.queries.send(Some(run)).await.map_err(|_| unavailable("the reading thread has ended"))?;
        answered.await.map_err(|_| unavailable("the reading thread has ended"))?.map_err(unavailable)
    }

    /// Ends the thread after the queries that already wait; later ones fail.
    pub(super) async fn close(&self) {
        // The thread may have ended already.
        self.queries.send(None).await.ok();
        self.thread.join().await;
    }
}
