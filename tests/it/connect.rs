//! `streamgate connect` against a server with the rules of Stream's API.

use crate::commands::{json, text};
use crate::harness::eventually;
use crate::harness::process::{Setup, Site};
use crate::harness::stream_api::{App, Fault, StreamApi, token};
use crate::harness::terminal::on_a_terminal;
use crate::harness::wire::{API_KEY, SECRET};
use hyper::Method;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::{Output, Stdio};
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

/// With the try of the public URL left out: nobody is there.
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
    assert_eq!((stream.app().hooks.len(), stream.app().plain), (5, app.plain), "what leads to the first URL stays");
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
async fn what_was_connected_delivers_and_is_taken_out_again() {
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
async fn what_could_do_harm_writes_nothing() {
    let site = site(Setup { rest: HOOKS.into(), ..Setup::default() });
    let stream = app_with_foreign_hooks().await;
    let masked = FOREIGN[0].replace("geheim", "***");
    for (hooks, setting, args, said, code) in [
        (vec![masked.as_str()], None, &[][..], "--force", 1),
        (vec![], Some("before_message_send_hook_url"), &[], "--replace", 1),
        (vec![], Some("custom_action_handler_url"), &[], "--replace", 1),
        (vec![FOREIGN[2]], None, &["--compress"], "--force", 1),
        (vec![], None, &["--dry-run"], "--dry-run", 0),
        (vec![], None, &["--url", "https://10.0.0.7"], "private network", 64),
        (vec![], None, &["--url", "https://gateway"], "no dot", 64),
        (vec![], None, &["--url", "hooks.example.com"], "--url takes a URL", 64),
        (vec![], None, &["--app", "other"], "it has chat", 64),
        (vec![], None, &["--stream-url", "http://stream.example.com"], "--stream-url must be https", 64),
    ] {
        stream.change(|app| {
            app.hooks = hooks.iter().map(|hook| (*hook).to_owned()).collect();
            app.plain = plain_settings();
            app.plain.extend(setting.map(|name| (name.to_owned(), json!("https://customer.example/a?token=geheim"))));
        });
        // The last --stream-url would not be the only one.
        let output = match args.contains(&"--stream-url") {
            true => site.run(&[&["connect", "--no-verify", "--yes", "--url", URL], args].concat()).await,
            false => connect(&site, &stream, args).await,
        };
        let shown = text(&output.stdout) + &text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {shown}");
        assert!(shown.contains(said) && !shown.contains("geheim"), "{args:?}: {shown}");
        assert!(setting.is_none_or(|_| shown.contains("https://customer.example/a")), "the old value: {shown}");
    }
    assert_eq!(stream.updates(), [] as [Value; 0]);
    stream.change(|app| app.hooks = vec![masked.clone()]);
    assert!(connect(&site, &stream, &["--force", "--compress"]).await.status.success());
    assert_eq!(stream.app().hooks[0], masked);
    assert_eq!(stream.app().plain["enable_hook_payload_compression"], true);
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
    // webhook_events holds for the queue too.
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
async fn settings_that_change_meanwhile_are_planned_anew_once() {
    let (site, stream) = (site(Setup::default()), StreamApi::v2(&[]).await);
    let added = |count: usize| FOREIGN[..count].iter().map(|hook| (*hook).to_owned()).collect::<Vec<_>>();
    stream.change(|app| app.changes = vec![added(1)]);
    let connected = connect(&site, &stream, &[]).await;
    assert!(connected.status.success() && text(&connected.stdout).contains("planned anew"), "{connected:?}");
    let hooks = stream.app().hooks;
    assert!(hooks.len() == 2 && hooks[0] == FOREIGN[0], "what was added meanwhile is there: {hooks:?}");
    stream.change(|app| app.changes = vec![added(2), added(3), added(4)]);
    let before = stream.updates().len();
    let given_up = connect(&site, &stream, &["--custom-events"]).await;
    assert_eq!(given_up.status.code(), Some(1), "{given_up:?}");
    assert!(text(&given_up.stderr).contains("somebody else changes this app's settings"), "{given_up:?}");
    assert_eq!(stream.updates().len(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connect_that_is_killed_between_its_updates_leaves_the_list_whole() {
    let site = site(Setup { rest: HOOKS.into(), ..Setup::default() });
    let stream = app_with_foreign_hooks().await;
    // It waits for the list to be seen before it goes on.
    stream.change(|app| app.lag = usize::MAX);
    let url = stream.url();
    let args = ["connect", "--no-verify", "--yes", "--url", URL, "--stream-url", &url];
    let mut killed = site.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    eventually("the first update", || async { !stream.updates().is_empty() }).await;
    killed.kill().await.unwrap();
    assert_eq!(stream.updates().len(), 1);
    let app = stream.app();
    assert_eq!((app.hooks.len(), &app.hooks[..4]), (5, &FOREIGN.map(str::to_owned)[..]));
    assert_eq!(app.plain, plain_settings());
    stream.change(|app| (app.lag, app.stale) = (0, None));
    let again = connect(&site, &stream, &[]).await;
    assert!(again.status.success() && text(&again.stdout).contains("the app is connected"), "{again:?}");
    assert_eq!((stream.updates().len(), stream.app().hooks), (2, app.hooks));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_or_busy_stream_is_waited_for_and_its_errors_say_what_to_do() {
    let (site, stream) = (site(Setup::default()), StreamApi::v2(&[]).await);
    stream.change(|app| (app.lag, app.too_many, app.reorders) = (1, 1, true));
    stream.change(|app| app.hooks = FOREIGN.map(str::to_owned).to_vec());
    let connected = connect(&site, &stream, &["--json"]).await;
    assert_eq!((json(&connected)["written"].clone(), json(&connected)["visible"].clone()), (true.into(), true.into()));
    stream.change(|app| (app.lag, app.hooks) = (50, vec![]));
    let unseen = connect(&site, &stream, &[]).await;
    assert!(unseen.status.success() && text(&unseen.stdout).contains("not yet visible"), "{unseen:?}");
    stream.change(|app| (app.lag, app.stale, app.busy_updates) = (0, None, 1));
    let before = stream.updates().len();
    let busy = connect(&site, &stream, &["--event-types", "message.new"]).await;
    let said = text(&busy.stderr);
    assert!(busy.status.code() == Some(1) && said.contains("nothing was written") && said.contains("429"), "{said}");
    assert_eq!(stream.updates().len(), before + 1, "an update is not repeated: what it rests on may have changed");
    stream.change(|app| app.edge_errors = 9);
    let edge = connect(&site, &stream, &[]).await;
    let said = text(&edge.stderr);
    assert!(edge.status.code() == Some(1) && said.contains("502") && said.contains("Bad Gateway"), "{said}");
    let other = Site::new();
    let toml = Setup::default().toml(&other.data_dir());
    other.write("streamgate.toml", toml.replace(SECRET, "a_secret_that_is_another"));
    stream.change(|app| app.edge_errors = 0);
    let refused = connect(&other, &stream, &[]).await;
    assert!(refused.status.code() == Some(1) && text(&refused.stderr).contains("not this key's"), "{refused:?}");
    let rotated = toml.replace(&format!("\"{SECRET}\""), &format!("\"a_secret_of_yesterday\", \"{SECRET}\""));
    other.write("streamgate.toml", rotated);
    assert!(connect(&other, &stream, &["--dry-run"]).await.status.success(), "the next secret is tried");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_fails_says_what_was_written() {
    let site = site(Setup { rest: HOOKS.into(), ..Setup::default() });
    let stream = app_with_foreign_hooks().await;
    let list = |app: &mut App| app.hooks = FOREIGN.map(str::to_owned).to_vec();
    let refused = Fault::Refused("unable to resolve url https://ann:geheim@customer.example/hooks?token=geheim");
    let lost = Fault::LostAnswer("<html>502 for Authorization: geheim</html>");
    let moved =
        || Some(BTreeMap::from([("custom_action_handler_url".to_owned(), json!("https://customer.example/c"))]));
    type Prepare<'a> = &'a dyn Fn(&mut App);
    let cases: [(Prepare<'_>, Value, &[&str], usize); 7] = [
        (&|app| app.faults = [refused].into(), json!(false), &["nothing was written", "customer.example/hooks?…"], 4),
        (&|app| app.faults = [Fault::Taken, refused].into(), json!(true), &["written in part"], 5),
        (&|app| app.faults = [lost].into(), Value::Null, &["not known whether", "502"], 5),
        (
            &|app| app.unreadable = 4,
            json!(true),
            &["it is not known what it shows now", "cannot be read back", "502"],
            5,
        ),
        (&|app| app.meanwhile = moved(), json!(true), &["written in part", "somebody else changed"], 5),
        (
            &|app| app.drops = Some("sqs_event_based_message_group_id_enabled"),
            json!(true),
            &["sqs hook h1", "sqs_event_based_message_group_id_enabled is missing"],
            5,
        ),
        (&|app| app.drops = Some("event_types"), json!(true), &["webhook hook h3", "event_types is nothing where"], 5),
    ];
    for (prepare, written, said, hooks) in cases {
        stream.change(|app| {
            list(app);
            app.plain = plain_settings();
            (app.drops, app.stale) = (None, None);
            prepare(app);
        });
        let failed = connect(&site, &stream, &["--json"]).await;
        let (report, shown) = (json(&failed), text(&failed.stderr));
        assert!(failed.status.code() == Some(1) && report["ok"] == false, "{failed:?}");
        assert_eq!(report["written"], written, "{failed:?}");
        for said in said {
            assert!(shown.contains(said) && report["error"].as_str().unwrap().contains(said), "{said}: {failed:?}");
        }
        assert!(!shown.contains("token=geheim") && !shown.contains("ann:geheim"), "{shown}");
        assert_eq!(stream.app().hooks.len(), hooks, "{failed:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_out_begins_with_the_urls_and_a_hidden_secret_keeps_only_the_list() {
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
    // Another deadline since: it may be somebody else's timeout.
    assert!(connect(&site, &stream, &[]).await.status.success());
    stream.change(|app| drop(app.plain.insert("before_message_send_hook_attempt_timeout_ms".to_owned(), json!(700))));
    let before = stream.updates().len();
    let removed = connect(&site, &stream, &["--remove"]).await;
    assert!(removed.status.success() && text(&removed.stdout).contains("stays 700 ms"), "{removed:?}");
    let order: Vec<_> = stream.updates()[before..].iter().map(|update| update["event_hooks"].is_array()).collect();
    assert_eq!(order, [false, true], "the URLs first: each message waits for theirs");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_that_does_not_answer_as_a_gateway_is_not_written() {
    let (site, stream) = (site(Setup::default()), StreamApi::v2(&[]).await);
    let tried = site.run(&["connect", "--yes", "--url", "https://nobody.example", "--stream-url", &stream.url()]).await;
    let said = text(&tried.stderr);
    assert_eq!(tried.status.code(), Some(1), "{said}");
    assert!(said.contains("https://nobody.example/webhooks/stream/push") && said.contains("--no-verify"), "{said}");
    assert_eq!(stream.requests().len(), 0, "Stream was not asked");
    let loopback =
        site.run(&["connect", "--yes", "--url", "http://127.0.0.1:8080", "--stream-url", &stream.url()]).await;
    assert!(loopback.status.code() == Some(64) && text(&loopback.stderr).contains("private network"), "{loopback:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_tells_where_the_apps_settings_no_longer_fit() {
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
async fn a_terminal_is_asked_before_anything_is_written() {
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
    // What nobody sees, nobody can agree to.
    for hidden in [format!("{line} > {}", site.path("plan").display()), format!("{line} --json")] {
        let before = stream.requests().len();
        let (code, shown) = on_a_terminal(&hidden, "nothing can be asked about it", "").await;
        assert!(code == Some(64) && stream.requests().len() == before, "{hidden}: {shown}");
    }
    let (code, shown) = on_a_terminal(&line, "Write this to the app's settings?", "y\n").await;
    assert!(code == Some(0) && shown.contains("the app is connected"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_stream_does_not_wait_for_is_said() {
    let hooks = HOOKS.replace("900ms", "4800ms");
    let site = site(Setup { gateway: "answer_deadline = '4900ms'".into(), rest: hooks, ..Setup::default() });
    let stream = StreamApi::v2(&[]).await;
    let planned = text(&connect(&site, &stream, &["--dry-run"]).await.stdout);
    assert!(planned.contains("! Stream waits 5s for before-message-send at the most"), "{planned}");
    assert!(planned.contains("hooks.before_message_send.deadline to 4.7s or less"), "{planned}");
    let without = text(&connect(&site, &stream, &["--dry-run", "--no-hooks"]).await.stdout);
    assert!(!without.contains("Stream waits"), "{without}");
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_secret_nor_a_token_is_shown_at_any_level() {
    let site = site(Setup { rest: HOOKS.into(), ..Setup::default() });
    let stream = app_with_foreign_hooks().await;
    let url = stream.url();
    for args in [&["--dry-run"][..], &[], &["--json"], &["--remove", "--json"]] {
        let mut command =
            site.command(&[&["connect", "--no-verify", "--yes", "--url", URL, "--stream-url", &url], args].concat());
        let output = command.env("STREAMGATE_LOG", "trace").output().await.unwrap();
        assert!(output.status.success(), "{output:?}");
        let shown = text(&output.stdout) + &text(&output.stderr);
        for secret in [SECRET, &token(SECRET), "geheim", "AKIA"] {
            assert!(!shown.contains(secret), "{secret} in {shown}");
        }
    }
    // An edge that reflects the request, and a secret that is not the app's.
    let reflected: &'static str = format!("denied: Authorization: {} geheim.example", token(SECRET)).leak();
    for fault in [Fault::LostAnswer(reflected), Fault::Refused(reflected)] {
        stream.change(|app| app.faults = [fault].into());
        let args = ["connect", "--no-verify", "--yes", "--url", URL, "--stream-url", &url, "--custom-events"];
        let failed = site.command(&args).env("STREAMGATE_LOG", "trace").output().await.unwrap();
        let shown = text(&failed.stdout) + &text(&failed.stderr);
        assert!(failed.status.code() == Some(1) && shown.contains("denied: Authorization: …"), "{shown}");
        assert!(!shown.contains(SECRET) && !shown.contains(&token(SECRET)), "{shown}");
    }
    let wrong = "a_secret_that_is_another";
    site.write("streamgate.toml", Setup::default().toml(&site.data_dir()).replace(SECRET, wrong));
    let args = ["connect", "--no-verify", "--yes", "--url", URL, "--stream-url", &url];
    let failed = site.command(&args).env("STREAMGATE_LOG", "trace").output().await.unwrap();
    let shown = text(&failed.stdout) + &text(&failed.stderr);
    assert!(failed.status.code() == Some(1) && !shown.contains(wrong) && !shown.contains(&token(wrong)), "{shown}");
}
