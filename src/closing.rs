//! The end of a stop: what is closed, and how long that may take.

use std::time::Duration;
use streamgate_service::shutdown::Shutdown;

/// After the drain: connections say farewell, and what was given to a disk is committed. Chosen: a disk that takes longer hangs.
const LONGEST: Duration = Duration::from_secs(10);
/// After a second signal, whenever it comes.
const ABORTED: Duration = Duration::from_secs(2);

/// What hangs is left to the system: all that was acknowledged is durable by then.
pub(crate) async fn close(shutdown: &Shutdown, closing: impl Future<Output = ()>) {
    let aborted = async {
        shutdown.abort.cancelled().await;
        tokio::time::sleep(ABORTED).await;
    };
    tokio::select! {
        () = closing => tracing::info!("stopped"),
        () = tokio::time::sleep(LONGEST) => {
            tracing::warn!("stopped; a disk or connection did not end within {LONGEST:?}, and is left to the system");
        }
        () = aborted => tracing::warn!("stopped at once; what has not ended is left to the system"),
    }
}
