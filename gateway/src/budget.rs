//! The memory budget: bytes of all requests that are being read, made durable or answered.
//!
//! What is not yet verified may hold half of it, so that signed bodies always find the other half.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use streamgate_service::metrics::Metrics;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// Shared by all requests of a gateway.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    limit: usize,
    /// The most that requests may hold whose signature has not matched.
    unverified_limit: usize,
    held: AtomicUsize,
    unverified: AtomicUsize,
    /// Notified when a share is given back.
    freed: Notify,
    metrics: Arc<Metrics>,
}

impl MemoryBudget {
    /// `max_body`: the unverified share has room for one at least, as far as the limit has.
    pub(crate) fn new(limit: usize, max_body: usize, metrics: Arc<Metrics>) -> Arc<MemoryBudget> {
        let unverified_limit = (limit / 2).max(max_body.saturating_mul(2)).min(limit);
        let (held, unverified) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Arc::new(MemoryBudget { limit, unverified_limit, held, unverified, freed: Notify::new(), metrics })
    }

    pub(crate) fn share(self: &Arc<Self>) -> Share {
        Share { budget: Arc::clone(self), held: 0, is_signed: false }
    }

    /// Completes when some share is given back after this call.
    pub(crate) fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }
}

/// What one request holds of the budget, until it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<MemoryBudget>,
    held: usize,
    is_signed: bool,
}

impl Share {
    /// Whether these bytes more may be held.
    pub(crate) fn reserve(&mut self, bytes: usize) -> bool {
        let budget = &self.budget;
        if !self.is_signed && !add(&budget.unverified, bytes, budget.unverified_limit) {
            return false;
        }
        if !add(&budget.held, bytes, budget.limit) {
            if !self.is_signed {
                budget.unverified.fetch_sub(bytes, Ordering::Relaxed);
            }
            return false;
        }
        self.held += bytes;
        budget.metrics.gateway_memory.add(signed(bytes));
        true
    }

    /// The signature has matched: the bytes count as verified from now on.
    pub(crate) fn signed(&mut self) {
        if !std::mem::replace(&mut self.is_signed, true) {
            self.budget.unverified.fetch_sub(self.held, Ordering::Relaxed);
            self.budget.freed.notify_waiters();
        }
    }

    /// A share of its own for some of the bytes.
    pub(crate) fn split(&mut self, bytes: usize) -> Share {
        let bytes = bytes.min(self.held);
        self.held -= bytes;
        Share { budget: Arc::clone(&self.budget), held: bytes, is_signed: self.is_signed }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.held > 0 {
            self.budget.held.fetch_sub(self.held, Ordering::Relaxed);
            if !self.is_signed {
                self.budget.unverified.fetch_sub(self.held, Ordering::Relaxed);
            }
            self.budget.metrics.gateway_memory.sub(signed(self.held));
            self.budget.freed.notify_waiters();
        }
    }
}

fn add(counter: &AtomicUsize, bytes: usize, limit: usize) -> bool {
    let grown = |held: usize| held.checked_add(bytes).filter(|total| *total <= limit);
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown).is_ok()
}

fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// A body's bytes with their share of the budget: given back when the last user of the bytes is done, be it the answer or a
/// store that still writes after the caller's patience ended.
pub(crate) struct HeldBody {
    pub(crate) bytes: Vec<u8>,
    pub(crate) _share: Share,
}

impl AsRef<[u8]> for HeldBody {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_never_exceed_the_limit_and_come_back() {
        let metrics = Metrics::new();
        let budget = MemoryBudget::new(100, 10, Arc::clone(&metrics));
        let (mut one, mut two) = (budget.share(), budget.share());
        assert!(one.reserve(30) && two.reserve(20) && !two.reserve(1), "the unverified share is half");
        one.signed();
        assert!(one.reserve(50) && !one.reserve(1) && !two.reserve(1), "all of it is held");
        assert_eq!(metrics.gateway_memory.get(), 100);
        let part = one.split(10);
        drop(one);
        assert!(two.reserve(30) && !two.reserve(1));
        two.signed();
        assert!(two.reserve(40) && !two.reserve(1) && !two.reserve(usize::MAX));
        drop((two, part));
        let held = [&budget.held, &budget.unverified].map(|counter| counter.load(Ordering::Relaxed));
        assert_eq!((held, metrics.gateway_memory.get()), ([0, 0], 0));
    }

    #[test]
    fn the_unverified_share_has_room_for_a_body() {
        let limits = |limit, max_body| MemoryBudget::new(limit, max_body, Metrics::new()).unverified_limit;
        assert_eq!([limits(100, 10), limits(100, 40), limits(100, 90)], [50, 80, 100]);
    }
}
