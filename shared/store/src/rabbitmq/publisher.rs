//! Publishing with confirms. The library mixes up confirms when tasks share a channel, so each channel has a single
//! publishing task, a lane. Confirms are awaited by another task, and never dropped unresolved while their channel
//! lives.

use super::endpoint::REPLY_TIMEOUT;
use super::link::{Link, Session};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::poll_fn;
use lapin::message::BasicReturnMessage;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation, PublisherConfirm};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use streamgate_core::ports::StoreError;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

/// A confirm that is this late will not come: the channel is abandoned with everything that waits on it.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);
/// Confirms processed together: a return may be reported with another publish of the same acknowledgement.
const CONFIRM_CHUNK: usize = 256;

/// How many publishes may be under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Width {
    /// Channels, each with a task that publishes.
    pub(super) lanes: usize,
    /// Unconfirmed publishes per channel. With one, a return is always reported with its own publish.
    pub(super) window: usize,
}

#[derive(Debug)]
pub(super) struct Message {
    pub(super) exchange: ShortString,
    pub(super) routing_key: ShortString,
    pub(super) properties: BasicProperties,
    pub(super) body: Bytes,
}

/// Publishes all messages on a channel in confirm mode that nobody else uses, and awaits their confirms. Returns which
/// of them the broker has. If one came back, no confirm can be trusted, because the library may report a return with
/// another publish.
pub(super) async fn publish_batch(
    channel: &Channel,
    messages: impl Iterator<Item = Message> + Send,
) -> Result<Vec<bool>, String> {
    let text = |error: lapin::Error| error.to_string();
    let publish = async {
        let (mut exchanges, mut confirms) = (Vec::new(), Vec::new());
        for Message { exchange, routing_key, properties, body } in messages {
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            exchanges.push(exchange.clone());
            confirms
                .push(channel.basic_publish(exchange, routing_key, options, &body, properties).await.map_err(text)?);
        }
        let confirms = futures_util::future::try_join_all(confirms).await.map_err(text)?;
        let confirmed = exchanges.iter().zip(confirms).map(|(exchange, confirm)| match confirm {
            Confirmation::Ack(None) => Ok(true),
            Confirmation::Nack(None) => Ok(false),
            Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_)) | Confirmation::NotRequested => {
                Err(format!("no queue is bound to the exchange {exchange}; the services bind theirs when they start"))
            }
        });
        confirmed.collect()
    };
    tokio::time::timeout(CONFIRM_TIMEOUT, publish)
        .await
        .unwrap_or_else(|_| Err(format!("no confirm within {CONFIRM_TIMEOUT:?}")))
}

/// Called for each message that came back because no queue took it.
pub type OnReturn = Arc<dyn Fn() + Send + Sync>;

type Reply = oneshot::Sender<Result<(), StoreError>>;

struct Job {
    message: Message,
    done: Reply,
}

/// A published message whose confirm is awaited.
struct Unconfirmed {
    confirm: PublisherConfirm,
    id: Option<ShortString>,
    done: Reply,
    /// Its permit of the window, released with the confirm.
    place: OwnedSemaphorePermit,
}

pub(super) struct Publisher {
    link: Arc<Link>,
    lanes: Vec<mpsc::Sender<Job>>,
    next: AtomicUsize,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher").field("lanes", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl Publisher {
    pub(super) fn start(link: Arc<Link>, width: Width, on_return: &OnReturn) -> Publisher {
        let (lanes, tasks) = (0..width.lanes)
            .map(|_| {
                let (jobs, queue) = mpsc::channel(width.window);
                let lane = Lane { link: Arc::clone(&link), window: width.window, on_return: Arc::clone(on_return) };
                (jobs, AbortOnDropHandle::new(tokio::spawn(lane.run(queue))))
            })
            .unzip();
        Publisher { link, lanes, next: AtomicUsize::new(0), _tasks: tasks }
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// Returns when the broker has confirmed that a queue holds the message. After an error it may hold it all the same.
    pub(super) async fn publish(&self, message: Message) -> Result<(), StoreError> {
        self.link.session()?;
        let place = self.next.fetch_add(1, Ordering::Relaxed) % self.lanes.len();
        let ended = || StoreError::Unavailable("the connection to RabbitMQ ended before the confirm".to_owned());
        let confirmed = async {
            let (done, reply) = oneshot::channel();
            let lane = self.lanes.get(place).ok_or_else(ended)?;
            lane.send(Job { message, done }).await.map_err(|_| ended())?;
            reply.await.map_err(|_| ended())?
        };
        // A caller with a shorter deadline gives up by itself, or keeps listening: a late confirm is useful too.
        tokio::time::timeout(CONFIRM_TIMEOUT, confirmed)
            .await
            .unwrap_or_else(|_| Err(StoreError::Unavailable(format!("no confirm within {CONFIRM_TIMEOUT:?}"))))
    }
}

struct Lane {
    link: Arc<Link>,
    window: usize,
    on_return: OnReturn,
}

/// Why a lane changes its channel, or ends.
enum End {
    /// All senders of jobs are gone.
    Jobs,
    Session,
    /// The channel refuses every publish.
    Channel,
}

impl Lane {
    async fn run(self, mut jobs: mpsc::Receiver<Job>) {
        loop {
            let session = tokio::select! {
                // Just after a reconnect both branches are ready, and the job can be published.
                biased;
                session = self.link.up() => session,
                // Dropping the job reports it as failed: nothing is published while there is no connection.
                job = jobs.recv() => match job {
                    Some(_) => continue,
                    None => return,
                },
            };
            match self.over(&session, &mut jobs).await {
                Ok(End::Jobs) => return,
                Ok(End::Channel) => continue,
                Ok(End::Session) => session.fail("its confirms are no longer awaited"),
                Err(why) => session.fail(why),
            }
            session.ended().await;
        }
    }

    /// Publishes over one channel until it or its session ends.
    async fn over(&self, session: &Session, jobs: &mut mpsc::Receiver<Job>) -> Result<End, String> {
        let channel = self.open(session).await?;
        let (confirms, unconfirmed) = mpsc::channel(self.window);
        let refused = Arc::new(Notify::new());
        let settle = Settle {
            session: session.clone(),
            window: self.window,
            on_return: Arc::clone(&self.on_return),
            refused: Arc::clone(&refused),
        };
        let collector = tokio::spawn(settle.collect(unconfirmed));
        let places = Arc::new(Semaphore::new(self.window));
        let end = publish_all(&channel, jobs, &confirms, (&places, self.window), session, &refused).await;
        drop(confirms);
        drop(collector.await);
        if let End::Channel = end {
            // Nothing is unconfirmed on the channel. Where RabbitMQ does not reply, for example under an alarm, the
            // channel ends with its session.
            drop(tokio::time::timeout(REPLY_TIMEOUT, channel.close(200, "OK".into())).await);
        }
        Ok(end)
    }

    async fn open(&self, session: &Session) -> Result<Channel, String> {
        let channel = session.channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(|error| error.to_string())?;
        Ok(channel)
    }
}

/// Publishes one job after the other.
async fn publish_all(
    channel: &Channel,
    jobs: &mut mpsc::Receiver<Job>,
    confirms: &mpsc::Sender<Unconfirmed>,
    (places, window): (&Arc<Semaphore>, usize),
    session: &Session,
    refused: &Notify,
) -> End {
    loop {
        // First the permit for the confirm, then the job: when the window is full, jobs stay where their callers can
        // withdraw them.
        let place = tokio::select! {
            place = Arc::clone(places).acquire_owned() => place,
            () = session.ended() => return End::Session,
        };
        let Ok(place) = place else { return End::Session };
        let Job { message, done } = tokio::select! {
            // If a quorum queue loses its leader just when a channel first publishes to it, that channel refuses for
            // ever (seen on RabbitMQ 3.10). A full queue refuses on every channel, and then a new channel costs little.
            () = refused.notified() => match places.available_permits() + 1 == window {
                true => return End::Channel,
                false => continue,
            },
            job = jobs.recv() => match job {
                Some(job) => job,
                None => return End::Jobs,
            },
            () = session.ended() => return End::Session,
        };
        // The caller has given up, and has reported the event as not durable.
        if done.is_closed() {
            continue;
        }
        let Message { exchange, routing_key, properties, body } = message;
        let id = properties.message_id().clone();
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        // Never abandoned while the session lives, however long a blocked broker takes: the library would send it all
        // the same.
        let published = tokio::select! {
            published = channel.basic_publish(exchange, routing_key, options, &body, properties) => published,
            () = session.ended() => return End::Session,
        };
        match published {
            Ok(confirm) => {
                // Never full: there are no more confirms than permits.
                if confirms.send(Unconfirmed { confirm, id, done, place }).await.is_err() {
                    return End::Session;
                }
            }
            Err(error) => {
                session.fail(&error);
                drop(done.send(Err(StoreError::Unavailable(error.to_string()))));
                return End::Session;
            }
        }
    }
}

/// Awaits the confirms of one channel and passes them to the callers.
struct Settle {
    session: Session,
    window: usize,
    on_return: OnReturn,
    /// Notified when the broker refuses publishes and confirms none of them.
    refused: Arc<Notify>,
}

impl Settle {
    async fn collect(self, mut unconfirmed: mpsc::Receiver<Unconfirmed>) {
        let Settle { session, window, on_return, refused } = self;
        let confirms = poll_fn(move |context| unconfirmed.poll_recv(context));
        let settled = confirms
            .map(|Unconfirmed { confirm, id, done, place }| async move {
                (tokio::time::timeout(CONFIRM_TIMEOUT, confirm).await, id, done, place)
            })
            .buffer_unordered(window)
            .ready_chunks(CONFIRM_CHUNK);
        let mut settled = std::pin::pin!(settled);
        loop {
            // Biased: after a return ended the session, a confirm that is ready may belong to the returned message.
            let chunk = tokio::select! {
                biased;
                () = session.ended() => None,
                chunk = settled.next() => chunk,
            };
            let Some(chunk) = chunk else { return };
            let mut returned = HashSet::new();
            let mut results = Vec::with_capacity(chunk.len());
            let (mut acks, mut nacks) = (0, 0);
            for (confirm, id, done, place) in chunk {
                let result = match confirm {
                    Ok(Ok(Confirmation::Ack(message))) => {
                        acks += 1;
                        returned.extend(message.and_then(returned_id));
                        Ok(())
                    }
                    Ok(Ok(Confirmation::Nack(message))) => {
                        nacks += 1;
                        returned.extend(message.and_then(returned_id));
                        Err(StoreError::Full("RabbitMQ refuses the event: its queue is at its limit".to_owned()))
                    }
                    Ok(Ok(Confirmation::NotRequested)) => {
                        Err(StoreError::Unavailable("the channel is not in confirm mode".to_owned()))
                    }
                    Ok(Err(error)) => {
                        session.fail(&error);
                        Err(StoreError::Unavailable(error.to_string()))
                    }
                    Err(_) => {
                        let why = format!("no confirm within {CONFIRM_TIMEOUT:?}");
                        session.fail(&why);
                        Err(StoreError::Unavailable(why))
                    }
                };
                results.push((result, id, done, place));
            }
            for _ in &returned {
                on_return();
            }
            if !returned.is_empty() {
                // The alternate exchange takes whatever no queue is bound for. A returned message means that it is
                // broken, and that plain confirms cannot be trusted either. The topology is ensured before the next
                // publish.
                session.fail("a message came back: no queue took it, the alternate exchange neither");
            }
            // With a window of one, the permit is released only after a return was reported.
            for (result, id, done, _place) in results {
                let came_back = id.is_some_and(|id| returned.contains(&id));
                let result =
                    if came_back { Err(StoreError::Unavailable("no queue took the event".to_owned())) } else { result };
                // A caller that has given up no longer listens.
                drop(done.send(result));
            }
            if nacks > 0 && acks == 0 {
                refused.notify_one();
            }
        }
    }
}

fn returned_id(message: BasicReturnMessage) -> Option<ShortString> {
    let id = message.properties.message_id().clone();
    tracing::error!(id = id.as_ref().map(ShortString::as_str), "RabbitMQ sent a message back: no queue took it");
    id.or_else(|| Some(ShortString::default()))
}
