//! The end of a stop: closes connections and stores, within a time limit.

use std::time::Duration;
use streamgate_service::shutdown::Shutdown;

/// Time limit after the drain, for closing connections and committing writes. Chosen: a disk that takes longer hangs.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit after a second signal, whenever it comes.
const ABORT_TIMEOUT: Duration = Duration::from_secs(2);

/// Abandons what hangs: everything that was acknowledged is durable by then.
pub(crate) async fn close(shutdown: &Shutdown, closing: impl Future<Output = ()>) {
    let aborted = async {
        shutdown.abort.cancelled().await;
        tokio::time::sleep(ABORT_TIMEOUT).await;
    };
    tokio::select! {
        () = closing => tracing::info!("stopped"),
        () = tokio::time::sleep(CLOSE_TIMEOUT) => {
            tracing::warn!("stopped; a disk or connection did not end within {CLOSE_TIMEOUT:?}, and is left to the system");
        }
        () = aborted => tracing::warn!("stopped at once; what has not ended is left to the system"),
    }
}
