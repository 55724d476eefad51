//! Forwarding to an HTTP service, with the real binary.

use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::receiver::{Receiver, reply};
use crate::harness::wire::{API_KEY, Webhook, send, sign};
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

async fn start(site: &Site, worker: &str, routes: String) -> Server {
    site.configure(&Setup { worker: worker.into(), rest: routes, ..Setup::default() });
    site.start().await
}

async fn accept(server: &Server, webhook: &Webhook) {
    assert_eq!(send(server.public, webhook).await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_gets_the_body_and_headers_that_stream_sent() {
    let (site, service) = (Site::new(), Receiver::willing().await);
    site.write("token", "Bearer of-the-service\n");
    let route = format!(
        "[[worker.routes]]\nevents = [\"message.*\"]\nforward = {{ url = \"{}?x=1\", headers = {{ Authorization = \"file:{}\" }} }}",
        service.url(),
        site.path("token").display()
    );
    let server = start(&site, "", route).await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let body = r#"{"type":"message.new","cid":"messaging:x","html":"\u003cb\u003e"}"#;
    let webhook = Webhook::push("the-id", body).set("x-webhook-attempt", "3").add("traceparent", trace);
    let webhook = webhook.add("target-agent", "public/1").add("x-stream-new", "n").add("x-forwarded-user", "root");
    accept(&server, &webhook.clone().zipped()).await;
    eventually("the event arrives", || async { !service.received().is_empty() }).await;
    let received = &service.received()[0];
    assert_eq!((received.path.as_str(), &received.body), ("/hook?x=1", &webhook.body));
    let signature = sign(body.as_bytes());
    let expected = [
        ("content-type", "application/json"),
        ("content-length", &body.len().to_string()),
        ("x-api-key", API_KEY),
        ("x-signature", &signature),
        ("x-webhook-id", "the-id"),
        ("x-webhook-attempt", "3"),
        ("x-streamgate-key", &format!("chat:push:the-id:{}", &signature[..16])),
        ("x-streamgate-attempt", "1"),
        ("x-streamgate-type", "message.new"),
        ("traceparent", trace),
        ("authorization", "Bearer of-the-service"),
        ("target-agent", "public/1"),
        ("x-stream-new", "n"),
        ("x-forwarded-user", ""),
        ("accept-encoding", "identity"),
        ("content-encoding", ""),
        ("transfer-encoding", ""),
    ];
    for (name, value) in expected {
        assert_eq!(received.header(name), value, "{name}");
    }
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_status_is_done_dead_or_tried_again() {
    let site = Site::new();
    let next = std::sync::Arc::new(AtomicU16::new(200));
    let status = std::sync::Arc::clone(&next);
    let service =
        Receiver::start(move |_| reply(status.load(Ordering::SeqCst), &[("location", "http://127.0.0.1:9/elsewhere")]))
            .await;
    let server = start(&site, "retry = [\"1h\"]", service.route()).await;
    let count = |outcome: &'static str| {
        let server = &server;
        async move {
            let name = format!("streamgate_worker_deliveries_total{{outcome=\"{outcome}\",route=\"app\"}}");
            server.metric(&name).await
        }
    };
    let table = [
        ("done", vec![200, 201, 204]),
        ("dead", vec![400, 405, 410, 413, 415, 422]),
        ("retry", vec![301, 302, 307, 308, 401, 403, 404, 408, 429, 500, 502, 503]),
    ];
    for (outcome, statuses) in table {
        for (place, status) in statuses.into_iter().enumerate() {
            next.store(status, Ordering::SeqCst);
            accept(&server, &Webhook::fresh()).await;
            eventually(&format!("{status} is {outcome}"), || async { count(outcome).await == (place + 1) as f64 })
                .await;
        }
    }
    assert_eq!(service.received().len(), 21, "a redirect was not followed, nothing was tried again yet");
    let connections: HashSet<_> = service.received().iter().map(|received| received.from).collect();
    assert_eq!(connections.len(), 1, "one connection served them all");
    let listed = site.run(&["dead", "list", "--json"]).await;
    let dead_letters: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let dead_letters = dead_letters.as_array().unwrap();
    assert_eq!(dead_letters.len(), 6);
    assert!(dead_letters.iter().all(|dead_letter| dead_letter["reason"] == "rejected"));
    assert_eq!(dead_letters[0]["error"], "the service answered 400");
    assert!(!String::from_utf8_lossy(&listed.stdout).contains("text of the service"));
    assert!(!site.log().contains("text of the service"));
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_heeded() {
    let site = Site::new();
    let calls: std::sync::Arc<Mutex<Vec<Instant>>> = std::sync::Arc::default();
    let log = std::sync::Arc::clone(&calls);
    let service = Receiver::start(move |received| {
        log.lock().unwrap().push(Instant::now());
        if received.header("x-streamgate-attempt") == "1" {
            reply(503, &[("retry-after", "1")])
        } else {
            reply(200, &[])
        }
    })
    .await;
    let server = start(&site, "retry = [\"10ms\"]", service.route()).await;
    accept(&server, &Webhook::fresh()).await;
    eventually("the event is tried again", || async { service.received().len() == 2 }).await;
    let calls = calls.lock().unwrap().clone();
    assert!(calls[1] - calls[0] >= Duration::from_secs(1), "the retry waits as long as the service asked");
    assert_eq!(service.received()[1].header("x-streamgate-attempt"), "2");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_retried_while_their_service_is_down_or_silent() {
    let site = Site::new();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let route = format!(
        "[[worker.routes]]\nname = \"app\"\nevents = [\"*\"]\nforward = {{ url = \"http://{address}\", timeout = \"100ms\" }}"
    );
    let server = start(&site, "retry = [\"10ms\", \"10ms\", \"10ms\", \"1h\"]", route).await;
    accept(&server, &Webhook::fresh()).await;
    let retries = || server.metric("streamgate_worker_retries_total{route=\"app\"}");
    eventually("silence counts as a failure", || async { retries().await >= 1.0 }).await;
    drop(silent);
    eventually("a refused connection counts as a failure", || async { retries().await == 4.0 }).await;
    site.logged("did not answer within 100ms").await;
    site.logged("refused: cannot connect to the service").await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_route_that_matches_gets_the_event() {
    let (site, messages, rest) = (Site::new(), Receiver::willing().await, Receiver::willing().await);
    let routes = format!(
        "[[worker.routes]]\nname = \"2\"\nevents = [\"*\"]\napps = [\"chat\"]\nforward = {{ url = \"{0}\" }}\n",
        rest.url()
    );
    let routes = format!(
        "[[worker.routes]]\nname = \"messages\"\nevents = [\"message.*\", \"my type\"]\nforward = {{ url = \"{}\" }}\n{routes}",
        messages.url()
    );
    let server = start(&site, "", routes).await;
    for (id, event_type) in [("one", "message.new"), ("two", "my type"), ("three", "reaction.new"), ("four", "message")]
    {
        accept(&server, &Webhook::push(id, format!("{{\"type\":\"{event_type}\"}}"))).await;
    }
    eventually("all arrive", || async { messages.ids().len() + rest.ids().len() == 4 }).await;
    assert_eq!(messages.ids(), HashSet::from(["one".to_owned(), "two".to_owned()]));
    let done = "streamgate_worker_deliveries_total{outcome=\"done\",route=\"2\"}";
    eventually("all are settled", || async { server.metric(done).await == 2.0 }).await;
    assert!(server.terminate().await.success());
}
