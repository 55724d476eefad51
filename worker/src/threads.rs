//! Separate threads for event handlers: one that blocks its thread, or computes for long, delays other events and nothing else.
//! Hooks, connections and the store run on threads that it cannot block.

use std::io;
use tokio::runtime::{Builder, Handle, Runtime};

#[derive(Debug)]
pub(crate) struct Threads {
    handle: Handle,
    runtime: Option<Runtime>,
}

impl Threads {
    /// Starts as many threads as there are cores, or as TOKIO_WORKER_THREADS says.
    pub(crate) fn start() -> io::Result<Threads> {
        let runtime = Builder::new_multi_thread().thread_name("events").enable_all().build()?;
        Ok(Threads { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    /// Spawns tasks onto these threads.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // What still runs has had its time. A runtime that waits for its tasks must not be dropped in an async context.
            runtime.shutdown_background();
        }
    }
}
