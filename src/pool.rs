//! Services run as tasks of the runtime. What is awaited where the runtime was started runs on that thread, which is none of
//! the runtime's own: each delivery and each call would cross to it, and from it to the task that handles it.

use std::future::Future;
use std::panic::resume_unwind;
use tokio_util::task::AbortOnDropHandle;

/// Runs a service to its end on the runtime's own threads. Ends with whoever awaits it, as if it were awaited in place.
pub(crate) async fn on_the_pool<T: Send + 'static>(service: impl Future<Output = T> + Send + 'static) -> T {
    match AbortOnDropHandle::new(tokio::spawn(service)).await {
        Ok(told) => told,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // Aborted with the runtime, and so is this.
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;
    use tokio::sync::oneshot;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_service_runs_on_a_thread_of_the_runtime() {
        let here = thread::current().id();
        assert_ne!(on_the_pool(async { thread::current().id() }).await, here);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_service_ends_with_whoever_awaits_it() {
        let (alive, ended) = oneshot::channel::<()>();
        let mut service = Box::pin(on_the_pool(async move {
            std::future::pending::<()>().await;
            drop(alive);
        }));
        assert!(futures_util::poll!(&mut service).is_pending());
        drop(service);
        let ended = tokio::time::timeout(Duration::from_secs(30), ended).await.expect("it ends");
        assert!(ended.is_err());
    }

    #[tokio::test(flavor = "multi_thread")]
    #[should_panic(expected = "scripted to panic")]
    async fn a_panic_is_the_callers() {
        on_the_pool(async { panic!("scripted to panic") }).await
    }
}
