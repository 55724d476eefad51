//! `connect` where it must not write, failures while it writes, and what it reports then.

use super::{FOREIGN, HOOKS, URL, app_with_foreign_hooks, connect, plain_settings, site};
use crate::commands::{json, text};
use crate::harness::eventually;
use crate::harness::process::{Setup, Site};
use crate::harness::stream_api::{App, Fault, StreamApi, token};
use crate::harness::wire::SECRET;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Stdio;

#[tokio::test(flavor = "multi_thread")]
async fn connect_does_not_write_what_could_do_harm() {
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
        // --stream-url may be given once only.
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
async fn settings_that_change_meanwhile_are_planned_anew_once() {
    let (site, stream) = (site(Setup::default()), StreamApi::v2(&[]).await);
    let added = |count: usize| FOREIGN[..count].iter().map(|hook| (*hook).to_owned()).collect::<Vec<_>>();
    stream.change(|app| app.changes = vec![added(1)]);
    let connected = connect(&site, &stream, &[]).await;
    assert!(connected.status.success() && text(&connected.stdout).contains("planned anew"), "{connected:?}");
    let hooks = stream.app().hooks;
    assert!(hooks.len() == 2 && hooks[0] == FOREIGN[0], "the hook that was added meanwhile is kept: {hooks:?}");
    stream.change(|app| app.changes = vec![added(2), added(3), added(4)]);
    let before = stream.updates().len();
    let given_up = connect(&site, &stream, &["--custom-events"]).await;
    assert_eq!(given_up.status.code(), Some(1), "{given_up:?}");
    assert!(text(&given_up.stderr).contains("someone else is changing this app's settings"), "{given_up:?}");
    assert_eq!(stream.updates().len(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connect_that_is_killed_between_its_updates_leaves_the_list_whole() {
    let site = site(Setup { rest: HOOKS.into(), ..Setup::default() });
    let stream = app_with_foreign_hooks().await;
    // `connect` waits until it can read the new list before it goes on.
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
    assert_eq!(stream.updates().len(), before + 1, "an update is not repeated: the settings may have changed");
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
        (&|app| app.faults = [Fault::Taken, refused].into(), json!(true), &["only part was written"], 5),
        (&|app| app.faults = [lost].into(), Value::Null, &["not known whether", "502"], 5),
        (
            &|app| app.unreadable = 4,
            json!(true),
            &["the result could not be read back", "cannot be read back", "502"],
            5,
        ),
        (&|app| app.meanwhile = moved(), json!(true), &["only part was written", "someone else changed"], 5),
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
async fn connect_shows_no_secret_and_no_token_at_any_log_level() {
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
