//! How many messages of a queue wait.

use super::endpoint::REPLY_TIMEOUT;
use lapin::Channel;
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use streamgate_core::ports::StoreError;
use tokio::time::timeout;

/// Messages of a queue that nobody holds. A queue that does not exist closes the channel.
pub(super) async fn ready(channel: &Channel, queue: &str) -> Result<u32, StoreError> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let unavailable = |why: String| StoreError::Unavailable(format!("the queue {queue}: {why}"));
    match timeout(REPLY_TIMEOUT, channel.queue_declare(queue.into(), options, FieldTable::default())).await {
        Ok(declared) => Ok(declared.map_err(|error| unavailable(error.to_string()))?.message_count()),
        Err(_) => Err(unavailable(format!("no answer within {REPLY_TIMEOUT:?}"))),
    }
}
