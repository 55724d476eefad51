//! The limits of the writing thread, and how its last commit went.

use super::{Options, millis};
use std::time::{Duration, Instant};
use streamgate_core::ports::StoreError;

/// How often the store's health and the age of seen keys are checked while nobody writes.
pub(super) const TICK: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub(super) struct Limits {
    pub(super) max_bytes: u64,
    pub(super) seen_window_ms: i64,
    pub(super) remember_ms: i64,
    pub(super) max_waiting: usize,
}

impl Limits {
    pub(super) fn of(options: &Options) -> Limits {
        Limits {
            max_bytes: options.max_bytes,
            seen_window_ms: millis(options.seen_window),
            remember_ms: millis(options.remember.max(options.seen_window)),
            max_waiting: options.max_waiting,
        }
    }

    /// Why a new event is refused at the limit.
    pub(super) fn full(&self) -> StoreError {
        StoreError::Full(format!(
            "{} bytes, the limit of store.spool_max, are in use by events that wait, dead letters and seen keys; raise it, \
             or look at `streamgate dead list`",
            self.max_bytes
        ))
    }
}

/// How the last commit went, when it ended, and how much of the file was in use.
#[derive(Clone, Debug)]
pub(super) struct Health {
    pub(super) result: Result<(), StoreError>,
    pub(super) at: Instant,
    pub(super) used: u64,
    /// The commit itself failed; the commits of a full store still succeed.
    pub(super) has_failed: bool,
}
