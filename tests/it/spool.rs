//! The spool: while RabbitMQ takes no events the gateway keeps them on its disk, and hands them over once RabbitMQ takes them.

use crate::harness::broker::Broker;
use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::receiver::Receiver;
use crate::harness::servers::{Backends, RedisServer};
use crate::harness::wire::{Webhook, send, until_refused};
use rustix::process::Signal;
use std::collections::HashSet;

/// A site for gateways on these backends, and the name of its queue of events.
fn site(backends: &Backends, store: &str, rabbitmq: &str) -> (Site, String) {
    configured(Site::new(), backends, store, rabbitmq)
}

fn configured(site: Site, backends: &Backends, store: &str, rabbitmq: &str) -> (Site, String) {
    let tables = backends.tables_with(&site.name(), rabbitmq);
    let gateway = "answer_deadline = \"5900ms\"".into();
    site.configure(&Setup { gateway, store: store.into(), rest: tables, ..Setup::default() });
    let events = format!("{}.events", site.name());
    (site, events)
}

/// A worker on the queues of those gateways, and its site.
async fn worker(backends: &Backends, prefix: &str, rabbitmq: &str, service: &Receiver) -> (Site, Server) {
    let site = Site::new();
    let rest = format!("{}\n{}", service.route(), backends.tables_with(prefix, rabbitmq));
    site.configure(&Setup { rest, ..Setup::default() });
    let server = site.start_as("worker").await.ready().await;
    (site, server)
}

/// Backends whose RabbitMQ is down.
async fn without_broker() -> Backends {
    let (mut broker, redis) = tokio::join!(Broker::start(), RedisServer::start());
    broker.kill();
    Backends { broker, redis }
}

async fn spooled(gateway: &Server, count: usize) -> Vec<Webhook> {
    let webhooks: Vec<_> = (0..count).map(|_| Webhook::fresh()).collect();
    for webhook in &webhooks {
        let answer = send(gateway.public, webhook).await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.outcome()), (200, "spooled"));
    }
    webhooks
}

async fn waits(gateway: &Server) -> u32 {
    gateway.metric("streamgate_spool_events").await as u32
}

#[tokio::test(flavor = "multi_thread")]
async fn events_taken_during_an_outage_of_rabbitmq_and_redis_all_arrive() {
    let (mut backends, service) = (without_broker().await, Receiver::willing().await);
    backends.redis.kill();
    let (site, _) = site(&backends, "", "");
    let gateway = site.start_as("gateway").await;
    let webhooks = spooled(&gateway, 300).await;
    let repeat = send(gateway.public, &webhooks[0]).await.unwrap();
    assert_eq!((repeat.status.as_u16(), repeat.outcome()), (200, "duplicate"));
    assert_eq!(gateway.ops("/readyz").await.0, 200, "an event can be made durable without RabbitMQ");
    eventually("the gauges show the spool", || async {
        waits(&gateway).await == 300 && gateway.metric("streamgate_spool_oldest_seconds").await >= 1.0
    })
    .await;
    assert!(gateway.metric("streamgate_spool_bytes").await > 300.0 * 50.0);
    backends.broker.restart().await;
    eventually("the spool is handed over", || async { waits(&gateway).await == 0 }).await;
    assert_eq!(gateway.metric("streamgate_spool_oldest_seconds").await, 0.0);
    assert_eq!(gateway.metric("streamgate_spool_released_total").await, 300.0);
    backends.redis.restart().await;
    let (_worker_site, worker) = worker(&backends, &site.name(), "", &service).await;
    let sent: HashSet<_> = webhooks.iter().map(|webhook| webhook.id().to_owned()).collect();
    eventually("all arrive", || async { service.ids() == sent }).await;
    for received in service.received() {
        let webhook = webhooks.iter().find(|one| one.id() == received.header("x-webhook-id")).unwrap();
        assert_eq!(received.body, webhook.body);
        assert_eq!(received.header("x-signature"), webhook.headers[2].1);
    }
    assert_eq!(service.received().len(), 300, "each event was handled once");
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    for server in [gateway, worker] {
        assert!(server.terminate().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spool_of_a_killed_gateway_is_handed_over_by_the_next_or_by_drain() {
    let mut backends = without_broker().await;
    let (site, events) = site(&backends, "", "");
    let gateway = site.start_as("gateway").await;
    spooled(&gateway, 50).await;
    // A second owner of the directory is refused, and its error says why.
    for args in [&["gateway"][..], &["drain"], &["up", "--data-dir", site.data_dir().to_str().unwrap()]] {
        let config = if args[0] == "up" { "none.toml" } else { "streamgate.toml" };
        let mut command = site.command(args);
        command.env("STREAMGATE_CONFIG", site.write("none.toml", "").with_file_name(config));
        command.env("STREAMGATE__GATEWAY__LISTEN", "127.0.0.1:0");
        command.env("STREAMGATE__GATEWAY__OPS_LISTEN", "127.0.0.1:0");
        let refused = command.output().await.unwrap();
        let errors = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{args:?}: {errors}");
        assert!(errors.contains("another streamgate process uses the data directory"), "{args:?}: {errors}");
    }
    gateway.kill().await;
    let gateway = site.start_as("gateway").await;
    assert_eq!(spooled(&gateway, 50).await.len(), 50);
    eventually("the events of both runs wait", || async { waits(&gateway).await == 100 }).await;
    // Events that cannot be handed over at the end stay in the spool, and the log says so.
    assert!(gateway.terminate().await.success());
    assert!(site.log().contains("events are left in the spool"), "{}", site.log());
    backends.broker.restart().await;
    let drained = site.run(&["drain", "--json"]).await;
    assert_eq!(String::from_utf8_lossy(&drained.stdout).trim(), r#"{"handed_over":100,"left":0}"#, "{drained:?}");
    assert_eq!(drained.status.code(), Some(0));
    assert_eq!(backends.broker.ready(&events).await, 100);
    let again = site.run(&["drain"]).await;
    assert_eq!(String::from_utf8_lossy(&again.stdout), "0 events handed over to RabbitMQ, 0 left\n");
    let nowhere = site.run(&["drain", "--data-dir", "nowhere"]).await;
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("there is no store in nowhere"), "{nowhere:?}");
    assert!(!site.path("nowhere").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_broker_delays_no_caller_and_its_late_confirms_repeat_no_event() {
    let (broker, redis) = tokio::join!(Broker::start(), RedisServer::start());
    let backends = Backends { broker, redis };
    let confirms = "spool_after = \"100ms\"\nconfirm_timeout = \"5s\"";
    // In memory: on a disk that is busy, a commit can take as long as the confirm's time.
    let (site, events) = configured(Site::in_memory(), &backends, "", confirms);
    let gateway = site.start_as("gateway").await.ready().await;
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    backends.broker.signal(Signal::STOP);
    // In flight when RabbitMQ began to hang: durable on the disk after the confirm's timeout.
    let public = gateway.public;
    let sent = || tokio::spawn(async move { send(public, &Webhook::fresh()).await.unwrap() });
    let first = sent();
    eventually("the first waits for its confirm", || async {
        assert!(!first.is_finished(), "the first waits: {}", site.log());
        gateway.metric("streamgate_gateway_in_flight").await >= 1.0
    })
    .await;
    // Meanwhile, events that come a little later are not even published.
    let mut others = Vec::new();
    eventually("the gate is shut", || {
        others.push(sent());
        std::future::ready(others.iter().any(tokio::task::JoinHandle::is_finished))
    })
    .await;
    assert!(!first.is_finished(), "the first still waits when others are answered");
    spooled(&gateway, 20).await;
    for one in others.into_iter().chain([first]) {
        assert_eq!(one.await.unwrap().outcome(), "spooled");
    }
    let taken = waits_settled(&gateway).await;
    backends.broker.signal(Signal::CONT);
    eventually("the spool is empty", || async { waits(&gateway).await == 0 }).await;
    assert_eq!(backends.broker.ready(&events).await, taken + 1, "each event is in the queue once: {}", site.log());
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    assert!(gateway.terminate().await.success());
}

/// The number of spooled events, once the gauge shows it.
async fn waits_settled(gateway: &Server) -> u32 {
    let taken = gateway.pushes("spooled").await as u32;
    eventually("the gauge shows all of them", || async { waits(gateway).await == taken }).await;
    taken
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_a_full_queue_refuses_wait_in_the_spool() {
    let (broker, redis) = tokio::join!(Broker::start(), RedisServer::start());
    let (backends, service) = (Backends { broker, redis }, Receiver::willing().await);
    let (site, events) = site(&backends, "", "events_max = \"1MiB\"");
    let gateway = site.start_as("gateway").await.ready().await;
    let wide = |n: u32| Webhook::push(&format!("wide-{n}"), format!("{n}{}", "x".repeat(20_000)));
    let mut outcomes = std::collections::BTreeMap::<String, u32>::new();
    for n in 0..150 {
        let answer = send(gateway.public, &wide(n)).await.unwrap();
        assert_eq!(answer.status.as_u16(), 200);
        *outcomes.entry(answer.outcome().to_owned()).or_default() += 1;
    }
    assert!(outcomes["enqueued"] >= 20 && outcomes["spooled"] >= 20, "{outcomes:?}");
    let in_queue = backends.broker.ready(&events).await;
    assert!(in_queue < 150);
    let (_worker_site, worker) = worker(&backends, &site.name(), "events_max = \"1MiB\"", &service).await;
    eventually("all arrive", || async { service.ids().len() == 150 }).await;
    assert_eq!(service.received().len(), 150, "each event was handled once");
    for server in [gateway, worker] {
        assert!(server.terminate().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_is_503_and_takes_events_again_when_it_has_room() {
    let mut backends = without_broker().await;
    let (site, events) = site(&backends, "spool_max = \"1MiB\"", "");
    let gateway = site.start_as("gateway").await;
    let wide = |n: u32| Webhook::push(&format!("wide-{n}"), format!("{n}{}", "x".repeat(100_000)));
    let (taken, refused) = until_refused(gateway.public, wide).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_str()), (503, "store_full"));
    assert_eq!(refused.headers["retry-after"], "1");
    let (status, text) = gateway.ops("/readyz").await;
    assert!(status == 503 && text.contains("spool_max") && text.contains("RabbitMQ"), "{text}");
    backends.broker.restart().await;
    eventually("the spool is handed over", || async { waits(&gateway).await == 0 }).await;
    assert_eq!(backends.broker.ready(&events).await, taken);
    assert_eq!(send(gateway.public, &wide(taken)).await.unwrap().outcome(), "enqueued");
    assert!(gateway.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_spool_is_set_aside_loudly_and_the_gateway_starts() {
    let mut backends = without_broker().await;
    let (site, _) = site(&backends, "", "");
    let gateway = site.start_as("gateway").await;
    spooled(&gateway, 1).await;
    // A clean stop, so that no WAL is left from which SQLite would repair the file.
    assert!(gateway.terminate().await.success());
    let file = site.data_dir().join("streamgate.db");
    let damaged = vec![0x55; 40_000];
    std::fs::write(&file, &damaged).unwrap();
    let gateway = site.start_as("gateway").await;
    site.logged("the store is damaged: set aside as it is").await;
    let names = site.data_dir().read_dir().unwrap().map(|entry| entry.unwrap().path());
    let aside = names.into_iter().find(|path| path.to_string_lossy().ends_with('Z')).expect("the damaged file is kept");
    assert!(std::fs::read(aside).unwrap() == damaged, "the damaged file is unchanged");
    spooled(&gateway, 1).await;
    assert!(gateway.terminate().await.success());
    // `drain` must not present the directory as empty.
    backends.broker.restart().await;
    let drained = site.run(&["drain"]).await;
    assert_eq!(String::from_utf8_lossy(&drained.stdout), "1 events handed over to RabbitMQ, 0 left\n");
    assert_eq!(drained.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&drained.stderr).contains("set aside as damaged"), "{drained:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_rabbitmq_never_takes_keeps_no_other_waiting() {
    let (mut broker, redis) = tokio::join!(Broker::with("max_message_size = 100000"), RedisServer::start());
    broker.kill();
    let mut backends = Backends { broker, redis };
    let (site, events) = site(&backends, "", "");
    let gateway = site.start_as("gateway").await;
    // One large event at the head of the spool and one in the middle.
    for part in 0..2 {
        let wide = Webhook::push(&format!("wide-{part}"), "x".repeat(200_000));
        assert_eq!(send(gateway.public, &wide).await.unwrap().outcome(), "spooled");
        spooled(&gateway, 90).await;
    }
    backends.broker.restart().await;
    eventually("the others are handed over", || async { waits(&gateway).await == 2 }).await;
    assert!(backends.broker.ready(&events).await >= 180);
    // They are held once RabbitMQ has taken other events.
    eventually("both are held", || async {
        assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().status.as_u16(), 200);
        gateway.metric("streamgate_spool_held_events").await == 2.0
    })
    .await;
    site.logged("the queue takes other events but not this one").await;
    eventually("live events go to RabbitMQ", || async {
        send(gateway.public, &Webhook::fresh()).await.unwrap().outcome() == "enqueued"
    })
    .await;
    assert!(gateway.terminate().await.success());
    assert!(site.log().contains("events are left in the spool"), "{}", site.log());
}
