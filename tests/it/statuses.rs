//! Every row of the status table, over plain HTTP/1.1, and over TLS with HTTP/1.1 and HTTP/2.

use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::wire::{Transport, Webhook, gzip, raw, status, until_refused};
use bytes::Bytes;
use rcgen::generate_simple_self_signed;

const MAX_BODY: usize = 64 << 10;

fn setup() -> Setup {
    Setup { gateway: format!("max_body = \"{MAX_BODY}B\""), ..Setup::default() }
}

/// A server with TLS, and the transports that trust it.
pub async fn secure(site: &Site, setup: Setup) -> (Server, [Transport; 2]) {
    let made = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let cert = site.write("cert.pem", made.cert.pem());
    let key = site.write("key.pem", made.signing_key.serialize_pem());
    let tls = format!("[gateway.tls]\ncert = \"{}\"\nkey = \"{}\"\n{}", cert.display(), key.display(), setup.rest);
    site.configure(&Setup { rest: tls, ..setup });
    let root = made.cert.der().clone();
    let transports = [Transport::Tls { root: root.clone(), http2: false }, Transport::Tls { root, http2: true }];
    (site.start().await, transports)
}

/// A name, a webhook, and the status and the code or outcome that it must get.
fn table() -> Vec<(&'static str, Webhook, u16, &'static str)> {
    let good = Webhook::fresh;
    let wide = |length: usize| Webhook::push("wide", vec![b'x'; length]);
    let zipped = good().zipped();
    let signed_zip = Webhook::push("zip", gzip(b"{\"type\":\"message.new\"}")).set("content-encoding", "gzip");
    let truncated = zipped.clone().on_the_wire(zipped.body.slice(..zipped.body.len() - 4));
    let bomb = Webhook::push("bomb", Bytes::from(vec![0; MAX_BODY * 1000])).zipped();
    let brotli_bomb = Webhook::push("bomb", Bytes::from(vec![0; MAX_BODY * 1000])).encoded("br");
    assert!(bomb.body.len() * 900 < MAX_BODY * 1000);
    vec![
        ("a good one", good(), 200, "enqueued"),
        ("compressed", good().zipped(), 200, "enqueued"),
        ("compressed, and the header is missing", good().zipped().without("content-encoding"), 200, "enqueued"),
        ("plain, and the header says gzip", good().set("content-encoding", "gzip"), 200, "enqueued"),
        ("identity", good().set("content-encoding", "identity"), 200, "enqueued"),
        ("upper-case signature", upper_case(good()), 200, "enqueued"),
        ("exactly the limit", wide(MAX_BODY), 200, "enqueued"),
        ("no key, and there is one", good().without("x-api-key"), 200, "enqueued"),
        (
            "a path with slashes and a query",
            Webhook { path: "//webhooks/stream/push/?cliwebhook=1".into(), ..good() },
            200,
            "enqueued",
        ),
        ("two keys", good().add("x-api-key", "other"), 400, "malformed_api_key"),
        ("an empty key", good().set("x-api-key", ""), 400, "malformed_api_key"),
        ("no signature", good().without("x-signature"), 400, "missing_signature"),
        ("two signatures", good().add("x-signature", &"a".repeat(64)), 400, "malformed_signature"),
        ("a short signature", good().set("x-signature", "abc"), 400, "malformed_signature"),
        ("no hex", good().set("x-signature", &"g".repeat(64)), 400, "malformed_signature"),
        ("truncated gzip", truncated, 400, "bad_gzip"),
        ("an unknown key", good().set("x-api-key", "unknown"), 401, "unauthorized"),
        ("a wrong signature", good().set("x-signature", &"a".repeat(64)), 401, "unauthorized"),
        ("another body", good().on_the_wire("{}"), 401, "unauthorized"),
        ("a signature over the gzip bytes", signed_zip, 401, "unauthorized"),
        ("an unknown path", Webhook { path: "/webhooks/stream/other".into(), ..good() }, 404, "not_found"),
        ("the metrics' path", Webhook { path: "/metrics".into(), ..good() }, 404, "not_found"),
        ("a wrong method", Webhook { method: "PUT", ..good() }, 405, "method_not_allowed"),
        ("over the limit", wide(MAX_BODY + 1), 413, "too_large"),
        ("a gzip bomb", bomb, 413, "too_large"),
        ("deflate", encoded("deflate"), 200, "enqueued"),
        ("brotli", encoded("br"), 200, "enqueued"),
        ("plain, and the header says br", good().set("content-encoding", "br"), 200, "enqueued"),
        ("deflate without its header", encoded("deflate").without("content-encoding"), 401, "unauthorized"),
        ("br that is none", encoded("br").on_the_wire("no brotli"), 400, "bad_encoding"),
        ("a brotli bomb", brotli_bomb, 413, "too_large"),
        ("an encoding that nobody inflates", good().set("content-encoding", "zstd"), 415, "unsupported_encoding"),
        ("two encodings", good().set("content-encoding", "gzip, br"), 415, "unsupported_encoding"),
    ]
}

fn encoded(encoding: &str) -> Webhook {
    Webhook::fresh().encoded(encoding)
}

fn upper_case(webhook: Webhook) -> Webhook {
    let signature = webhook.headers.iter().find(|(name, _)| name == "x-signature").unwrap().1.to_uppercase();
    webhook.set("x-signature", &signature)
}

async fn hold(server: &Server, transport: &Transport) {
    for (what, webhook, status, expected) in table() {
        let unique = format!("{what} over {transport:?}");
        let webhook = if webhook.id() == "wide" { webhook.set("x-webhook-id", &unique) } else { webhook };
        let answer = transport.send(server.public, &webhook).await.unwrap_or_else(|error| panic!("{unique}: {error}"));
        let found = if status == 200 { answer.outcome().to_owned() } else { answer.code() };
        assert_eq!((answer.status.as_u16(), found.as_str()), (status, expected), "{unique}");
        assert_eq!(answer.headers.contains_key("allow"), status == 405, "{unique}");
        assert_eq!(answer.body.is_empty(), status == 200, "{unique}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_of_the_status_table_holds_over_plain_http() {
    let site = Site::new();
    site.configure(&setup());
    let server = site.start().await;
    hold(&server, &Transport::Http1).await;
    assert_eq!(server.metric("streamgate_gateway_memory_bytes").await, 0.0, "every body has released its memory");
    assert_eq!(server.metric("streamgate_gateway_in_flight").await, 0.0);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_of_the_status_table_holds_over_tls() {
    let site = Site::new();
    let (server, transports) = secure(&site, setup()).await;
    for transport in &transports {
        hold(&server, transport).await;
    }
    assert!(server.metric("streamgate_tls_certificate_expiry_timestamp_seconds").await > 0.0);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_over_a_limit_get_503_with_retry_after() {
    // Signed bodies that are not durable yet hold all the memory, or all the places.
    for (limit, code) in [("memory_budget = \"160KiB\"", "memory_budget"), ("max_in_flight = 2", "in_flight_limit")] {
        let site = Site::new();
        site.configure(&Setup { gateway: format!("max_body = \"64KiB\"\n{limit}"), ..Setup::default() });
        let server = site.start().await;
        let lock = site.hang_store();
        let mut held = server.hold(2, MAX_BODY).await;
        let wide = Webhook::push("c", vec![b'c'; MAX_BODY]);
        let answer = Transport::Http1.send(server.public, &wide).await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (503, code));
        assert_eq!(answer.headers["retry-after"], "1");
        drop(lock);
        for stream in &mut held {
            assert_eq!(status(stream).await, 200, "{code}");
        }
        assert!(server.terminate().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_stops_short_gives_its_memory_to_the_next() {
    let site = Site::new();
    let gateway = "max_body = \"64KiB\"\nmemory_budget = \"80KiB\"\nbody_timeout = \"1h\"".into();
    site.configure(&Setup { gateway, ..Setup::default() });
    let server = site.start().await;
    let short = Webhook::push("short", vec![b'x'; MAX_BODY]).raw();
    let mut short = raw(server.public, &short[..short.len() - 1]).await;
    eventually("the short body holds its memory", || async {
        server.metric("streamgate_gateway_memory_bytes").await >= MAX_BODY as f64
    })
    .await;
    let whole = Webhook::push("whole", vec![b'y'; MAX_BODY]);
    assert_eq!(Transport::Http1.send(server.public, &whole).await.unwrap().status, 200);
    assert_eq!(status(&mut short).await, 408);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_is_503_and_repeats_are_still_known() {
    let site = Site::new();
    // The service is down, so the queue only grows.
    let worker = "[[worker.routes]]\nevents = [\"*\"]\nforward = { url = \"http://127.0.0.1:9\" }".to_owned();
    site.configure(&Setup { store: "spool_max = \"1MiB\"".into(), rest: worker, ..Setup::default() });
    let server = site.start().await;
    let wide = |number: u32| Webhook::push(&format!("wide-{number}"), format!("{number}{}", "x".repeat(100_000)));
    let (taken, refused) = until_refused(server.public, wide).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_str()), (503, "store_full"));
    assert!(taken > 5);
    let repeat = Transport::Http1.send(server.public, &wide(0)).await.unwrap();
    assert_eq!((repeat.status.as_u16(), repeat.outcome()), (200, "duplicate"));
    let (status, text) = server.ops("/readyz").await;
    assert!(status == 503 && text.contains("spool_max"), "{text}");
    assert_eq!(server.ops("/healthz").await.0, 200);
    assert!(server.terminate().await.success());
}
