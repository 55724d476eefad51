//! No refusal, failure or unmatched event is silent: each has a line in the log or a count.

use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::receiver::{Receiver, reply};
use crate::harness::wire::{API_KEY, PUSH, Transport, Webhook, raw, read_to_end, send, status, tls};
use serde_json::Value;
use std::collections::BTreeSet;
use tokio::io::AsyncWriteExt;

/// The lines of the log with this message.
fn lines(site: &Site, message: &str) -> Vec<Value> {
    let log = site.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["message"] == message).collect()
}

/// The line about a refusal for this reason.
fn refusal(site: &Site, message: &str, reason: &str) -> Option<Value> {
    lines(site, message).into_iter().find(|line| line["reason"] == reason)
}

async fn count(server: &Server, outcome: &str) -> f64 {
    let text = server.ops("/metrics").await.1;
    let lines = text.lines().filter(|line| {
        line.starts_with("streamgate_gateway_requests_total{") && line.contains(&format!("outcome=\"{outcome}\""))
    });
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_has_its_line_its_count_and_its_alert() {
    let site = Site::new();
    let gateway = "max_body = \"1KiB\"\nbody_timeout = \"300ms\"\nheader_timeout = \"300ms\"".to_owned();
    // A request must name its key only where there is more than one.
    let second =
        "[[apps]]\nname = \"other\"\nkeys = [{ api_key = \"second\", secrets = [\"another secret of 26 byte\"] }]";
    let rest = format!("{second}\n[dedup]\nmax_age = \"1h\"\n[hooks.custom_commands.commands.x]\nreply = \"y\"");
    site.configure(&Setup { gateway: gateway.clone(), rest: rest.clone(), ..Setup::default() });
    let server = site.start().await;
    let good = Webhook::fresh;
    let old = Webhook::push("old", r#"{"type":"a.b","created_at":"2020-01-01T00:00:00Z"}"#);
    let zipped = good().zipped();
    let short = good().raw();
    let table: Vec<(&str, Vec<u8>)> = vec![
        ("not_found", Webhook { path: "/webhooks".into(), ..good() }.raw()),
        ("method_not_allowed", Webhook { method: "PUT", ..good() }.raw()),
        ("missing_api_key", good().without("x-api-key").raw()),
        ("malformed_api_key", good().add("x-api-key", "other").raw()),
        ("missing_signature", good().without("x-signature").raw()),
        ("malformed_signature", good().set("x-signature", "abc").raw()),
        ("unknown_key", good().set("x-api-key", "an-unknown-key-of-somebody").raw()),
        ("wrong_signature", good().set("x-signature", &"a".repeat(64)).raw()),
        ("unsupported_encoding", good().set("content-encoding", "compress").raw()),
        ("bad_gzip", zipped.clone().on_the_wire(zipped.body.slice(..zipped.body.len() - 4)).raw()),
        ("bad_encoding", good().set("content-encoding", "br").on_the_wire("no brotli").raw()),
        ("wrong_kind", Webhook { path: "/webhooks/stream/before-message-send".into(), ..good() }.raw()),
        ("too_old", old.raw()),
        ("too_large", Webhook::push("large", vec![b'x'; 2 << 10]).raw()),
        ("body_timeout", short[..short.len() - 1].to_vec()),
    ];
    let alerts = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/alerts.yml")).unwrap();
    for (reason, request) in &table {
        // Refusals beyond ten a second have no line.
        eventually(&format!("{reason} has its line"), || async {
            status(&mut raw(server.public, request).await).await;
            refusal(&site, "refused a webhook", reason).is_some()
        })
        .await;
        let line = refusal(&site, "refused a webhook", reason).unwrap();
        assert!(line["advice"].as_str().is_some_and(|advice| !advice.is_empty()), "{line}");
        assert_eq!(line["peer"], "127.0.0.1", "{line}");
        assert!(line["status"].as_u64().is_some_and(|status| (400..500).contains(&status)), "{line}");
        assert!(count(&server, reason).await >= 1.0, "{reason}");
        let metric = format!("streamgate_gateway_refused_webhooks_total{{reason=\"{reason}\"}}");
        assert!(server.metric(&metric).await >= 1.0, "{reason}");
    }
    let line = refusal(&site, "refused a webhook", "wrong_signature").unwrap();
    assert!(
        line["id"].as_str().unwrap().starts_with("fresh-") && line["app"] == "chat" && line["kind"] == "push",
        "{line}"
    );
    let key_end = format!("…{}", &API_KEY[API_KEY.len() - 4..]);
    assert!(line["api_key"] == key_end && line["content_length"].as_u64().is_some_and(|bytes| bytes > 30), "{line}");
    let left_out = alerts.split("streamgate_gateway_refused_webhooks_total{reason!~\"").nth(1).unwrap();
    let left_out: Vec<_> = left_out.split('"').next().unwrap().split('|').collect();
    assert_eq!(
        left_out,
        ["header_timeout", "body_timeout", "body_incomplete", "displaced"],
        "Stream repeats only these"
    );
    let log = site.log();
    assert!(!log.contains(API_KEY) && !log.contains("an-unknown-key-of-somebody") && !log.contains("\"number\""));

    let head = "x-long: ".to_owned() + &"y".repeat(20_000);
    let connections: Vec<(&str, Vec<u8>)> = vec![
        ("malformed_http", b"nonsense\r\n\r\n".to_vec()),
        ("head_too_large", format!("POST {PUSH} HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n").into_bytes()),
        ("header_timeout", format!("POST {PUSH} HTTP/1.1\r\nhost: x").into_bytes()),
        ("tls_on_plain_port", [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[7; 500]].concat()),
        ("http2_on_plain_port", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec()),
        ("unexpected_proxy_header", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nPOST / HTTP/1.1\r\n\r\n".to_vec()),
    ];
    for (reason, bytes) in &connections {
        drop(read_to_end(raw(server.public, bytes).await).await);
        eventually(&format!("{reason} has its line"), || async {
            refusal(&site, "refused input that is not a webhook", reason).is_some()
        })
        .await;
        assert!(count(&server, reason).await >= 1.0 && alerts.contains(reason), "{reason}");
        // One line a minute.
        let before = count(&server, reason).await;
        drop(read_to_end(raw(server.public, bytes).await).await);
        eventually("the refusal is counted", || async { count(&server, reason).await > before }).await;
        let logged =
            lines(&site, "refused input that is not a webhook").iter().filter(|line| line["reason"] == *reason).count();
        assert_eq!(logged, 1, "{reason}");
    }
    assert!(server.terminate().await.success());
    assert!(
        !lines(&site, "refused more input that is not a webhook").is_empty(),
        "the refusals without a line are reported at the end"
    );

    let here = Site::new();
    here.configure(&Setup { gateway: "allow_from = [\"192.0.2.1\"]".into(), ..Setup::default() });
    let server = here.start().await;
    assert_eq!(send(server.public, &good()).await.unwrap().status, 403);
    here.logged("peer_not_allowed").await;
    assert!(server.terminate().await.success());

    let quiet = Site::new();
    quiet.configure(&Setup { gateway, rest: format!("{rest}\n[log]\nrequests = \"none\""), ..Setup::default() });
    let server = quiet.start().await;
    for (_, request) in table.iter().take(3) {
        status(&mut raw(server.public, request).await).await;
    }
    drop(read_to_end(raw(server.public, b"nonsense\r\n\r\n").await).await);
    assert!(server.terminate().await.success());
    assert!(!quiet.log().contains("refused"), "{}", quiet.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_beyond_ten_a_second_are_counted_in_one_line() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    let forged = || Webhook::fresh().set("x-signature", &"a".repeat(64));
    let sent =
        (0..200).map(|_| async { send(server.public, &forged()).await.map_or(0, |answer| answer.status.as_u16()) });
    let refused = futures_util::future::join_all(sent).await.into_iter().filter(|status| *status == 401).count();
    assert!(server.terminate().await.success());
    let lines = lines(&site, "refused a webhook").len();
    let summary = self::lines(&site, "more refused webhooks than log lines");
    let left_out: usize =
        summary[0]["left_out"].as_str().unwrap().strip_prefix("wrong_signature ").unwrap().parse().unwrap();
    assert_eq!(lines + left_out, refused, "every refusal has a line or a count");
    assert!(left_out > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_events_path_can_be_read_from_the_log() {
    let service = Receiver::start(|one| match (one.header("x-webhook-id"), one.header("x-streamgate-attempt")) {
        ("late", "1") => reply(503, &[]),
        ("refused", _) => reply(422, &[]),
        _ => reply(200, &[]),
    })
    .await;
    let site = Site::new();
    let rest = format!("{}\n[log]\nrequests = \"all\"\ndeliveries = \"all\"", service.route());
    site.configure(&Setup { worker: "retry = [\"200ms\"]".into(), rest, ..Setup::default() });
    let server = site.start().await;
    for id in ["late", "refused"] {
        let webhook = Webhook::push(id, format!(r#"{{"type":"a.b","id":"{id}"}}"#));
        assert_eq!(send(server.public, &webhook).await.unwrap().outcome(), "enqueued");
        assert_eq!(send(server.public, &webhook).await.unwrap().outcome(), "duplicate");
    }
    let of = |message: &str, id: &str| lines(&site, message).into_iter().find(|line| line["id"] == id);
    eventually("all is done", || async {
        of("handled", "late").is_some() && of("an attempt failed: dead letter", "refused").is_some()
    })
    .await;
    let outcomes: BTreeSet<_> = lines(&site, "webhook").iter().map(|line| line["outcome"].to_string()).collect();
    assert_eq!(outcomes, BTreeSet::from(["\"duplicate\"".to_owned(), "\"enqueued\"".to_owned()]));
    let taken = of("webhook", "late").unwrap();
    assert_eq!((&taken["type"], &taken["app"], &taken["bytes"]), (&"a.b".into(), &"chat".into(), &26.into()));
    let failed = of("an attempt failed", "late").unwrap();
    assert_eq!((&failed["route"], &failed["attempt"], &failed["outcome"]), (&"app".into(), &1.into(), &"retry".into()));
    assert_eq!((&failed["error"], &failed["again_in"]), (&"the service answered 503".into(), &"200ms".into()));
    assert!(failed["key"].as_str().unwrap().starts_with("chat:push:") && failed["ms"].is_u64(), "{failed}");
    assert_eq!(of("an attempt failed: dead letter", "refused").unwrap()["outcome"], "rejected");
    eventually("the dead letter is counted", || async {
        server.metric("streamgate_queue_messages{queue=\"dead\"}").await == 1.0
    })
    .await;
    assert!(of("handled", "late").unwrap()["age_ms"].as_u64().unwrap() >= 200);
    assert!(server.terminate().await.success());
    let log = site.log();
    assert!(log.contains("stopped") && !log.contains("left to the system"), "the store was closed in order: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_without_a_worker_are_logged_by_kind() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    for _ in 0..3 {
        let answer = send(server.public, &Webhook::moderation(r#"{"text":"x"}"#)).await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.outcome()), (200, "no_worker"));
    }
    let answer = send(server.public, &Webhook::command("x", "y", None)).await.unwrap();
    assert_eq!(answer.outcome(), "no_worker");
    for kind in ["before-message-send", "custom-command"] {
        site.logged(&format!("hooks are answered by their policy: {kind}, no_worker")).await;
    }
    assert!(server.terminate().await.success());
    let reported = lines(&site, "hooks are answered by their policy: before-message-send, no_worker");
    let times: Vec<_> = reported.iter().map(|line| line["times"].as_u64().unwrap()).collect();
    assert_eq!(times, [1, 2], "the first at once, the others at the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_route_hides_neither_other_routes_failures_nor_its_dead_letters() {
    let service = Receiver::start(|one| match one.header("x-webhook-id") {
        "dead" => reply(422, &[]),
        _ => reply(503, &[]),
    })
    .await;
    let route = |name: &str, types: &str| {
        format!(
            "[[worker.routes]]\nname = \"{name}\"\nevents = [\"{types}\"]\nbreaker = false\nforward = {{ url = \"{}\" }}\n",
            service.url()
        )
    };
    let site = Site::new();
    let rest = [route("flood", "message.*"), route("other", "a.b")].concat();
    site.configure(&Setup { worker: "retry = [\"1h\"]".into(), rest, ..Setup::default() });
    let server = site.start().await;
    let sent = (0..200).map(|_| async { send(server.public, &Webhook::fresh()).await.unwrap().status.as_u16() });
    assert!(futures_util::future::join_all(sent).await.into_iter().all(|status| status == 200));
    for (id, event_type) in [("dead", "message.x"), ("other", "a.b")] {
        let webhook = Webhook::push(id, format!(r#"{{"type":"{event_type}"}}"#));
        assert_eq!(send(server.public, &webhook).await.unwrap().status, 200);
    }
    let retries = "streamgate_worker_retries_total{route=\"flood\"}";
    eventually("all have failed", || async { server.metric(retries).await == 200.0 }).await;
    eventually("the others have their lines", || async {
        lines(&site, "an attempt failed").iter().any(|line| line["route"] == "other")
            && lines(&site, "an attempt failed: dead letter").iter().any(|line| line["id"] == "dead")
    })
    .await;
    assert!(server.terminate().await.success());
    let flood = lines(&site, "an attempt failed").iter().filter(|line| line["route"] == "flood").count();
    let summary = lines(&site, "more failed attempts than log lines");
    let left_out: usize =
        summary[0]["left_out"].as_str().unwrap().strip_prefix("flood: retry ").unwrap().parse().unwrap();
    assert_eq!(flood + left_out, 200, "every failure has a line or a count");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_of_one_service_needs_only_what_that_service_needs() {
    let gone = crate::harness::servers::free_port();
    let (site, service) = (Site::new(), Receiver::willing().await);
    let route = |url: &str| {
        format!(
            "[[worker.routes]]\nname = \"a\"\nevents = [\"message.*\"]\nforward = {{ url = \"{url}\", headers = {{ X-A = \"env:OF_THE_SERVICE\" }} }}"
        )
    };
    let check = async |args: &[&str], variables: &[(&str, &str)]| {
        let mut command = site.command(args);
        let output = command.envs(variables.iter().copied()).output().await.unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap())
    };
    let secret = [("OF_THE_SERVICE", "of-the-service")];
    site.configure(&Setup { rest: route(&service.url()), ..Setup::default() });
    let (code, report) = check(&["check", "up"], &secret).await;
    assert!(code == Some(0) && report.contains("ok    worker.routes[1].forward: "), "{report}");
    assert_eq!(check(&["check", "up"], &[]).await.0, Some(64), "the service's secret is missing");

    site.configure(&Setup { rest: route(&format!("http://127.0.0.1:{gone}/")), ..Setup::default() });
    let (code, report) = check(&["check"], &secret).await;
    assert!(code == Some(1) && report.contains("FAIL  worker.routes[1].forward: refused: "), "{report}");
    assert_eq!(check(&["check", "--offline"], &secret).await.0, Some(0));

    let backends = crate::harness::servers::Backends::shared().await;
    let rest = format!("{}\n{}", route(&service.url()), backends.tables(&site.name()));
    site.configure(&Setup { rest, ..Setup::default() });
    let (code, report) = check(&["check", "gateway"], &[]).await;
    assert!(code == Some(0) && !report.contains("worker.routes") && report.contains("ok    store: "), "{report}");
    let (code, report) = check(&["check", "worker"], &secret).await;
    assert!(
        code == Some(0) && report.contains("ok    worker.routes[1].forward: ") && !report.contains("store: "),
        "{report}"
    );
    let (code, report) = check(&["check", "up"], &secret).await;
    assert!(code == Some(0) && report.contains("connects to neither"), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unmatched_events_are_logged_once_with_the_nearest_pattern() {
    let service = Receiver::willing().await;
    let site = Site::new();
    let route = service.route().replace("[\"*\"]", "[\"mesage.new\", \"reaction.*\"]");
    site.configure(&Setup { rest: route, ..Setup::default() });
    let server = site.start().await;
    for _ in 0..3 {
        assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    }
    let unmatched = "streamgate_worker_deliveries_total{outcome=\"unmatched\",route=\"none\"}";
    eventually("all are acknowledged", || async { server.metric(unmatched).await == 3.0 }).await;
    site.logged("no route matches events of this type").await;
    let log = site.log();
    let reported: Vec<_> = log.lines().filter(|line| line.contains("no route matches events of this type")).collect();
    assert_eq!(reported.len(), 1, "{reported:?}");
    assert!(
        reported[0].contains("\"nearest\":\"mesage.new\"") && reported[0].contains("\"type\":\"message.new\""),
        "{reported:?}"
    );
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_by_the_http2_layer_are_logged_and_counted() {
    let site = Site::new();
    let (server, transports) = crate::statuses::secure(&site, Setup::default()).await;
    let Transport::Tls { root, .. } = &transports[1] else { panic!("both are TLS") };
    let long = Webhook::fresh().set("x-long", &"y".repeat(20_000));
    assert_eq!(transports[1].send(server.public, &long).await.unwrap().status, 431);
    eventually("the long head has its line", || async {
        refusal(&site, "refused a webhook", "head_too_large").is_some()
    })
    .await;
    assert!(count(&server, "head_too_large").await >= 1.0);
    // A DATA frame of a stream that was never opened, and bytes that are not a preface.
    for odd in [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x01\0\0\0\0\0\x01x"[..],
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    ] {
        let before = count(&server, "malformed_http").await;
        let stream = tokio::net::TcpStream::connect(server.public).await.unwrap();
        let mut stream = tls(stream, root, b"h2").await.unwrap();
        stream.write_all(odd).await.unwrap();
        // Until the server has closed it.
        drop(tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut Vec::new()).await);
        eventually("the refusal is counted", || async { count(&server, "malformed_http").await > before }).await;
    }
    eventually("the malformed bytes have their line", || async {
        refusal(&site, "refused input that is not a webhook", "malformed_http").is_some()
    })
    .await;
    // A client that disconnects has sent nothing wrong: the report at the end counts only the second malformed connection.
    assert_eq!(transports[1].send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
    drop(tls(tokio::net::TcpStream::connect(server.public).await.unwrap(), root, b"h2").await.unwrap());
    eventually("the gateway has noticed the disconnects", || async {
        server.metric("streamgate_gateway_connections").await == 0.0
    })
    .await;
    assert!(server.terminate().await.success());
    let more: Vec<_> = lines(&site, "refused more input that is not a webhook");
    assert_eq!(more.iter().map(|line| line["times"].as_u64().unwrap()).sum::<u64>(), 1, "{more:?}");
}

/// Alerts on slow answers go by this metric: a stranger that sends slowly must not raise one.
#[tokio::test(flavor = "multi_thread")]
async fn only_signed_requests_count_as_answered_to_stream() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    let forged = Webhook::fresh().set("x-signature", &"a".repeat(64));
    assert_eq!(send(server.public, &forged).await.unwrap().status, 401);
    assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
    let refused = "streamgate_gateway_requests_total{app=\"chat\",kind=\"push\",outcome=\"wrong_signature\"}";
    eventually("both are counted", || async { server.metric(refused).await == 1.0 }).await;
    eventually("the signed one has a time", || async {
        server.metric("streamgate_gateway_ack_seconds_count{kind=\"push\"}").await >= 1.0
    })
    .await;
    assert_eq!(server.metric("streamgate_gateway_ack_seconds_count{kind=\"push\"}").await, 1.0);
    assert!(server.terminate().await.success());
}
