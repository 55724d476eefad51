//! Deliveries as they come in, taken on the library's own thread. Its stream of them would cost a task that reads it, and wakes
//! that task while it holds the lock that the task takes next.

use lapin::Consumer;
use lapin::message::{Delivery, DeliveryResult};
use std::future::Future;
use tokio::sync::mpsc;

/// Calls `take` for each delivery from now on: it must not wait, what it returns may. Returns why, when there will be no more.
pub(super) fn each<T, F>(consumer: &Consumer, take: T) -> impl Future<Output = String> + use<T, F>
where
    T: Fn(Delivery) -> F + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let queue = consumer.queue();
    let (tell, mut told) = mpsc::unbounded_channel();
    consumer.set_delegate(move |delivery: DeliveryResult| {
        let taken = match delivery {
            Ok(Some(delivery)) => Some(take(delivery)),
            // The library logs nothing of it, and would just call no more.
            Ok(None) => {
                drop(tell.send(format!("the broker ended the consumer of {queue}: was the queue deleted?")));
                None
            }
            Err(error) => {
                drop(tell.send(error.to_string()));
                None
            }
        };
        async {
            if let Some(taken) = taken {
                taken.await;
            }
        }
    });
    // The library lets go of who was called when the consumer is cancelled.
    async move { told.recv().await.unwrap_or_else(|| "the consumer was cancelled".to_owned()) }
}
