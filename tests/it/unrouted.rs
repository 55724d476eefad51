//! Events that no queue is bound for: they are noticed, reported and handed back, and nothing else stays in their queue.

use crate::harness::eventually;
use crate::harness::process::Server;
use crate::harness::receiver::Receiver;
use crate::harness::wire::{Webhook, send};
use crate::topology::{declared_by_an_operator, failures, site};
use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, QueueBindOptions, QueueDeleteOptions};
use lapin::types::FieldTable;

async fn diverts(server: &Server) {
    eventually("/readyz says that events are diverted", || async {
        let (status, body) = server.ops("/readyz").await;
        status == 503 && body.contains("diverts events") && body.contains("*.push.#")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_diverted_by_a_deleted_queue_are_handed_back() {
    let service = Receiver::willing().await;
    let (site, prefix, backends) = site("", "retry = [\"1s\"]", &service.route()).await;
    let gateway = site.start_as("gateway").await.ready().await;
    let (_connection, channel) = backends.broker.channel().await;
    let events = format!("{prefix}.events");
    channel.queue_delete(events.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    for _ in 0..100 {
        assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    }
    eventually("the depth is shown", || async {
        gateway.metric("streamgate_queue_messages{queue=\"unrouted\"}").await >= 1.0
    })
    .await;
    eventually("all are handed back", || async { backends.broker.ready(&events).await == 100 }).await;
    assert_eq!(backends.broker.ready(&format!("{prefix}.unrouted")).await, 0);
    site.logged("RabbitMQ diverts events").await;
    assert_eq!(site.log().matches("RabbitMQ diverts events").count(), 1, "{}", site.log());
    // The queue is declared again. If events came during the gateway's first look, the next look had to find them.
    let gateway = gateway.ready().await;
    assert_eq!(send(gateway.public, &Webhook::push("last", "{}")).await.unwrap().outcome(), "enqueued");
    let _worker = site.start_as("worker").await.ready().await;
    eventually("all are handled", || async { service.ids().len() == 101 }).await;
    drop(gateway);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_binding_is_reported_until_an_operator_restores_it() {
    let service = Receiver::willing().await;
    let (site, prefix, backends) = site("declare = false", "retry = [\"1s\"]", &service.route()).await;
    declared_by_an_operator(&site).await;
    let gateway = site.start_as("gateway").await.ready().await;
    let _worker = site.start_as("worker").await.ready().await;
    let (_connection, channel) = backends.broker.channel().await;
    let (events, exchange) = (format!("{prefix}.events"), prefix.as_str());
    let nothing = FieldTable::default;
    channel.queue_unbind(events.as_str().into(), exchange.into(), "*.push.#".into(), nothing()).await.unwrap();
    for round in 1..=2 {
        assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
        diverts(&gateway).await;
        eventually("the event is handled all the same", || async { service.ids().len() == round }).await;
    }
    let options = QueueBindOptions::default();
    channel.queue_bind(events.as_str().into(), exchange.into(), "*.push.#".into(), options, nothing()).await.unwrap();
    let gateway = gateway.ready().await;
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    eventually("the event is handled", || async { service.ids().len() == 3 }).await;
    drop(gateway);
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_leave_nothing_behind() {
    let service = Receiver::willing().await;
    let (site, prefix, backends) = site("declare = false", "retry = [\"1s\"]", &service.route()).await;
    declared_by_an_operator(&site).await;
    // Each start and each `check` probes the exchanges whose bindings cannot be listed.
    for _ in 0..3 {
        let gateway = site.start_as("gateway").await.ready().await;
        let worker = site.start_as("worker").await.ready().await;
        assert_eq!(failures(&site).await, "");
        eventually("the worker has removed its probes", || async {
            backends.broker.ready(&format!("{prefix}.events")).await == 0
        })
        .await;
        assert!(worker.terminate().await.success());
        assert!(gateway.terminate().await.success());
    }
    for queue in ["events", "unrouted", "dead", "retry.1000"] {
        assert_eq!(backends.broker.ready(&format!("{prefix}.{queue}")).await, 0, "{queue}");
    }
    assert!(service.received().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strangers_message_to_the_exchange_is_a_dead_letter_and_disturbs_nothing() {
    let (site, prefix, backends) = site("", "", "").await;
    let gateway = site.start_as("gateway").await.ready().await;
    let (_connection, channel) = backends.broker.channel().await;
    let (exchange, key) = (prefix.as_str().into(), "something.else".into());
    let properties = BasicProperties::default().with_message_id("strange".into());
    channel.basic_publish(exchange, key, BasicPublishOptions::default(), b"{}", properties).await.unwrap();
    let dead = format!("{prefix}.dead");
    eventually("the message is a dead letter", || async { backends.broker.ready(&dead).await == 1 }).await;
    let listed = site.run(&["dead", "list", "--reason", "unrouted", "--json"]).await;
    let dead_letters: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(dead_letters[0]["id"], "strange");
    assert_eq!(gateway.ops("/readyz").await.0, 200);
}
