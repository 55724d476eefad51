//! Threads of their own for handlers of events: one that blocks its thread, or computes for long, keeps other events waiting
//! and nothing else. Hooks, connections and the store go on, on threads that it cannot take.

use std::io;
use tokio::runtime::{Builder, Handle, Runtime};

#[derive(Debug)]
pub(crate) struct Threads {
    handle: Handle,
    runtime: Option<Runtime>,
}

impl Threads {
    /// As many as there are cores, or as TOKIO_WORKER_THREADS says.
    pub(crate) fn start() -> io::Result<Threads> {
        let runtime = Builder::new_multi_thread().thread_name("events").enable_all().build()?;
        Ok(Threads { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    /// Where tasks are spawned onto them.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // What still runs has had its time; a runtime that waits for it may not be dropped where tasks run.
            runtime.shutdown_background();
        }
    }
}
