//! Deliveries as they come in, taken on the library's own thread. Its stream of them would cost a task that reads it, and wakes
//! that task while it holds the lock that the task takes next.

use super::endpoint::PATIENCE;
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
    /// Calls `take` for each delivery. The library holds its locks meanwhile: neither may it wait nor touch the channel. What
    /// it returns may do both.
    pub(super) fn each<F>(
        channel: &Channel,
        consumer: Consumer,
        take: impl Fn(Delivery) -> F + Send + Sync + 'static,
    ) -> Incoming
    where
        F: Future<Output = ()> + Send + 'static,
    {
        // The first reason is the one.
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

    /// Waits until there will be no more, and says why. The library logs nothing of it.
    pub(super) async fn ended(&mut self) -> String {
        if let Some(why) = self.reasons.recv().await {
            return why;
        }
        // A connection that begins to close lets go of the delegate first. Why it closes comes by the stream then.
        loop {
            match self.consumer.next().await {
                Some(Ok(delivery)) => give_back(&delivery).await,
                Some(Err(error)) => return error.to_string(),
                None => return deleted(self.consumer.queue().as_str()),
            }
        }
    }

    /// Takes no more, and gives back what came before the broker knew.
    pub(super) async fn stop(mut self) {
        self.cancelled = true;
        let cancel = self.channel.basic_cancel(self.consumer.tag(), BasicCancelOptions::default());
        drop(tokio::time::timeout(PATIENCE, cancel).await);
        while let Some(Some(Ok(delivery))) = self.consumer.next().now_or_never() {
            give_back(&delivery).await;
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.cancelled {
            // On its way with the first poll. The library cancels only consumers that nobody is called for; others keep it, their
            // channel and the connection open.
            let cancel = self.channel.basic_cancel(self.consumer.tag(), BasicCancelOptions::default());
            drop(cancel.now_or_never());
        }
    }
}

fn deleted(queue: &str) -> String {
    format!("the broker ended the consumer of {queue}, as it does when a queue is deleted")
}

/// For others to take. Of a connection that is gone the broker has it back.
pub(super) async fn give_back(acker: &Acker) {
    drop(acker.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await);
}
