//! Work that continues when its caller has gone.

use super::Answering;
use crate::answered::Answered;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio_util::task::TaskTracker;

/// Work that outlives its caller: a client that hangs up and repeats gets the first answer. A task from the start would do as
/// well, at the price of two more task switches for each answer.
pub(super) struct Detached {
    pub(super) work: Option<Answering>,
    pub(super) tasks: TaskTracker,
}

impl Future for Detached {
    type Output = Answered;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answered> {
        // Taken out for the poll, because work that panics must not be polled again. After its end this stays pending, as any
        // future may.
        let Some(mut work) = self.work.take() else { return Poll::Pending };
        let polled = work.as_mut().poll(cx);
        if polled.is_pending() {
            self.work = Some(work);
        }
        polled
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        if let (Some(work), Ok(runtime)) = (self.work.take(), tokio::runtime::Handle::try_current()) {
            self.tasks.spawn_on(work, &runtime);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answered::Source;
    use bytes::Bytes;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn a_detached_call_goes_on_without_its_caller() {
        let (open, gate) = oneshot::channel::<()>();
        let (end, ended) = oneshot::channel();
        let work = async {
            gate.await.unwrap();
            end.send(()).unwrap();
            Answered { body: Bytes::new(), source: Source::Worker }
        };
        let mut detached = Box::pin(Detached { work: Some(Box::pin(work)), tasks: TaskTracker::new() });
        assert!(futures_util::poll!(&mut detached).is_pending());
        drop(detached);
        open.send(()).unwrap();
        ended.await.unwrap();
    }
}
