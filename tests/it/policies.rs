//! RabbitMQ's policies: the events that they would drop become dead letters, with RabbitMQ's reason.

use crate::blame::deliver_and_drop;
use crate::harness::broker::Broker;
use crate::harness::process::Site;
use crate::harness::receiver::Receiver;
use crate::harness::wire::{Webhook, send};
use crate::harness::{PATIENCE, eventually, within};
use crate::topology::{failures, site};

/// A policy on the queues that match a pattern, until it is lifted.
pub struct Policy<'b> {
    broker: &'b Broker,
    path: String,
}

impl Policy<'_> {
    /// RabbitMQ applies a policy a while after it is set, and takes it away a while after it is deleted.
    pub async fn is_on(broker: &Broker, name: &str, queue: &str) -> bool {
        let queue = broker.manage("GET", &format!("queues/%2f/{queue}"), "").await;
        let queue: serde_json::Value = serde_json::from_str(&queue).unwrap();
        queue["policy"] == name
    }

    async fn set<'b>(broker: &'b Broker, name: &str, pattern: &str, definition: &str) -> Policy<'b> {
        let path = format!("policies/%2f/{name}");
        let body = format!(r#"{{"pattern":"{pattern}","definition":{definition},"apply-to":"queues"}}"#);
        broker.manage("PUT", &path, &body).await;
        Policy { broker, path }
    }

    async fn lift(self) {
        self.broker.manage("DELETE", &self.path, "").await;
    }
}

async fn dead_letters(site: &Site) -> Vec<serde_json::Value> {
    let listed = site.run(&["dead", "list", "--reason", "dropped_by_broker", "--json"]).await;
    assert!(listed.status.success(), "{listed:?}");
    serde_json::from_slice(&listed.stdout).unwrap()
}

async fn accept(site: &Site, count: usize) -> crate::harness::process::Server {
    let gateway = site.start_as("gateway").await.ready().await;
    for number in 0..count {
        let body = format!(r#"{{"type":"message.new","n":{number}}}"#);
        let webhook = Webhook::push(&format!("id-{number}"), body);
        assert_eq!(send(gateway.public, &webhook).await.unwrap().outcome(), "enqueued");
    }
    gateway
}

/// Replays all dead letters, and lets a worker handle them.
async fn handled_after_a_replay(site: &Site, service: &Receiver, count: usize) {
    let replayed = site.run(&["dead", "replay", "--reason", "dropped_by_broker", "--json"]).await;
    assert_eq!(String::from_utf8_lossy(&replayed.stdout).trim(), format!("{{\"replayed\":{count}}}"));
    let _worker = site.start_as("worker").await.ready().await;
    eventually("all are handled", || async { service.ids().len() == count }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_expired_by_a_policys_ttl_are_dead_letters_that_can_be_replayed() {
    let service = Receiver::willing().await;
    let (site, prefix, backends) = site("", "retry = [\"1s\"]", &service.route()).await;
    drop(site.start_as("worker").await.ready().await);
    let pattern = format!("^{prefix}\\\\.(events|unrouted)$");
    let policy = Policy::set(&backends.broker, &prefix, &pattern, r#"{"message-ttl":500}"#).await;
    let (events, dead) = (format!("{prefix}.events"), format!("{prefix}.dead"));
    eventually("the policy is applied", || Policy::is_on(&backends.broker, &prefix, &events)).await;
    let _gateway = accept(&site, 20).await;
    within(2 * PATIENCE, "all have expired", || async { backends.broker.ready(&dead).await == 20 }).await;
    policy.lift().await;
    eventually("the policy is gone", async || !Policy::is_on(&backends.broker, &prefix, &events).await).await;
    let dead_letters = dead_letters(&site).await;
    assert_eq!(dead_letters.len(), 20);
    for (number, dead_letter) in dead_letters.iter().enumerate() {
        assert_eq!(
            (dead_letter["id"].as_str().unwrap(), dead_letter["type"].as_str().unwrap()),
            (&*format!("id-{number}"), "message.new")
        );
        let error = dead_letter["error"].as_str().unwrap();
        assert!(error.contains(&format!("{prefix}.events: expired")), "{error}");
    }
    handled_after_a_replay(&site, &service, 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_dropped_by_a_policys_delivery_limit_is_a_dead_letter() {
    let service = Receiver::willing().await;
    let (site, prefix, backends) = site("", "retry = [\"1s\"]", &service.route()).await;
    let policy =
        Policy::set(&backends.broker, &prefix, &format!("^{prefix}\\\\.events$"), r#"{"delivery-limit":2}"#).await;
    let _gateway = accept(&site, 1).await;
    let events = format!("{prefix}.events");
    eventually("the policy is applied", || Policy::is_on(&backends.broker, &prefix, &events)).await;
    deliver_and_drop(&backends.broker, &events, 3).await;
    eventually("the event is a dead letter", || async { dead_letters(&site).await.len() == 1 }).await;
    assert!(dead_letters(&site).await[0]["error"].as_str().unwrap().contains("delivery_limit"));
    policy.lift().await;
    handled_after_a_replay(&site, &service, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_refused_by_a_policys_length_limit_wait_in_the_spool() {
    let service = Receiver::willing().await;
    let (site, prefix, backends) = site("", "retry = [\"1s\"]", &service.route()).await;
    let gateway = site.start_as("gateway").await.ready().await;
    let policy = Policy::set(&backends.broker, &prefix, &format!("^{prefix}\\\\."), r#"{"max-length":10}"#).await;
    let mut outcomes = Vec::new();
    for number in 0..100 {
        let webhook = Webhook::push(&format!("id-{number}"), format!(r#"{{"type":"message.new","n":{number}}}"#));
        outcomes.push(send(gateway.public, &webhook).await.unwrap().outcome().to_owned());
    }
    assert!(outcomes.iter().any(|outcome| outcome == "spooled"), "{outcomes:?}");
    let _worker = site.start_as("worker").await.ready().await;
    eventually("all are handled", || async { service.ids().len() == 100 }).await;
    policy.lift().await;
    assert_eq!(backends.broker.ready(&format!("{prefix}.dead")).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_returns_though_a_policy_gives_it_another_routing_key() {
    let service = Receiver::start(|one| match one.header("x-streamgate-attempt") {
        "1" => crate::harness::receiver::reply(503, &[]),
        _ => crate::harness::receiver::reply(200, &[]),
    })
    .await;
    let (site, prefix, backends) = site("", "retry = [\"200ms\"]", &service.route()).await;
    let pattern = format!("^{prefix}\\\\.retry");
    let policy = Policy::set(&backends.broker, &prefix, &pattern, r#"{"dead-letter-routing-key":"astray"}"#).await;
    let _gateway = accept(&site, 1).await;
    let worker = site.start_as("worker").await.ready().await;
    let done = "streamgate_worker_deliveries_total{outcome=\"done\",route=\"app\"}";
    eventually("the event is tried again", || async { worker.metric(done).await == 1.0 }).await;
    policy.lift().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_finds_policies_that_lose_events() {
    let (site, prefix, backends) = site("", "retry = [\"1s\"]", "").await;
    let url = backends.broker.management_url();
    let configured = std::fs::read_to_string(site.config()).unwrap();
    let with_url = format!("[rabbitmq]\nmanagement_url = \"{url}\"\n");
    site.write("streamgate.toml", configured.replace("[rabbitmq]\n", &with_url));
    assert_eq!(failures(&site).await, "", "no queue exists yet");
    drop(site.start_as("worker").await.ready().await);
    assert_eq!(failures(&site).await, "");
    let broker = &backends.broker;
    for (definition, queue, says) in [
        (r#"{"overflow":"drop-head"}"#, "events", "are dropped"),
        (r#"{"expires":3600000}"#, "events", "deletes the queue"),
        (r#"{"message-ttl":3600000}"#, "dead", "dead letters are deleted"),
    ] {
        let policy = Policy::set(broker, &prefix, &format!("^{prefix}\\\\.{queue}$"), definition).await;
        eventually(says, || async {
            let failed = failures(&site).await;
            failed.contains(says) && failed.contains(&format!("{prefix}.{queue}"))
        })
        .await;
        policy.lift().await;
    }
    let wrong = url.replace("guest@", "wrong@");
    site.write(
        "streamgate.toml",
        configured.replace("[rabbitmq]\n", &format!("[rabbitmq]\nmanagement_url = \"{wrong}\"\n")),
    );
    let failed = failures(&site).await;
    assert!(failed.contains("refuses the login") && !failed.contains("wrong@"), "{failed}");
}
