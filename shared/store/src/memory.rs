//! Calls within one process: the gateway asks, the worker in the same process answers. Nothing of a call outlives its
//! caller.

use bytes::Bytes;
use std::time::Duration;
use streamgate_core::{
    envelope::Envelope,
    ports::{Ask, Call, Calls, StoreError},
    reason::Reason,
};
use tokio::sync::{Mutex, mpsc, oneshot};

type Reply = oneshot::Sender<Result<Bytes, Reason>>;

/// The channel between gateway and worker.
#[derive(Debug)]
pub struct InProcess {
    /// `None` where no handler answers calls.
    calls: Option<mpsc::Sender<Call<Reply>>>,
    arrived: Mutex<mpsc::Receiver<Call<Reply>>>,
}

impl InProcess {
    /// `most`: how many calls may wait at a time. `answered`: whether any handler answers calls.
    pub fn new(most: usize, answered: bool) -> InProcess {
        let (calls, arrived) = mpsc::channel(most);
        InProcess { calls: answered.then_some(calls), arrived: Mutex::new(arrived) }
    }
}

impl Ask for InProcess {
    async fn ask(&self, envelope: Envelope, within: Duration) -> Result<Bytes, Reason> {
        let calls = self.calls.as_ref().ok_or(Reason::NoWorker)?;
        let (handle, answer) = oneshot::channel();
        let call = Call { envelope, within, handle };
        calls.send(call).await.map_err(|_| Reason::NoWorker)?;
        // A draining worker drops the sender.
        answer.await.map_err(|_| Reason::NoWorker)?
    }
}

impl Calls for InProcess {
    type Handle = Reply;

    async fn next(&self) -> Result<Call<Reply>, StoreError> {
        let mut arrived = self.arrived.lock().await;
        loop {
            match arrived.recv().await {
                // Skipped: its caller has given up.
                Some(call) if call.handle.is_closed() => {}
                Some(call) => return Ok(call),
                None => return std::future::pending().await,
            }
        }
    }

    async fn answer(&self, handle: Reply, answer: Result<Bytes, Reason>) -> Result<(), StoreError> {
        handle.send(answer).map_err(|_| StoreError::Unavailable("its caller no longer waits".to_owned()))
    }
}
