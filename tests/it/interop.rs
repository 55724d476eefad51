//! Tests by Stream's own SDKs: they verify what `send` signs, and verify and parse what a worker forwards.

use crate::harness::process::{Setup, Site};
use crate::harness::servers::Backends;
use crate::harness::stream_api::StreamApi;
use crate::harness::wire::{API_KEY, SECRET, Webhook, odd_bodies, send};
use hyper::Method;
use serde_json::Value;
use std::path::PathBuf;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// Stream's SDKs for Node: that of clients and servers, and its successor for servers.
const NODE: &str = "stream-chat";
const SERVER_SIDE_NODE: &str = "@stream-io/node-sdk";

/// A webhook endpoint on an SDK, as a process of its language.
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

    async fn node(library: &str) -> Sdk {
        let mut command = Command::new("node");
        command.arg(source("receiver.mjs")).arg(installed("node/package.json")).args([SECRET, library]);
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
    assert_eq!(other.status.code(), Some(1), "a wrong secret does not verify, so this test can fail");
    assert_eq!(sdk.next().await["verified"], false);
}

async fn verifies_what_we_forward(mut sdk: Sdk) {
    let site = Site::new();
    // Each body is sent twice under two ids: two events by id.
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
            // A body that is an event for the SDK, too, must come out whole.
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
    verifies_what_we_send(Sdk::node(NODE).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_sdk_verifies_what_we_forward() {
    verifies_what_we_forward(Sdk::node(NODE).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_side_node_sdk_verifies_what_we_send() {
    verifies_what_we_send(Sdk::node(SERVER_SIDE_NODE).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_side_node_sdk_verifies_what_we_forward() {
    verifies_what_we_forward(Sdk::node(SERVER_SIDE_NODE).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_own_libraries_make_the_requests_that_connect_makes() {
    let site = Site::new();
    site.configure(&Setup::default());
    let ours = StreamApi::v2(&[]).await;
    let (url, stream_url) = ("https://hooks.example.com", ours.url());
    let args =
        ["connect", "--url", url, "--no-verify", "--yes", "--stream-url", &stream_url, "--event-types", "message.*"];
    let connected = site.run(&args).await;
    assert!(connected.status.success(), "{connected:?}");
    let update = ours.updates().remove(0).to_string();
    let node = |library: &str, url: &str| {
        let mut command = Command::new("node");
        command.arg(source("settings.mjs")).arg(installed("node/package.json"));
        command.args([library, url, API_KEY, SECRET, &update]);
        command
    };
    let python = |library: &str, url: &str| {
        let mut command = Command::new(installed("python/bin/python"));
        command.arg(source("settings.py")).args([library, url, API_KEY, SECRET, &update]);
        command
    };
    let of = |stream: &StreamApi, method: Method, is_of_settings: bool| {
        let mut requests = stream.requests().into_iter();
        let wanted = |path: &str| path.contains("/app?") == is_of_settings;
        let request = requests.find(|request| request.method == method && wanted(&request.path)).unwrap();
        let (path, query) = request.path.split_once('?').unwrap();
        let parts = ["api_key=", "product="].map(|name| query.split('&').find(|pair| pair.starts_with(name)));
        let parts = parts.map(|pair| pair.unwrap_or_default().to_owned());
        let headers = ["authorization", "stream-auth-type"].map(|name| request.header(name).to_owned());
        let body: Option<Value> = serde_json::from_slice(&request.body).ok();
        (path.to_owned(), (parts, headers, body.filter(|_| method == Method::PATCH)))
    };
    let libraries = [
        ("node", NODE, "/app"),
        ("node", SERVER_SIDE_NODE, "/api/v2/app"),
        ("python", NODE, "/app"),
        ("python", "getstream", "/api/v2/app"),
    ];
    for (language, library, path) in libraries {
        let theirs = StreamApi::v2(&[]).await;
        let mut command =
            if language == "python" { python(library, &theirs.url()) } else { node(library, &theirs.url()) };
        let ran = command.output().await.unwrap();
        assert!(ran.status.success(), "{library}: {ran:?}");
        assert_eq!(theirs.app().hooks.len(), 1, "{library}");
        for method in [Method::GET, Method::PATCH] {
            let (their_path, their_request) = of(&theirs, method.clone(), true);
            let (our_path, mut our_request) = of(&ours, method, true);
            if library == "getstream" {
                // Its token has no claims.
                our_request.1[0].clone_from(&their_request.1[0]);
            }
            // Stream has two families of paths for the same settings.
            assert_eq!((their_path.as_str(), our_path.as_str()), (path, "/api/v2/app"), "{library}");
            assert_eq!(their_request, our_request, "{library}");
        }
        // Only the older library for Node asks for the events that hooks can have.
        if (language, library) == ("node", NODE) {
            assert_eq!(of(&theirs, Method::GET, false), of(&ours, Method::GET, false));
        }
    }
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
    // An event of a type that the consumer did not bind.
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
