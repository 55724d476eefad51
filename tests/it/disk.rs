//! A store whose disk does not answer, disappears, or fills unseen; and a clock that is set back.

use crate::harness::broker::Broker;
use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::receiver::{Receiver, reply};
use crate::harness::servers::{Backends, RedisServer};
use crate::harness::volume::Volume;
use crate::harness::wire::{Webhook, send};
use std::sync::atomic::{AtomicBool, Ordering};

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_hangs_is_503_within_the_deadline() {
    let site = Site::new();
    let gateway = "answer_deadline = \"500ms\"\nbody_timeout = \"400ms\"".into();
    site.configure(&Setup { gateway, ..Setup::default() });
    let server = site.start().await;
    let webhook = Webhook::fresh();
    let lock = site.hang_store();
    let answer = send(server.public, &webhook).await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "deadline_exceeded"));
    assert_eq!(answer.headers["retry-after"], "1");
    eventually("/readyz is 503", || async {
        let (status, text) = server.ops("/readyz").await;
        status == 503 && text.contains("has not answered")
    })
    .await;
    assert_eq!(server.ops("/healthz").await.0, 200);
    drop(lock);
    eventually("/readyz is 200 again", || async { server.ops("/readyz").await.0 == 200 }).await;
    let answer = send(server.public, &webhook).await.unwrap();
    assert_eq!(
        (answer.status.as_u16(), answer.outcome()),
        (200, "enqueued"),
        "the abandoned write left nothing behind"
    );
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_is_retried_until_it_is_recorded() {
    let site = Site::new();
    let (service, gate) = Receiver::gated().await;
    site.configure(&Setup { rest: service.route(), ..Setup::default() });
    let server = site.start().await;
    assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
    eventually("the handler runs", || async { server.metric("streamgate_worker_in_flight").await == 1.0 }).await;
    let lock = site.hang_store();
    gate.open();
    eventually("the settlement fails", || async { site.log().contains("cannot record a settlement") }).await;
    drop(lock);
    let done = || server.metric("streamgate_worker_deliveries_total{outcome=\"done\",route=\"app\"}");
    eventually("the settlement is recorded", || async { done().await == 1.0 }).await;
    assert_eq!(service.received().len(), 1, "the handler ran once");
    assert!(server.terminate().await.success());
}

/// The next webhook is refused, and /readyz and the log say why.
async fn nothing_is_promised(server: &Server, site: &Site) {
    let answer = send(server.public, &Webhook::fresh()).await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "store_unavailable"));
    let (status, text) = server.ops("/readyz").await;
    assert!(status == 503 && text.contains("the data directory is gone"), "{text}");
    site.logged("events can no longer be stored").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_acknowledged_after_the_data_directory_was_moved_or_deleted() {
    for is_deleted in [false, true] {
        let site = Site::new();
        site.configure(&Setup::default());
        let server = site.start().await;
        assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
        let (data, away) = (site.data_dir(), site.path("away"));
        std::fs::rename(&data, &away).unwrap();
        if is_deleted {
            std::fs::remove_dir_all(&away).unwrap();
        }
        nothing_is_promised(&server, &site).await;
        if !is_deleted {
            std::fs::rename(&away, &data).unwrap();
            let is_back = || async { send(server.public, &Webhook::fresh()).await.unwrap().status == 200 };
            eventually("events are taken again", is_back).await;
            eventually("/readyz is 200 again", || async { server.ops("/readyz").await.0 == 200 }).await;
        }
        assert_eq!(site.log().matches("events can no longer be stored").count(), 1, "{}", site.log());
        assert!(server.terminate().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_acknowledged_after_the_volume_was_detached() {
    let Some(volume) = Volume::mount(64) else { return };
    let site = Site::new();
    site.write("streamgate.toml", Setup::default().toml(&volume.path().join("data")));
    let server = site.start().await;
    assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    volume.detach();
    nothing_is_promised(&server, &site).await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_goes_on_without_its_spool_while_rabbitmq_takes_events() {
    let (broker, redis) = tokio::join!(Broker::start(), RedisServer::start());
    let mut backends = Backends { broker, redis };
    let site = Site::new();
    // Long timeouts, so that only events that RabbitMQ does not take go to the spool.
    let tables = backends.tables_with(&site.name(), "spool_after = \"4s\"\nconfirm_timeout = \"4s\"");
    site.configure(&Setup { rest: tables, ..Setup::default() });
    let server = site.start_as("gateway").await.ready().await;
    std::fs::rename(site.data_dir(), site.path("away")).unwrap();
    eventually("the missing directory is noticed", || async {
        server.ops("/readyz").await.1.contains("the data directory is gone")
    })
    .await;
    assert_eq!(server.ops("/readyz").await.0, 503);
    for _ in 0..20 {
        assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    }
    backends.broker.kill();
    let answer = send(server.public, &Webhook::fresh()).await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "store_unavailable"));
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wal_that_grows_behind_a_reader_counts_towards_spool_max() {
    let site = Site::new();
    site.configure(&Setup { store: "spool_max = \"1MiB\"".into(), ..Setup::default() });
    let server = site.start().await;
    assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
    // A reader that keeps its snapshot: no checkpoint gets past it.
    let reader = site.store();
    reader.execute_batch("BEGIN; SELECT count(*) FROM events").unwrap();
    let log = || site.data_dir().join("streamgate.db-wal").metadata().unwrap().len();
    let wide = |number: u32| Webhook::push(&format!("wide-{number}"), format!("{number}{}", "x".repeat(400_000)));
    let (mut number, mut answer) = (0, send(server.public, &wide(0)).await.unwrap());
    while answer.status == 200 {
        assert!(log() < 32 << 20, "the WAL has {} bytes", log());
        number += 1;
        answer = send(server.public, &wide(number)).await.unwrap();
    }
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, "store_full"));
    drop(reader);
    let is_taken = || async { send(server.public, &Webhook::fresh()).await.unwrap().status == 200 };
    eventually("there is room again", is_taken).await;
    eventually("the WAL is truncated", || async { log() <= 16 << 20 }).await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_set_back_stalls_no_retry() {
    let site = Site::new();
    let fails = std::sync::Arc::new(AtomicBool::new(true));
    let failing = std::sync::Arc::clone(&fails);
    let service = Receiver::start(move |_| reply(if failing.load(Ordering::Relaxed) { 503 } else { 200 }, &[])).await;
    site.configure(&Setup { worker: "retry = [\"15s\"]".into(), rest: service.route(), ..Setup::default() });
    site.set_clock("+1d");
    let server = Server::of(site.command_by_clock(&["up"]), &site).await;
    assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
    let retries = || async { server.metric("streamgate_worker_retries_total{route=\"app\"}").await };
    eventually("the event waits for its retry", || async { retries().await == 1.0 }).await;
    fails.store(false, Ordering::Relaxed);
    site.set_clock("+0");
    assert_eq!(service.received().len(), 1, "the event still waits");
    eventually("the event is tried again", || async { service.received().len() == 2 }).await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spool_that_was_away_is_handed_over_whole() {
    let (mut broker, redis) = tokio::join!(Broker::start(), RedisServer::start());
    broker.kill();
    let mut backends = Backends { broker, redis };
    let site = Site::new();
    site.configure(&Setup { rest: backends.tables(&site.name()), ..Setup::default() });
    let server = site.start_as("gateway").await;
    let webhooks: Vec<_> = (0..3).map(|_| Webhook::fresh()).collect();
    assert_eq!(send(server.public, &webhooks[0]).await.unwrap().outcome(), "spooled");
    std::fs::rename(site.data_dir(), site.path("away")).unwrap();
    for webhook in &webhooks[1..] {
        assert_eq!(send(server.public, webhook).await.unwrap().status, 503);
    }
    std::fs::rename(site.path("away"), site.data_dir()).unwrap();
    eventually("/readyz is 200 again", || async { server.ops("/readyz").await.0 == 200 }).await;
    for webhook in &webhooks[1..] {
        assert_eq!(send(server.public, webhook).await.unwrap().status, 200);
    }
    let waits = || async { server.metric("streamgate_spool_events").await };
    eventually("all are counted", || async { waits().await == 3.0 }).await;
    backends.broker.restart().await;
    eventually("all are handed over", || async { waits().await == 0.0 }).await;
    assert_eq!(backends.broker.ready(&format!("{}.events", site.name())).await, 3);
    let rows: i64 = site.store().query_row("SELECT count(*) FROM events", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 0);
    assert!(server.terminate().await.success());
}
