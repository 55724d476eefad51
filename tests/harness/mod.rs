//! Real processes, sockets and files for the tests, and the ledger that proves that no event was lost.

pub mod broker;
pub mod fleet;
pub mod ledger;
pub mod pebble;
pub mod process;
pub mod proxy;
pub mod raw_service;
pub mod receiver;
pub mod servers;
pub mod stack;
pub mod stream_api;
pub mod terminal;
pub mod volume;
pub mod wire;

use std::time::{Duration, Instant};

/// Longer than any condition takes on a slow machine: reaching it is a failure, not a measurement.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for a condition, and fails with its description.
pub async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl FnMut() -> F) {
    within(PATIENCE, what, condition).await;
}

/// With another patience, for conditions that the product itself checks only at intervals.
pub async fn within<F: Future<Output = bool>>(patience: Duration, what: &str, mut condition: impl FnMut() -> F) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < patience, "still not after {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An unused number, for ids and bodies that differ.
pub fn unique() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
