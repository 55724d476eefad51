//! Consumes a queue over one session after the other, with a bounded prefetch, until it is stopped.

use super::endpoint::REPLY_TIMEOUT;
use super::headers;
use super::incoming::{Incoming, give_back};
use super::link::{Link, Session};
use super::topology::Topology;
use futures_util::future::join_all;
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use std::sync::{Arc, MutexGuard, PoisonError};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Mutex, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Messages of a queue, and of the queues of parked events that are consumed as well.
#[derive(Debug)]
pub(super) struct Feed {
    link: Arc<Link>,
    deliver: mpsc::Sender<Arrived>,
    arrived: Mutex<mpsc::Receiver<Arrived>>,
    stop: CancellationToken,
    sources: std::sync::Mutex<Vec<Tap>>,
    /// The channels kept after the stop: without them, deliveries in hand could not be acknowledged.
    stopped: std::sync::Mutex<Vec<Channel>>,
}

/// A message, and the route that it was parked for, if it was.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) message: Delivery,
    pub(super) parked: Option<Arc<str>>,
}

/// One queue that is consumed, or paused for now.
#[derive(Debug)]
struct Tap {
    parked: Option<Arc<str>>,
    is_open: watch::Sender<bool>,
    task: AbortOnDropHandle<Option<Channel>>,
}

impl Feed {
    /// Starts to consume `queue` with this prefetch. `others`: how many deliveries may come from other queues. Call
    /// within a tokio runtime.
    pub(super) fn start(link: Arc<Link>, queue: String, prefetch: u16, others: u16) -> Feed {
        let (deliver, arrived) = mpsc::channel(usize::from(prefetch) + usize::from(others));
        let (stop, sources, stopped) = Default::default();
        let feed = Feed { link, deliver, arrived: Mutex::new(arrived), stop, sources, stopped };
        feed.consume(queue, None, prefetch, None);
        feed
    }

    /// `ensure`: the topology to declare before the first consume, where it may not exist yet.
    fn consume(&self, queue: String, parked: Option<Arc<str>>, prefetch: u16, ensure: Option<Topology>) {
        let (is_open, open) = watch::channel(true);
        let source = Source {
            link: Arc::clone(&self.link),
            queue,
            parked: parked.clone(),
            prefetch,
            deliver: self.deliver.clone(),
            open,
            ensure,
            stop: self.stop.clone(),
        };
        let task = AbortOnDropHandle::new(tokio::spawn(source.run()));
        lock(&self.sources).push(Tap { parked, is_open, task });
    }

    /// Consumes the queues of parked events of these routes, and of no others. `prefetch`: for each of them.
    pub(super) fn take_parked(&self, routes: &[Arc<str>], topology: &Topology, prefetch: u16) {
        let mut known = Vec::new();
        for tap in &*lock(&self.sources) {
            let Some(route) = &tap.parked else { continue };
            let is_wanted = routes.contains(route);
            tap.is_open.send_if_modified(|is_open| std::mem::replace(is_open, is_wanted) != is_wanted);
            known.push(Arc::clone(route));
        }
        if self.stop.is_cancelled() {
            return;
        }
        for route in routes.iter().filter(|route| !known.contains(route)) {
            let is_new = topology.add_parked(route);
            let ensure = is_new.then(|| topology.clone().without_probe());
            self.consume(topology.parked(route), Some(Arc::clone(route)), prefetch, ensure);
        }
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// The next message that may still be settled.
    pub(super) async fn next(&self) -> Arrived {
        let mut arrived = self.arrived.lock().await;
        loop {
            match arrived.recv().await {
                // Its connection is gone: the broker has the message back.
                Some(stale) if !stale.message.usable() => {}
                Some(arrived) => return arrived,
                None => return std::future::pending().await,
            }
        }
    }

    /// Takes no more, and gives back what no handler has begun, for other consumers to take now.
    pub(super) async fn stop(&self) {
        self.stop.cancel();
        let taps = std::mem::take(&mut *lock(&self.sources));
        let ended = join_all(taps.into_iter().map(|tap| tokio::time::timeout(REPLY_TIMEOUT, tap.task))).await;
        lock(&self.stopped).extend(ended.into_iter().flatten().flatten().flatten());
        let returning = async {
            let mut arrived = self.arrived.lock().await;
            while let Ok(Arrived { message, .. }) = arrived.try_recv() {
                give_back(&message).await;
            }
        };
        // What cannot be given back here goes back when the connection ends.
        drop(tokio::time::timeout(REPLY_TIMEOUT, returning).await);
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
    parked: Option<Arc<str>>,
    prefetch: u16,
    deliver: mpsc::Sender<Arrived>,
    /// Whether the queue is consumed now.
    open: watch::Receiver<bool>,
    ensure: Option<Topology>,
    stop: CancellationToken,
}

/// Why consuming has paused.
enum Pause {
    Stopped,
    Closed,
}

impl Source {
    /// Runs until the stop. Returns the channel of the deliveries in hand then.
    async fn run(mut self) -> Option<Channel> {
        loop {
            let session = tokio::select! {
                session = self.link.up() => session,
                () = self.stop.cancelled() => return None,
            };
            match self.over(&session).await {
                Ok(channel) => return Some(channel),
                // Without a new session nothing would arrive any more.
                Err(why) => session.fail(why),
            }
            session.ended().await;
        }
    }

    /// Consumes over one session, on one channel: deliveries in hand are acknowledged on it. Returns `Ok` when the feed
    /// was stopped.
    async fn over(&mut self, session: &Session) -> Result<Channel, String> {
        if let Some(topology) = &self.ensure {
            session.ensure(topology).await?;
            self.ensure = None;
        }
        let channel = session.channel().await?;
        channel.basic_qos(self.prefetch, BasicQosOptions::default()).await.map_err(|error| error.to_string())?;
        loop {
            tokio::select! {
                opened = self.open.wait_for(|is_open| *is_open) => {
                    if opened.is_err() {
                        return Ok(channel);
                    }
                }
                () = session.ended() => return Err("ended".to_owned()),
                () = self.stop.cancelled() => return Ok(channel),
            }
            if let Pause::Stopped = self.consume(&channel, session).await? {
                return Ok(channel);
            }
        }
    }

    async fn consume(&mut self, channel: &Channel, session: &Session) -> Result<Pause, String> {
        let (queue, options) = (self.queue.as_str().into(), BasicConsumeOptions::default());
        let consumer = channel.basic_consume(queue, "".into(), options, FieldTable::default()).await;
        let consumer = consumer.map_err(|error| error.to_string())?;
        let over = CancellationToken::new();
        let _until_here = over.clone().drop_guard();
        let (deliver, parked) = (self.deliver.clone(), self.parked.clone());
        let mut incoming = Incoming::each(channel, consumer, move |message| {
            let is_probe = headers::is_probe(&message.properties);
            let arrived = Arrived { message, parked: parked.clone() };
            let left = match is_probe {
                true => Some(arrived),
                // Full only after a reconnect, while it holds stale deliveries of the old connection.
                false => deliver.try_send(arrived).err().map(TrySendError::into_inner),
            };
            let left = left.map(|arrived| (deliver.clone(), arrived, over.clone()));
            async move {
                let Some((deliver, arrived, over)) = left else { return };
                if is_probe {
                    // Its arrival is all that a probe has to show.
                    drop(arrived.message.ack(BasicAckOptions::default()).await);
                    return;
                }
                match over.run_until_cancelled(deliver.reserve()).await {
                    Some(Ok(place)) => place.send(arrived),
                    Some(Err(_)) | None => give_back(&arrived.message).await,
                }
            }
        });
        let pause = tokio::select! {
            why = incoming.ended() => return Err(why),
            () = session.ended() => return Err("ended".to_owned()),
            () = self.stop.cancelled() => Pause::Stopped,
            _ = self.open.wait_for(|is_open| !*is_open) => Pause::Closed,
        };
        incoming.stop().await;
        Ok(pause)
    }
}
