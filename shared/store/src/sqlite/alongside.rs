//! The store's file opened by the command line, alongside its running owner or without one.

use super::{OpenError, directory, schema, unavailable};
use rusqlite::Connection;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use streamgate_core::ports::StoreError;

/// Dead letters moved in one transaction: the running owner waits no longer than that for its own.
pub(super) const MAX_MOVED: usize = 100;
/// Bytes of bodies after which a transaction ends, for the same reason.
pub(super) const MAX_MOVED_BYTES: usize = 4 << 20;

/// A connection of its own.
#[derive(Clone, Debug)]
pub(super) struct Alongside(Arc<Mutex<Connection>>);

impl Alongside {
    /// A directory without a store is an error: the command line creates none.
    pub(super) fn open(data_dir: &Path) -> Result<Alongside, OpenError> {
        let database = directory::database(data_dir);
        if !database.exists() {
            return Err(OpenError::Absent { path: data_dir.to_owned() });
        }
        Ok(Alongside(Arc::new(Mutex::new(schema::open_alongside(&database)?))))
    }

    /// Runs a query on a thread that may block.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = Arc::clone(&self.0);
        let run = move || work(&mut connection.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::task::spawn_blocking(run).await.map_err(unavailable)?.map_err(unavailable)
    }
}
