//! Consumes a queue over one session after the other, with a bounded prefetch, until it is stopped.

use super::incoming::{Incoming, give_back};
use super::link::{Link, PATIENCE, Session};
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use std::sync::{Arc, MutexGuard, PoisonError};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// What comes from a queue.
#[derive(Debug)]
pub(super) struct Feed {
    link: Arc<Link>,
    arrived: Mutex<mpsc::Receiver<Delivery>>,
    stop: CancellationToken,
    task: std::sync::Mutex<Option<AbortOnDropHandle<Option<Channel>>>>,
    /// After the stop: without its channel what is in hand could not be acknowledged.
    stopped: std::sync::Mutex<Option<Channel>>,
}

impl Feed {
    /// Starts to consume, so many at a time. Call within a tokio runtime.
    pub(super) fn start(link: Arc<Link>, queue: String, prefetch: u16) -> Feed {
        let (deliver, arrived) = mpsc::channel(usize::from(prefetch));
        let stop = CancellationToken::new();
        let source = Source { link: Arc::clone(&link), queue, prefetch, deliver, stop: stop.clone() };
        let task = std::sync::Mutex::new(Some(AbortOnDropHandle::new(tokio::spawn(source.run()))));
        Feed { link, arrived: Mutex::new(arrived), stop, task, stopped: std::sync::Mutex::default() }
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// The next one that may still be settled.
    pub(super) async fn next(&self) -> Delivery {
        let mut arrived = self.arrived.lock().await;
        loop {
            match arrived.recv().await {
                // Of a connection that is gone: the broker has it back.
                Some(stale) if !stale.usable() => {}
                Some(delivery) => return delivery,
                None => return std::future::pending().await,
            }
        }
    }

    /// Takes no more, and gives back what nobody has in hand, for others to take now.
    pub(super) async fn stop(&self) {
        self.stop.cancel();
        let task = lock(&self.task).take();
        if let Some(task) = task
            && let Ok(Ok(channel)) = tokio::time::timeout(PATIENCE, task).await
        {
            *lock(&self.stopped) = channel;
        }
        let returning = async {
            let mut arrived = self.arrived.lock().await;
            while let Ok(delivery) = arrived.try_recv() {
                give_back(&delivery).await;
            }
        };
        // What cannot be given back goes back when the connection ends.
        drop(tokio::time::timeout(PATIENCE, returning).await);
    }

    /// Stops, and closes the connection.
    pub(super) async fn close(&self) {
        self.stop().await;
        self.link.close().await;
    }
}

fn lock<T>(of: &std::sync::Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Source {
    link: Arc<Link>,
    queue: String,
    prefetch: u16,
    deliver: mpsc::Sender<Delivery>,
    stop: CancellationToken,
}

impl Source {
    /// Until the stop; returns the channel of what is in hand then.
    async fn run(self) -> Option<Channel> {
        loop {
            let session = tokio::select! {
                session = self.link.up() => session,
                () = self.stop.cancelled() => return None,
            };
            match self.consume(&session).await {
                Ok(channel) => return Some(channel),
                // Without a new session nothing would come any more.
                Err(why) => session.fail(why),
            }
            session.ended().await;
        }
    }

    /// Returns without an error when it was stopped.
    async fn consume(&self, session: &Session) -> Result<Channel, String> {
        let channel = session.channel().await?;
        let described = |error: lapin::Error| error.to_string();
        channel.basic_qos(self.prefetch, BasicQosOptions::default()).await.map_err(described)?;
        let (queue, options) = (self.queue.as_str().into(), BasicConsumeOptions::default());
        let consumer =
            channel.basic_consume(queue, "".into(), options, FieldTable::default()).await.map_err(described)?;
        let over = CancellationToken::new();
        let _until_here = over.clone().drop_guard();
        let deliver = self.deliver.clone();
        let mut incoming = Incoming::each(&channel, consumer, move |delivery| {
            // Full only after a reconnect, of what the old connection brought and nobody has thrown away yet.
            let late = match deliver.try_send(delivery) {
                Err(TrySendError::Full(delivery)) => Some((deliver.clone(), delivery, over.clone())),
                Ok(()) | Err(TrySendError::Closed(_)) => None,
            };
            async {
                let Some((deliver, delivery, over)) = late else { return };
                match over.run_until_cancelled(deliver.reserve()).await {
                    Some(Ok(place)) => place.send(delivery),
                    Some(Err(_)) | None => give_back(&delivery).await,
                }
            }
        });
        tokio::select! {
            why = incoming.ended() => return Err(why),
            () = session.ended() => return Err("ended".to_owned()),
            () = self.stop.cancelled() => {}
        }
        incoming.stop().await;
        Ok(channel)
    }
}
