//! The memory budget: bytes of all requests that are being read, made durable or answered.
//!
//! Unverified requests may hold half of it, so that signed bodies always find the other half.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use streamgate_service::metrics::Metrics;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// What a connection may hold besides one body: its inflation, and the cost of its requests.
const CONNECTION: usize = 256 << 10;

/// Shared by all requests of a gateway.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    limit: usize,
    /// The most that requests may hold before their signatures match, in all and on one connection.
    unverified_limit: usize,
    connection_limit: usize,
    held: AtomicUsize,
    unverified: AtomicUsize,
    /// Notified when a share is given back.
    freed: Notify,
    metrics: Arc<Metrics>,
}

/// Whose bytes must be given back first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Short {
    /// Those of the same connection.
    Connection,
    /// Those of any connection.
    All,
}

impl MemoryBudget {
    /// `request` is the most that one request holds, including its body. The unverified share has room for two requests, if
    /// the limit has, and a connection's share has room for one body both as it came and inflated.
    pub(crate) fn new(limit: usize, request: usize, metrics: Arc<Metrics>) -> Arc<MemoryBudget> {
        let unverified_limit = (limit / 2).max(request.saturating_mul(2)).min(limit);
        let connection_limit = (unverified_limit / 4).max(request.saturating_add(CONNECTION)).min(unverified_limit);
        let (held, unverified) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let freed = Notify::new();
        Arc::new(MemoryBudget { limit, unverified_limit, connection_limit, held, unverified, freed, metrics })
    }

    /// `connection` counts the bytes held by unverified requests of the same connection.
    pub(crate) fn share(self: &Arc<Self>, connection: Arc<AtomicUsize>) -> Share {
        Share { budget: Arc::clone(self), connection, held: 0, is_signed: false }
    }

    /// Completes when a share is given back after this call.
    pub(crate) fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }
}

/// What one request holds of the budget, until it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<MemoryBudget>,
    connection: Arc<AtomicUsize>,
    held: usize,
    is_signed: bool,
}

impl Share {
    /// Takes more bytes, or says whose bytes must be given back first.
    pub(crate) fn reserve(&mut self, bytes: usize) -> Result<(), Short> {
        let budget = &self.budget;
        if !self.is_signed {
            if !add(&self.connection, bytes, budget.connection_limit) {
                return Err(Short::Connection);
            }
            if !add(&budget.unverified, bytes, budget.unverified_limit) {
                self.connection.fetch_sub(bytes, Ordering::Relaxed);
                return Err(Short::All);
            }
        }
        if !add(&budget.held, bytes, budget.limit) {
            self.give_back_unverified(bytes);
            return Err(Short::All);
        }
        self.held += bytes;
        budget.metrics.gateway_memory.add(signed(bytes));
        Ok(())
    }

    fn give_back_unverified(&self, bytes: usize) {
        if !self.is_signed {
            self.connection.fetch_sub(bytes, Ordering::Relaxed);
            self.budget.unverified.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// The signature has matched: the bytes count as verified from now on.
    pub(crate) fn signed(&mut self) {
        self.give_back_unverified(self.held);
        if !std::mem::replace(&mut self.is_signed, true) {
            self.budget.freed.notify_waiters();
        }
    }

    /// Splits off some of the bytes into a share of their own.
    pub(crate) fn split(&mut self, bytes: usize) -> Share {
        let bytes = bytes.min(self.held);
        self.held -= bytes;
        let (budget, connection) = (Arc::clone(&self.budget), Arc::clone(&self.connection));
        Share { budget, connection, held: bytes, is_signed: self.is_signed }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.held, Ordering::Relaxed);
        self.give_back_unverified(self.held);
        self.budget.metrics.gateway_memory.sub(signed(self.held));
        // Notifies even if it held nothing: another request may wait for this one to end.
        self.budget.freed.notify_waiters();
    }
}

fn add(counter: &AtomicUsize, bytes: usize, limit: usize) -> bool {
    let grown = |held: usize| held.checked_add(bytes).filter(|total| *total <= limit);
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown).is_ok()
}

fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// A body's bytes with their share of the budget, which is given back with the last user of the bytes: the answer, or a store
/// that still writes after its caller has given up.
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
        // Each share is on a connection of its own, which may hold all of it.
        let share = || budget.share(Arc::default());
        let (mut one, mut two) = (share(), share());
        assert_eq!([one.reserve(30), two.reserve(20)], [Ok(()), Ok(())]);
        assert_eq!(two.reserve(1), Err(Short::All), "the unverified share is half");
        one.signed();
        assert_eq!(one.reserve(50), Ok(()));
        assert_eq!([one.reserve(1), two.reserve(1)], [Err(Short::All); 2], "all of it is held");
        assert_eq!(metrics.gateway_memory.get(), 100);
        let part = one.split(10);
        drop(one);
        assert_eq!(two.reserve(30), Ok(()));
        assert!(two.reserve(1).is_err());
        two.signed();
        assert_eq!(
            [two.reserve(40), two.reserve(1), two.reserve(usize::MAX)],
            [Ok(()), Err(Short::All), Err(Short::All)]
        );
        drop((two, part));
        let held = [&budget.held, &budget.unverified].map(|counter| counter.load(Ordering::Relaxed));
        assert_eq!((held, metrics.gateway_memory.get()), ([0, 0], 0));
    }

    #[test]
    fn a_connection_has_a_part_of_the_unverified_share() {
        const MIB: usize = 1 << 20;
        let budget = MemoryBudget::new(64 * MIB, MIB, Metrics::new());
        let connection = Arc::new(AtomicUsize::new(0));
        let mut shares = [(); 2].map(|()| budget.share(Arc::clone(&connection)));
        assert_eq!([shares[0].reserve(6 * MIB), shares[1].reserve(2 * MIB)], [Ok(()), Ok(())]);
        assert_eq!(shares[1].reserve(1), Err(Short::Connection));
        assert_eq!(budget.share(Arc::default()).reserve(8 * MIB), Ok(()), "of another connection");
        shares[0].signed();
        assert_eq!([shares[0].reserve(20 * MIB), shares[1].reserve(6 * MIB)], [Ok(()), Ok(())]);
        drop(shares);
        assert_eq!(connection.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_unverified_share_has_room_for_a_body() {
        let limits = |limit, request| MemoryBudget::new(limit, request, Metrics::new()).unverified_limit;
        assert_eq!([limits(100, 10), limits(100, 40), limits(100, 90)], [50, 80, 100]);
    }
}
