//! How many messages of a queue wait.

use super::endpoint::REPLY_TIMEOUT;
use lapin::Channel;
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use streamgate_core::ports::StoreError;
use tokio::time::timeout;

/// Messages of a queue that nobody holds. A queue that does not exist closes the channel. There is no time limit: giving up drops
/// the channel, and if the broker closes it at the same time, the whole connection ends.
pub(super) async fn ready(channel: &Channel, queue: &str) -> Result<u32, StoreError> {
    declared(channel, queue).await.map(|(messages, _)| messages)
}

/// The same with a time limit, for a queue that exists, or for a connection that publishes nothing.
pub(super) async fn ready_in_time(channel: &Channel, queue: &str) -> Result<u32, StoreError> {
    look(channel, queue).await.map(|(messages, _)| messages)
}

/// The messages as [`ready_in_time`] counts them, and the queue's consumers.
pub(super) async fn look(channel: &Channel, queue: &str) -> Result<(u32, u32), StoreError> {
    let late = |_| unavailable(queue, &format!("no answer within {REPLY_TIMEOUT:?}"));
    timeout(REPLY_TIMEOUT, declared(channel, queue)).await.map_err(late)?
}

async fn declared(channel: &Channel, queue: &str) -> Result<(u32, u32), StoreError> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await;
    let declared = declared.map_err(|error| unavailable(queue, &error))?;
    Ok((declared.message_count(), declared.consumer_count()))
}

fn unavailable(queue: &str, why: &impl std::fmt::Display) -> StoreError {
    StoreError::Unavailable(format!("the queue {queue}: {why}"))
}
