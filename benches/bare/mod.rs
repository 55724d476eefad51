//! A bare publisher: others are compared with it, and it fills their queues.

use crate::harness::broker::Broker;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};

/// Publishes events without a gateway, with confirms and nothing around them, `in_flight` of them unconfirmed at a time.
pub async fn publish(broker: &Broker, prefix: &str, body: &[u8], events: u64, in_flight: usize) {
    let (_connection, channel) = broker.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let mut confirms = FuturesUnordered::new();
    for number in 0..events {
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_app_id("chat".into())
            .with_type("message.new".into())
            .with_message_id(format!("bare-{number}").into());
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let (exchange, key) = (prefix.into(), "chat.push.message.new".into());
        confirms.push(channel.basic_publish(exchange, key, options, body, properties).await.unwrap());
        if confirms.len() >= in_flight {
            confirms.next().await.unwrap().unwrap();
        }
    }
    while let Some(confirm) = confirms.next().await {
        confirm.unwrap();
    }
}
