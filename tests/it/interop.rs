//! Stream's own SDKs judge us: what `send` signs they verify, and what a worker forwards they verify and parse.

use crate::harness::process::{Setup, Site};
use crate::harness::servers::Backends;
use crate::harness::wire::{SECRET, Webhook, odd_bodies, send};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// An endpoint on an SDK, as a process of its language.
struct Sdk {
    _process: Child,
    lines: Lines<BufReader<ChildStdout>>,
    port: u16,
}

impl Sdk {
    async fn start(mut command: Command) -> Sdk {
        let mut process = command.kill_on_drop(true).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let port = lines.next_line().await.unwrap().expect("the endpoint starts; run tests/run to install the SDKs");
        Sdk { _process: process, lines, port: port.parse().unwrap() }
    }

    async fn node() -> Sdk {
        let mut command = Command::new("node");
        command.arg(source("receiver.mjs")).arg(installed("node/package.json")).arg(SECRET);
        Sdk::start(command).await
    }

    async fn python() -> Sdk {
        let mut command = Command::new(installed("python/bin/python"));
        command.arg(source("receiver.py")).arg(SECRET);
        Sdk::start(command).await
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    async fn next(&mut self) -> Value {
        let line = tokio::time::timeout(std::time::Duration::from_secs(60), self.lines.next_line()).await;
        serde_json::from_str(&line.expect("a webhook arrives").unwrap().unwrap()).unwrap()
    }
}

fn source(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/interop").join(name)
}

/// Where `tests/run` installs the SDKs.
pub fn installed(name: &str) -> PathBuf {
    let root = std::env::var_os("STREAMGATE_TEST_INTEROP").map(PathBuf::from);
    let path = root.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/interop")).join(name);
    assert!(path.exists(), "{} is missing: run tests/run, which installs Stream's SDKs", path.display());
    path
}

async fn verifies_what_we_send(mut sdk: Sdk) {
    let site = Site::new();
    site.configure(&Setup::default());
    for gzip in [false, true] {
        let url = sdk.url();
        let mut args = vec!["send", "--url", &url, "--type", "reaction.new", "--id", "the-id"];
        args.extend(gzip.then_some("--gzip"));
        let sent = site.run(&args).await;
        let judged = sdk.next().await;
        assert_eq!(
            (&judged["id"], &judged["verified"], &judged["parsed"]),
            (&"the-id".into(), &true.into(), &"reaction.new".into())
        );
        assert!(sent.status.success(), "{sent:?}");
    }
    let other = site
        .command(&["send", "--url", &sdk.url()])
        .env("STREAMGATE_CONFIG", "/dev/null")
        .env("STREAM_API_KEY", "k")
        .env("STREAM_API_SECRET", "another")
        .output()
        .await
        .unwrap();
    assert_eq!(other.status.code(), Some(1), "this test can fail: a wrong secret does not verify");
    assert_eq!(sdk.next().await["verified"], false);
}

async fn verifies_what_we_forward(mut sdk: Sdk) {
    let site = Site::new();
    // Each body comes twice, and is two events by its ids.
    let by_id = "[dedup]\nby = \"id\"\n";
    let route = format!("{by_id}[[worker.routes]]\nevents = [\"*\"]\nforward = {{ url = \"{}/hook\" }}", sdk.url());
    site.configure(&Setup { rest: route, ..Setup::default() });
    let server = site.start().await;
    for (place, body) in odd_bodies().into_iter().enumerate() {
        for gzip in [false, true] {
            let webhook = Webhook::push(&format!("odd-{place}-{gzip}"), body.clone());
            let sent = if gzip { webhook.clone().zipped() } else { webhook.clone() };
            assert_eq!(send(server.public, &sent).await.unwrap().status, 200);
            let judged = sdk.next().await;
            assert_eq!((&judged["id"], &judged["verified"]), (&webhook.id().into(), &true.into()), "{judged}");
            // Where the body is an event by the SDK's own measure, it must come out whole.
            let ours: Option<Value> = serde_json::from_slice(&body).ok();
            if let Some(event_type) = ours.as_ref().and_then(|event| event["type"].as_str()) {
                assert_eq!(judged["parsed"], event_type, "{judged}");
            }
        }
    }
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_sdk_verifies_what_we_send() {
    verifies_what_we_send(Sdk::node().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_sdk_verifies_what_we_forward() {
    verifies_what_we_forward(Sdk::node().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_sdk_verifies_what_we_send() {
    verifies_what_we_send(Sdk::python().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_sdk_verifies_what_we_forward() {
    verifies_what_we_forward(Sdk::python().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_consumer_reads_an_event_by_the_contract_alone() {
    let (site, backends) = (Site::new(), Backends::shared().await);
    let prefix = site.name();
    site.configure(&Setup { rest: backends.tables(&prefix), ..Setup::default() });
    let gateway = site.start_as("gateway").await.ready().await;
    let mut command = Command::new(installed("python/bin/python"));
    command.arg(source("consumer.py")).args([&backends.broker.url(), &prefix, SECRET]);
    let mut consumer = command.kill_on_drop(true).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(consumer.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("ready"));
    let body = r#"{"type":"message.new","cid":"messaging:ü","message":{"text":"\u003chi\u003e"}}"#;
    let sent = Webhook::push("id-1", body).set("x-webhook-attempt", "2");
    // Of another type: not what the consumer asked for.
    send(gateway.public, &Webhook::push("id-0", r#"{"type":"reaction.new"}"#)).await.unwrap();
    assert_eq!(send(gateway.public, &sent).await.unwrap().outcome(), "enqueued");
    let line = tokio::time::timeout(std::time::Duration::from_secs(60), lines.next_line()).await.unwrap().unwrap();
    let read: Value = serde_json::from_str(&line.unwrap()).unwrap();
    assert_eq!((&read["verified"], &read["body"]), (&Value::Bool(true), &Value::from(body)));
    assert_eq!((&read["routing_key"], &read["message_id"]), (&"chat.push.message.new".into(), &"id-1".into()));
    assert_eq!((&read["type"], &read["app_id"]), (&"message.new".into(), &"chat".into()));
    assert_eq!((&read["content_type"], &read["delivery_mode"]), (&"application/json".into(), &2.into()));
    let headers = &read["headers"];
    let signature = crate::harness::wire::sign(body.as_bytes());
    for (name, value) in [
        ("x-webhook-id", "id-1"),
        ("x-webhook-attempt", "2"),
        ("x-api-key", crate::harness::wire::API_KEY),
        ("x-signature", &signature),
        ("x-streamgate-version", "1"),
        ("x-streamgate-attempt", "1"),
        ("x-streamgate-key", &format!("chat:push:id-1:{}", &signature[..16])),
    ] {
        assert_eq!(headers[name], value, "{name}");
    }
    let received_at: jiff::Timestamp = headers["x-streamgate-received-at"].as_str().unwrap().parse().unwrap();
    assert_eq!(read["timestamp"], received_at.as_second());
    assert!(headers.get("x-streamgate-cid").is_none(), "a cid that no header can carry stays in the body");
    assert!(consumer.wait().await.unwrap().success());
}
