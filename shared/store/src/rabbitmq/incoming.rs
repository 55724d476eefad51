//! Takes deliveries as they arrive, on the library's own thread. The library's stream of deliveries would need a task
//! to read it, and would wake that task while holding the lock that the task takes next.

use super::endpoint::REPLY_TIMEOUT;
use futures_util::{FutureExt, StreamExt};
use lapin::message::{Delivery, DeliveryResult};
use lapin::options::{BasicCancelOptions, BasicNackOptions};
use lapin::{Acker, Channel, Consumer};
use std::future::Future;
use tokio::sync::mpsc;

/// Takes deliveries for as long as it lives.
pub(super) struct Incoming {
    channel: Channel,
    consumer: Consumer,
    reasons: mpsc::Receiver<String>,
    cancelled: bool,
}

impl Incoming {
    /// Calls `take` for each delivery. The library holds its locks during the call, so `take` must neither wait nor
    /// touch the channel. The future that it returns may do both.
    pub(super) fn each<F>(
        channel: &Channel,
        consumer: Consumer,
        take: impl Fn(Delivery) -> F + Send + Sync + 'static,
    ) -> Incoming
    where
        F: Future<Output = ()> + Send + 'static,
    {
        // Only the first reason is kept.
        let (reason, reasons) = mpsc::channel(1);
        let queue = consumer.queue();
        consumer.set_delegate(move |delivery: DeliveryResult| {
            let taken = match delivery {
                Ok(Some(delivery)) => Ok(take(delivery)),
                Ok(None) => Err(deleted(queue.as_str())),
                Err(error) => Err(error.to_string()),
            };
            let taken = taken.map_err(|why| drop(reason.try_send(why)));
            async {
                if let Ok(taken) = taken {
                    taken.await;
                }
            }
        });
        Incoming { channel: channel.clone(), consumer, reasons, cancelled: false }
    }

    /// Waits until no more deliveries can arrive, and returns why. The library does not log this.
    pub(super) async fn ended(&mut self) -> String {
        if let Some(why) = self.reasons.recv().await {
            return why;
        }
        // A connection that begins to close drops the delegate first; the reason then arrives through the stream.
        loop {
            match self.consumer.next().await {
                Some(Ok(delivery)) => give_back(&delivery).await,
                Some(Err(error)) => return error.to_string(),
                None => return deleted(self.consumer.queue().as_str()),
            }
        }
    }

    /// Takes no more, and gives back what arrived before the broker processed the cancel.
    pub(super) async fn stop(mut self) {
        self.cancelled = true;
        let cancel = self.channel.basic_cancel(self.consumer.tag(), BasicCancelOptions::default());
        drop(tokio::time::timeout(REPLY_TIMEOUT, cancel).await);
        while let Some(Some(Ok(delivery))) = self.consumer.next().now_or_never() {
            give_back(&delivery).await;
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.cancelled {
            // The first poll sends it. The library cancels only consumers without a delegate; the others would stay,
            // and keep their channel and connection open.
            let cancel = self.channel.basic_cancel(self.consumer.tag(), BasicCancelOptions::default());
            drop(cancel.now_or_never());
        }
    }
}

fn deleted(queue: &str) -> String {
    format!("the broker ended the consumer of {queue}, as it does when a queue is deleted")
}

/// Gives a delivery back for others to take. If its connection is gone, the broker has it back already.
pub(super) async fn give_back(acker: &Acker) {
    drop(acker.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await);
}
