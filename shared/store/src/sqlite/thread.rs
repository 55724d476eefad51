//! A named thread of the store, which can be joined.

use super::OpenError;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

/// Runs until its input ends.
#[derive(Debug)]
pub(super) struct Thread {
    name: &'static str,
    handle: Mutex<Option<JoinHandle<()>>>,
}

impl Thread {
    pub(super) fn start(name: &'static str, run: impl FnOnce() + Send + 'static) -> Result<Thread, OpenError> {
        let handle = std::thread::Builder::new().name(name.into()).spawn(run).map_err(OpenError::Thread)?;
        Ok(Thread { name, handle: Mutex::new(Some(handle)) })
    }

    /// Waits for the thread's end; a second call returns at once. The thread must have been asked to end before.
    pub(super) async fn join(&self) {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(handle) = handle else { return };
        if !matches!(tokio::task::spawn_blocking(move || handle.join()).await, Ok(Ok(()))) {
            tracing::error!(thread = self.name, "a thread of the store panicked");
        }
    }
}
