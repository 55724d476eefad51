//! The process's limit of open files.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files kept for the store, listeners, logs, and connections to services.
const RESERVE: u64 = 512;

/// Raises the soft limit as far as connections and handlers need and the hard limit allows, and logs a warning if that is not
/// enough.
pub fn raise(most: usize) {
    let needed = most as u64 + RESERVE;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= needed) {
        return;
    }
    let current = limit.maximum.map_or(needed, |maximum| maximum.min(needed));
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum: limit.maximum });
    if raised.is_err() || current < needed {
        tracing::warn!(
            limit = current,
            needed,
            "open files are limited below what gateway.max_connections and the routes' concurrency need; raise the limit (ulimit -n, LimitNOFILE=)"
        );
    }
}
