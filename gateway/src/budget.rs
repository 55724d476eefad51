//! The memory budget: bytes of all bodies that are being read or made durable.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use streamgate_core::inflate::{Budget, SignedBody};
use streamgate_service::metrics::Metrics;

/// Shared by all requests of a gateway.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    limit: usize,
    held: AtomicUsize,
    metrics: Arc<Metrics>,
}

impl MemoryBudget {
    pub(crate) fn new(limit: usize, metrics: Arc<Metrics>) -> Arc<MemoryBudget> {
        Arc::new(MemoryBudget { limit, held: AtomicUsize::new(0), metrics })
    }

    pub(crate) fn share(self: &Arc<Self>) -> Share {
        Share { budget: Arc::clone(self), held: 0 }
    }
}

/// What one body holds of the budget, until it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<MemoryBudget>,
    held: usize,
}

impl Budget for Share {
    fn reserve(&mut self, bytes: usize) -> bool {
        let grown = |held: usize| held.checked_add(bytes).filter(|total| *total <= self.budget.limit);
        let granted = self.budget.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown).is_ok();
        if granted {
            self.held += bytes;
            self.budget.metrics.gateway_memory.add(signed(bytes));
        }
        granted
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.held, Ordering::Relaxed);
        self.budget.metrics.gateway_memory.sub(signed(self.held));
    }
}

fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// A body's bytes with their share of the budget: given back when the last user of the bytes is done, be it the answer or a
/// store that still writes after the caller's patience ended.
pub(crate) struct HeldBody(pub(crate) SignedBody<Share>);

impl AsRef<[u8]> for HeldBody {
    fn as_ref(&self) -> &[u8] {
        &self.0.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_never_exceed_the_limit_and_come_back() {
        let metrics = Metrics::new();
        let budget = MemoryBudget::new(100, Arc::clone(&metrics));
        let (mut one, mut two) = (budget.share(), budget.share());
        assert!(one.reserve(60) && two.reserve(40) && !two.reserve(1));
        assert_eq!(metrics.gateway_memory.get(), 100);
        drop(one);
        assert!(two.reserve(60) && !two.reserve(usize::MAX));
        drop(two);
        assert_eq!((budget.held.load(Ordering::Relaxed), metrics.gateway_memory.get()), (0, 0));
    }
}
