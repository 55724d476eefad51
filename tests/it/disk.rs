//! A store whose disk does not answer.

use crate::harness::eventually;
use crate::harness::process::{Setup, Site};
use crate::harness::receiver::Receiver;
use crate::harness::wire::{Webhook, send};

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
    eventually("it is not ready", || async {
        let (status, told) = server.ops("/readyz").await;
        status == 503 && told.contains("has not answered")
    })
    .await;
    assert_eq!(server.ops("/healthz").await.0, 200);
    drop(lock);
    eventually("it is ready again", || async { server.ops("/readyz").await.0 == 200 }).await;
    let answer = send(server.public, &webhook).await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.outcome()), (200, "enqueued"), "what was given up left nothing behind");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_is_tried_until_it_stands() {
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
    eventually("it stands", || async { done().await == 1.0 }).await;
    assert_eq!(service.received().len(), 1, "the handler ran once");
    assert!(server.terminate().await.success());
}
