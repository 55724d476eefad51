//! `streamgate connect` against a server with the rules of Stream's API.

mod failures;

use crate::commands::{json, text};
use crate::harness::process::{Setup, Site};
use crate::harness::stream_api::{App, StreamApi, token};
use crate::harness::terminal::on_a_terminal;
use crate::harness::wire::{API_KEY, SECRET};
use hyper::Method;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Output;
use streamgate_core::fields::Fields;

const URL: &str = "https://hooks.example.com";
const HOOKS: &str = "[hooks.before_message_send]\ndeadline = '900ms'\nrules = [{ pattern = 'casino', action = 'reject', text = 'No.' }]\n\
                     [hooks.custom_commands.commands.ticket]\nreply = 'done'";
/// Hooks as Stream has them: with fields that no public library knows, secrets, nulls, and a number that no float holds.
const FOREIGN: [&str; 4] = [
    r#"{"id":"h1","hook_type":"sqs","enabled":true,"event_types":null,"sqs_queue_url":"https://sqs.example/q.fifo","sqs_region":"us-east-1","sqs_auth_type":"keys","sqs_key":"AKIA","sqs_secret":"geheim","sqs_event_based_message_group_id_enabled":true,"should_send_custom_events":null}"#,
    r#"{"id":"h2","hook_type":"gcp_pubsub","enabled":true,"event_types":[],"gcp_pubsub_topic":"projects/p/topics/t1","gcp_pubsub_auth_type":"resource","gcp_pubsub_region":"europe-west4","gcp_pubsub_event_based_ordering_key_enabled":true}"#,
    r#"{"id":"h3","hook_type":"webhook","enabled":true,"event_types":["message.new"],"webhook_url":"https://customer.example/hooks","failover_config":{"type":"s3","s3_bucket":"b","s3_path":"p","s3_region":"us-east-1","s3_role_arn":"arn:aws:iam::1:role/r"},"created_at":"2025-10-01T10:00:00.123456Z"}"#,
    r#"{"id":"h5","hook_type":"of_the_future","enabled":true,"limit":9223372036854775807,"nested":{"list":[1,null,"\u00e9\/"]},"updated_at":"2026-10-08T18:52:22.458572001Z"}"#,
];

fn site(setup: Setup) -> Site {
    let site = Site::new();
    site.configure(&setup);
    site
}

/// Without the check of the public URL, at which no server listens.
async fn connect(site: &Site, stream: &StreamApi, args: &[&str]) -> Output {
    let stream_url = stream.url();
    let common = ["connect", "--stream-url", &stream_url, "--no-verify", "--yes"];
    let url = if args.contains(&"--url") { vec![] } else { vec!["--url", URL] };
    site.run(&[&common[..], &url, args].concat()).await
}

fn plain_settings() -> BTreeMap<String, Value> {
    let settings = [
        ("before_message_send_hook_url", json!("")),
        ("before_message_send_hook_attempt_timeout_ms", json!(0)),
        ("custom_action_handler_url", json!("")),
        ("grants", json!({"user": ["read-channel"]})),
    ];
    settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

async fn app_with_foreign_hooks() -> StreamApi {
    let stream = StreamApi::v2(&FOREIGN).await;
    stream.change(|app| app.plain = plain_settings());
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn connecting_twice_elsewhere_and_back_leaves_an_app_as_it_was() {
    let (site, stream) = (site(Setup { rest: HOOKS.into(), ..Setup::default() }), app_with_foreign_hooks().await);
    let connected = connect(&site, &stream, &[]).await;
    assert!(connected.status.success(), "{connected:?}");
    let shown = text(&connected.stdout);
    for line in
        ["+ webhook hook to https://hooks.example.com/webhooks/stream/push: every event", "= 4 other hooks kept"]
    {
        assert!(shown.contains(line), "{line} in {shown}");
    }
    assert!(shown.contains("! webhook hook h3 to https://customer.example/hooks gets the same events"), "{shown}");
    let [hooks, plain] = &stream.updates()[..] else { panic!("{:?}", stream.updates()) };
    assert_eq!(hooks.as_object().unwrap().keys().collect::<Vec<_>>(), ["event_hooks"]);
    assert_eq!(
        *plain,
        json!({
            "before_message_send_hook_url": format!("{URL}/webhooks/stream/before-message-send"),
            "before_message_send_hook_attempt_timeout_ms": 1200,
            "custom_action_handler_url": format!("{URL}/webhooks/stream/custom-commands?type={{type}}"),
        })
    );
    let app = stream.app();
    assert_eq!(app.hooks[..4], FOREIGN);
    let ours: Value = serde_json::from_str(&app.hooks[4]).unwrap();
    assert_eq!(
        (&ours["webhook_url"], &ours["event_types"], &ours["enabled"], &ours["product"]),
        (&json!(format!("{URL}/webhooks/stream/push")), &json!([]), &json!(true), &json!("chat"))
    );
    let again = connect(&site, &stream, &[]).await;
    assert!(again.status.success() && text(&again.stdout).contains("nothing to change"), "{again:?}");
    assert_eq!(stream.updates().len(), 2, "no further update");
    let elsewhere = ["--url", "https://other.example.com", "--no-hooks"];
    assert!(connect(&site, &stream, &elsewhere).await.status.success());
    assert_eq!(stream.app().hooks.len(), 6);
    let removed = connect(&site, &stream, &["--url", "https://other.example.com", "--remove"]).await;
    assert!(removed.status.success(), "{removed:?}");
    assert_eq!(
        (stream.app().hooks.len(), stream.app().plain),
        (5, app.plain),
        "the hook and the URLs that lead to the first URL stay"
    );
    let without = connect(&site, &stream, &["--no-hooks"]).await;
    assert!(without.status.success(), "{without:?}");
    assert_eq!(stream.app().plain, plain_settings(), "the URLs and the timeout are as they were");
    let removed = connect(&site, &stream, &["--remove", "--json"]).await;
    assert_eq!(json(&removed)["visible"], true, "{removed:?}");
    assert_eq!(stream.app().hooks, FOREIGN);
    assert_eq!(stream.app().plain, plain_settings());
    assert_eq!(json(&connect(&site, &stream, &["--remove", "--json"]).await)["changes"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connected_app_delivers_and_can_be_disconnected_again() {
    let site = site(Setup { rest: HOOKS.into(), ..Setup::default() });
    let server = site.start().await;
    let stream = app_with_foreign_hooks().await;
    let url = format!("http://{}", server.public);
    let connected = connect(&site, &stream, &["--url", &url]).await;
    assert!(connected.status.success(), "{connected:?}");
    let app = stream.app();
    let hook = Fields::parse(app.hooks[4].as_bytes()).unwrap().text("webhook_url").unwrap();
    let sent = site.run(&["send", "--url", &hook]).await;
    assert!(sent.status.success() && text(&sent.stdout).starts_with("200 enqueued"), "{sent:?}");
    let moderation = app.plain["before_message_send_hook_url"].as_str().unwrap();
    let sent = site.run(&["send", "--kind", "before-message-send", "--text", "casino", "--url", moderation]).await;
    assert!(text(&sent.stdout).contains("rejected: \"No.\""), "{sent:?}");
    let command = app.plain["custom_action_handler_url"].as_str().unwrap().replace("{type}", "ticket");
    let sent = site.run(&["send", "--kind", "custom-command", "--type", "ticket", "--url", &command]).await;
    assert!(text(&sent.stdout).contains("done"), "{sent:?}");
    assert!(connect(&site, &stream, &["--url", &url, "--remove"]).await.status.success());
    assert_eq!((&stream.app().hooks[..], stream.app().plain), (&FOREIGN.map(str::to_owned)[..], plain_settings()));
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_is_as_streams_own_libraries_make_it() {
    let (site, stream) = (site(Setup::default()), app_with_foreign_hooks().await);
    assert!(connect(&site, &stream, &["--event-types", "message.*,reaction.new"]).await.status.success());
    let requests = stream.requests();
    for request in &requests {
        let is_settings = request.path == format!("/api/v2/app?api_key={API_KEY}");
        assert!(
            is_settings || request.path == format!("/hook/events?api_key={API_KEY}&product=chat"),
            "{}",
            request.path
        );
        assert_eq!((request.header("authorization"), request.header("stream-auth-type")), (&*token(SECRET), "jwt"));
        assert!(request.header("x-stream-client").starts_with("streamgate-"));
        let content_type = if request.method == Method::PATCH { "application/json" } else { "" };
        assert_eq!(request.header("content-type"), content_type);
    }
    let ours: Value = serde_json::from_str(&stream.app().hooks[4]).unwrap();
    assert_eq!(ours["event_types"], json!(["message.deleted", "message.new", "message.updated", "reaction.new"]));
    assert_eq!(stream.updates().len(), 1, "the configuration answers no hooks: their URLs stay");
    let unknown = connect(&site, &stream, &["--event-types", "mesage.new"]).await;
    assert_eq!(unknown.status.code(), Some(64));
    assert!(text(&unknown.stderr).contains("did you mean message.new?"), "{unknown:?}");
    stream.change(|app| app.lists_events = false);
    let documented = connect(&site, &stream, &["--event-types", "message.read", "--dry-run"]).await;
    assert!(documented.status.success() && text(&documented.stdout).contains("message.read"), "{documented:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_of_the_first_generation_is_connected_and_left_as_it_was() {
    let (site, stream) = (site(Setup::default()), StreamApi::start(App::default()).await);
    stream.change(|app| app.plain = BTreeMap::from([("webhook_url".to_owned(), json!("https://customer.example/"))]));
    let refused = connect(&site, &stream, &[]).await;
    assert!(refused.status.code() == Some(1) && text(&refused.stdout).contains("--replace"), "{refused:?}");
    assert!(connect(&site, &stream, &["--replace"]).await.status.success());
    assert_eq!(stream.updates(), [json!({"webhook_url": format!("{URL}/webhooks/stream/push")})]);
    assert!(connect(&site, &stream, &["--remove"]).await.status.success());
    assert_eq!(stream.app().plain["webhook_url"], "");
    // webhook_events applies to the queue, too.
    stream.change(|app| {
        let settings = [("webhook_events", json!(["message.new"])), ("sqs_url", json!("https://sqs.example/q"))];
        app.plain.extend(settings.map(|(name, value)| (name.to_owned(), value)));
    });
    let before = stream.updates().len();
    let refused = connect(&site, &stream, &[]).await;
    let shown = text(&refused.stdout);
    assert!(refused.status.code() == Some(1) && shown.contains("webhook_events is message.new"), "{shown}");
    assert!(shown.contains("sqs_url https://sqs.example/q") && shown.contains("--replace"), "{shown}");
    assert_eq!(stream.updates().len(), before);
    assert!(connect(&site, &stream, &["--event-types", "message.new"]).await.status.success());
    assert_eq!(stream.app().plain["webhook_events"], json!(["message.new"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn remove_clears_the_urls_first_and_a_hidden_secret_keeps_only_the_list() {
    let site = site(Setup { rest: HOOKS.into(), ..Setup::default() });
    let stream = app_with_foreign_hooks().await;
    assert!(connect(&site, &stream, &[]).await.status.success());
    let connected = stream.app();
    stream.change(|app| {
        app.hooks[0] = FOREIGN[0].replace("geheim", "");
        app.refuses_zero = true;
    });
    let kept = stream.app().hooks;
    let removed = connect(&site, &stream, &["--remove"]).await;
    let shown = text(&removed.stdout);
    assert!(removed.status.code() == Some(1) && shown.contains("what was refused still leads here"), "{removed:?}");
    assert!(shown.contains("stays, since the list may not be written") && shown.contains("--force"), "{shown}");
    assert!(shown.contains("! Stream does not take its own default back"), "{shown}");
    let app = stream.app();
    assert_eq!((&app.hooks, &app.plain["before_message_send_hook_url"]), (&kept, &json!("")));
    assert_eq!(app.plain["before_message_send_hook_attempt_timeout_ms"], 1200);
    // The URLs are gone and the timeout is still ours.
    stream.change(|app| (app.refuses_zero, app.hooks) = (false, connected.hooks));
    let before = stream.updates().len();
    assert!(connect(&site, &stream, &["--remove"]).await.status.success());
    assert_eq!((&stream.app().hooks[..], stream.app().plain), (&FOREIGN.map(str::to_owned)[..], plain_settings()));
    assert_eq!(stream.updates().len(), before + 2);
    // The timeout has changed since, so it may be somebody else's.
    assert!(connect(&site, &stream, &[]).await.status.success());
    stream.change(|app| drop(app.plain.insert("before_message_send_hook_attempt_timeout_ms".to_owned(), json!(700))));
    let before = stream.updates().len();
    let removed = connect(&site, &stream, &["--remove"]).await;
    assert!(removed.status.success() && text(&removed.stdout).contains("stays 700 ms"), "{removed:?}");
    let order: Vec<_> = stream.updates()[before..].iter().map(|update| update["event_hooks"].is_array()).collect();
    assert_eq!(order, [false, true], "the URLs first: each message waits for their answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_reports_app_settings_that_no_longer_fit() {
    let routes = "[[worker.routes]]\nname = \"app\"\nevents = [\"message.new\", \"order.*\"]\nforward = { url = \"http://127.0.0.1:9\" }\n";
    let site = site(Setup {
        listen: "127.0.0.1:18080".parse().unwrap(),
        rest: format!("{routes}{HOOKS}"),
        ..Setup::default()
    });
    let stream = app_with_foreign_hooks().await;
    let url = stream.url();
    let check = async || {
        let checked = site.run(&["check", "gateway", "--offline", "--stream", "--stream-url", &url, "--json"]).await;
        let found = json(&checked)["checks"].as_array().unwrap().clone();
        let of_stream: Vec<_> = found.into_iter().filter(|check| check["what"] == "stream, app chat").collect();
        assert!(!of_stream.is_empty(), "{checked:?}");
        (of_stream.iter().all(|check| check["ok"] == true), Value::from(of_stream).to_string())
    };
    let (is_ok, found) = check().await;
    assert!(
        !is_ok && found.contains("no hook of the app leads here") && found.contains("streamgate connect"),
        "{found}"
    );
    assert!(found.contains("before_message_send_hook_url is not set"), "{found}");
    assert!(connect(&site, &stream, &[]).await.status.success());
    let (is_ok, found) = check().await;
    assert!(is_ok && found.contains("waits for \\\"order.*\\\", which no hook sends"), "{found}");
    assert!(found.contains("hook h3 to https://customer.example/hooks gets the same events"), "{found}");
    assert!(!found.contains("before_message_send"), "{found}");
    assert!(found.contains("delivers to https://hooks.example.com\""), "which URL: {found}");
    stream.change(|app| drop(app.hooks.remove(2)));
    assert!(connect(&site, &stream, &["--custom-events"]).await.status.success());
    let (is_ok, found) = check().await;
    assert!(is_ok && !found.contains("warning"), "{found}");
    let elsewhere =
        ["check", "gateway", "--offline", "--stream", "--stream-url", &url, "--url", "https://other.example.com"];
    let elsewhere = site.run(&elsewhere).await;
    assert!(
        elsewhere.status.code() == Some(1) && text(&elsewhere.stdout).contains("no hook of the app leads here"),
        "{elsewhere:?}"
    );
    stream.change(|app| {
        app.plain.insert("before_message_send_hook_attempt_timeout_ms".to_owned(), json!(500));
        app.hooks = app.hooks.iter().map(|hook| hook.replace("\"enabled\":true", "\"enabled\":false")).collect();
    });
    let (is_ok, found) = check().await;
    assert!(!is_ok && found.contains("is not enabled") && found.contains("Stream waits 500ms"), "{found}");
    stream.change(|app| {
        let url = "https://abc.trycloudflare.com/webhooks/stream/push";
        app.hooks = vec![format!(
            r#"{{"id":"t","hook_type":"webhook","enabled":true,"timeout_ms":900,"event_types":["reaction.new"],"webhook_url":"{url}"}}"#
        )];
    });
    let (is_ok, found) = check().await;
    for doubt in [
        "several gateways",
        "a tunnel of trycloudflare.com",
        "Stream waits 900ms (its timeout_ms)",
        "\\\"message.new\\\", which no hook",
    ] {
        assert!(is_ok && found.contains(doubt), "{doubt}: {found}");
    }
    assert_eq!(stream.updates().len(), 3, "check writes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn connect_asks_on_a_terminal_before_it_writes() {
    let (site, stream) = (site(Setup::default()), StreamApi::v2(&[]).await);
    let line = format!(
        "exec {} --config {} connect --no-verify --url {URL} --stream-url {}",
        crate::harness::process::binary(),
        site.config().display(),
        stream.url()
    );
    let (code, shown) = on_a_terminal(&line, "Write this to the app's settings?", "n\n").await;
    assert!(code == Some(1) && shown.contains("nothing was written"), "{shown}");
    assert_eq!(stream.updates().len(), 0);
    // A person cannot agree to a plan that is not shown.
    for hidden in [format!("{line} > {}", site.path("plan").display()), format!("{line} --json")] {
        let before = stream.requests().len();
        let (code, shown) = on_a_terminal(&hidden, "nothing can be asked about it", "").await;
        assert!(code == Some(64) && stream.requests().len() == before, "{hidden}: {shown}");
    }
    let (code, shown) = on_a_terminal(&line, "Write this to the app's settings?", "y\n").await;
    assert!(code == Some(0) && shown.contains("the app is connected"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connect_warns_of_a_deadline_that_stream_does_not_wait_for() {
    let hooks = HOOKS.replace("900ms", "4800ms");
    let site = site(Setup { gateway: "answer_deadline = '4900ms'".into(), rest: hooks, ..Setup::default() });
    let stream = StreamApi::v2(&[]).await;
    let planned = text(&connect(&site, &stream, &["--dry-run"]).await.stdout);
    assert!(planned.contains("! Stream waits 5s for before-message-send at the most"), "{planned}");
    assert!(planned.contains("hooks.before_message_send.deadline to 4.7s or less"), "{planned}");
    let without = text(&connect(&site, &stream, &["--dry-run", "--no-hooks"]).await.stdout);
    assert!(!without.contains("Stream waits"), "{without}");
}
