//! Claims of the embedded store: leases in memory. The parent module says why none of them needs the disk.

use super::millis;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::claim::{self, ClaimKey, Conclusion, State, Verdict};

#[derive(Debug)]
pub(super) struct Leases {
    states: Mutex<HashMap<ClaimKey, State>>,
    /// Start of the clock for leases: monotonic, so nobody can set it back, and no other process looks at these leases.
    since: Instant,
}

impl Default for Leases {
    fn default() -> Leases {
        Leases { states: Mutex::default(), since: Instant::now() }
    }
}

impl Leases {
    /// A panic while the map was held cannot leave it half changed: every change is one insert or remove.
    fn lock(&self) -> MutexGuard<'_, HashMap<ClaimKey, State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> i64 {
        millis(self.since.elapsed())
    }

    pub(super) fn claim(&self, key: &ClaimKey, attempt: u32, holder: u64, lease: Duration) -> Verdict {
        let mut leases = self.lock();
        let (verdict, state) = claim::claim(leases.get(key).copied(), attempt, holder, self.now_ms(), millis(lease));
        if let Some(state) = state {
            leases.insert(key.clone(), state);
        }
        verdict
    }

    pub(super) fn renew(&self, key: &ClaimKey, holder: u64, lease: Duration) -> bool {
        let mut leases = self.lock();
        match claim::renew(leases.get(key).copied(), holder, self.now_ms(), millis(lease)) {
            Some(state) => leases.insert(key.clone(), state).is_some(),
            None => false,
        }
    }

    /// Keeps only leases: how an event ended is recorded in the queue and among the seen keys.
    pub(super) fn conclude(&self, key: &ClaimKey, holder: u64, conclusion: Conclusion) {
        let mut leases = self.lock();
        match claim::conclude(leases.get(key).copied(), holder, conclusion) {
            Some(state @ State::Leased { .. }) => leases.insert(key.clone(), state),
            Some(State::Retrying { .. } | State::Done | State::Dead) | None => leases.remove(key),
        };
    }
}
