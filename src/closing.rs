//! The end of a stop: what is closed, and how long that may take.

use std::time::Duration;

/// After the drain: connections say farewell, and what was given to a disk is committed. Chosen: a disk that takes longer hangs.
const LONGEST: Duration = Duration::from_secs(10);

/// What hangs is left to the system: all that was acknowledged is durable by then.
pub(crate) async fn close(closing: impl Future<Output = ()>) {
    match tokio::time::timeout(LONGEST, closing).await {
        Ok(()) => tracing::info!("stopped"),
        Err(_) => {
            tracing::warn!("stopped; a disk or connection did not end within {LONGEST:?}, and is left to the system")
        }
    }
}
