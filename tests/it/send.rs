//! `streamgate send`: the bodies that it sends, its target, and the secret that it signs with.

use crate::commands::{json, pasted, shell, text};
use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site, bare_command};
use crate::harness::receiver::Receiver;
use crate::harness::terminal::on_a_terminal;
use crate::harness::wire::{API_KEY, SECRET};
use serde_json::Value;
use std::process::Stdio;
use tokio::io::AsyncWriteExt;

/// Runs the `send` line that the server printed, unchanged.
async fn paste(server: &Server) {
    let sent = shell(&pasted(server)).await;
    assert!(sent.status.success() && text(&sent.stdout).starts_with("200 enqueued"), "{} {sent:?}", pasted(server));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_printed_send_command_works_as_it_stands() {
    let site = Site::new();
    std::fs::create_dir(site.path("it's a dir")).unwrap();
    let setup = Setup::default().toml(&site.path("it's a dir/data"));
    let config = site.write("it's a dir/my config.toml", setup);
    let server = Server::of(bare_command(&["--config", config.to_str().unwrap()]), &site).await;
    paste(&server).await;
    assert!(server.terminate().await.success());

    // The certificate is for a name, and the printed line has an address.
    let (server, _) = crate::statuses::secure(&site, Setup::default()).await;
    paste(&server).await;
    let by_name = pasted(&server).replace("127.0.0.1", "localhost");
    assert!(shell(&by_name).await.status.success());
    let (untrusting, _) = by_name.split_once(" --ca ").unwrap();
    let untrusted = shell(&format!("{untrusting} --config {}", site.config().display())).await;
    assert_eq!(
        untrusted.status.code(),
        Some(1),
        "a self-signed certificate for a name is not trusted by itself: {untrusted:?}"
    );
    let known = shell(
        &untrusting
            .replace("localhost", "127.0.0.1")
            .replace(" send ", &format!(" --config {} send ", site.config().display())),
    )
    .await;
    assert!(known.status.success(), "the configuration's own certificate is trusted: {known:?}");
    assert!(server.terminate().await.success());

    // Each connection must begin with a PROXY header.
    let behind = Site::new();
    behind.write(
        "streamgate.toml",
        Setup::default().toml(&behind.data_dir()).replace("[gateway]", "[gateway]\nproxy_protocol = true"),
    );
    let server = behind.start().await;
    paste(&server).await;
    let known = shell(&pasted(&server).replace(" --proxy-header", "")).await;
    assert!(known.status.success(), "`send` takes proxy_protocol from the configuration: {known:?}");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_printed_send_command_works_for_every_address() {
    for (listen, gateway) in [
        ("[::1]:0", "proxy_protocol = true\ntrusted_proxies = [\"127.0.0.0/8\"]"),
        ("[::]:0", "allow_from = [\"::1\"]"),
        ("0.0.0.0:0", "proxy_protocol = true\nallow_from = [\"127.0.0.1\"]"),
    ] {
        let site = Site::new();
        site.configure(&Setup { listen: listen.parse().unwrap(), gateway: gateway.to_owned(), ..Setup::default() });
        let server = site.start().await;
        assert!(!server.greeting.contains("expect a 403"), "{listen} {gateway}: {}", server.greeting);
        paste(&server).await;
        assert!(server.terminate().await.success());
    }
    let site = Site::new();
    let gateway = "allow_from = [\"127.0.0.1\"]".to_owned();
    site.configure(&Setup { listen: "[::1]:0".parse().unwrap(), gateway, ..Setup::default() });
    let server = site.start().await;
    assert!(server.greeting.contains("expect a 403") && !shell(&pasted(&server)).await.status.success());
    assert!(server.terminate().await.success());

    // The file has no app, so the environment's is used; the data directory has a development app of an earlier run.
    let site = Site::new();
    let server = Server::of(bare_command_with_file(&site), &site).await;
    assert!(server.terminate().await.success());
    let mut command = bare_command_with_file(&site);
    command.env("STREAM_API_KEY", API_KEY).env("STREAM_API_SECRET", SECRET);
    let server = Server::of(command, &site).await;
    let sent = shell(&format!("STREAM_API_SECRET={SECRET} {}", pasted(&server))).await;
    assert!(sent.status.success(), "{sent:?}");
    assert!(server.terminate().await.success());
}

/// A command whose configuration names no app.
fn bare_command_with_file(site: &Site) -> tokio::process::Command {
    let config = site.write("no app.toml", "[gateway]\nlisten = '127.0.0.1:0'\nops_listen = '127.0.0.1:0'\n");
    bare_command(&["--config", config.to_str().unwrap()])
}

#[tokio::test(flavor = "multi_thread")]
async fn send_asks_for_a_secret_that_only_the_gateways_environment_holds() {
    let site = Site::new();
    let mut command = bare_command(&[]);
    command.current_dir(site.path("."));
    command.env("STREAMGATE__GATEWAY__LISTEN", "127.0.0.1:0").env("STREAMGATE__GATEWAY__OPS_LISTEN", "127.0.0.1:0");
    command.env("STREAM_API_KEY", API_KEY).env("STREAM_API_SECRET", SECRET);
    let server = Server::of(command, &site).await;
    let line = pasted(&server);
    assert!(!line.contains(SECRET));
    let refused = shell(&line).await;
    assert_eq!(refused.status.code(), Some(64), "{refused:?}");
    assert!(text(&refused.stderr).contains("set STREAM_API_SECRET"), "{refused:?}");
    assert!(shell(&format!("STREAM_API_SECRET={SECRET} {line}")).await.status.success());
    let question = format!("API secret of {API_KEY}");
    let (code, shown) = on_a_terminal(&format!("exec {line}"), &question, &format!("{SECRET}\n")).await;
    assert!(code == Some(0) && shown.contains("200 enqueued") && !shown.contains(SECRET), "{shown}");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn send_needs_only_the_secret_of_its_app() {
    let site = Site::new();
    site.write(
        "streamgate.toml",
        format!(
            "[gateway]\nlisten = '127.0.0.1:0'\nops_listen = '127.0.0.1:0'\n[store]\ndata_dir = 'data'\n\
             [rabbitmq]\nurl = 'env:NOT_HERE'\n[redis]\nurl = 'file:/none'\n\
             [[apps]]\nname = 'one'\nkeys = [{{ api_key = '{API_KEY}', secrets = ['{SECRET}'] }}]\n\
             [[apps]]\nname = 'two'\nkeys = [{{ api_key = 'second', secrets = ['env:NOT_HERE'] }}]\n\
             [[worker.routes]]\nevents = ['*']\nforward = {{ url = 'env:NOT_HERE', headers = {{ X-A = 'env:NOT_HERE' }} }}\n"
        ),
    );
    let service = Receiver::willing().await;
    let url = format!("http://{}", service.address);
    let sent = site.run(&["send", "--url", &url]).await;
    assert!(sent.status.success(), "{sent:?}");
    assert_eq!(service.received()[0].header("x-api-key"), API_KEY);
    let second = site.run(&["send", "--url", &url, "--api-key", "second"]).await;
    assert_eq!(second.status.code(), Some(64), "{second:?}");
    assert!(text(&second.stderr).contains("NOT_HERE"), "{second:?}");
    let nobody = site.run(&["send", "--url", &url, "--api-key", "third"]).await;
    assert_eq!(nobody.status.code(), Some(64), "{nobody:?}");
    let nowhere = site.run(&["send"]).await;
    assert!(text(&nowhere.stderr).contains("pass the --url"), "the configuration's port is 0: {nowhere:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn send_goes_to_the_configurations_own_address() {
    let site = Site::new();
    let service = Receiver::willing().await;
    site.configure(&Setup { listen: service.address, ..Setup::default() });
    let sent = site.run(&["send", "--type", "reaction.new"]).await;
    assert!(sent.status.success(), "{sent:?}");
    assert_eq!(service.received()[0].path, "/webhooks/stream/push");
}

/// Every type that Stream documents has a body of its documented shape, and arrives through a gateway with that type.
#[tokio::test(flavor = "multi_thread")]
async fn send_has_a_body_for_every_type_of_event() {
    let site = Site::new();
    let service = Receiver::willing().await;
    site.configure(&Setup { rest: service.route(), ..Setup::default() });
    let server = site.start().await;
    let url = format!("http://{}", server.public);
    let listed = json(&bare_command(&["send", "--list-types", "--json"]).output().await.unwrap());
    let types: Vec<&str> = listed.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let lines = text(&bare_command(&["send", "--list-types"]).output().await.unwrap().stdout);
    assert_eq!(lines.lines().collect::<Vec<_>>(), types);
    assert!(types.len() > 70);
    for name in &types {
        let sent = site.run(&["send", "--url", &url, "--type", name, "--json"]).await;
        assert_eq!(json(&sent)["outcomes"]["enqueued"], 1, "{name}: {sent:?}");
    }
    eventually("all are handled", || async { service.received().len() >= types.len() }).await;
    // The field that each family of types must have.
    let subjects = [
        ("message.", "message"),
        ("message.", "user"),
        ("reaction.", "reaction"),
        ("reaction.", "message"),
        ("member.", "member"),
        ("channel.created", "channel"),
        ("channel.muted", "mute"),
        ("user.", "user"),
        ("user_group.", "user_group"),
        ("user_group.member_", "members"),
        ("reminder.", "reminder"),
        ("thread.", "thread"),
        ("review_queue_item.", "review_queue_item"),
        ("message.new", "request_info"),
        ("member.added", "request_info"),
        ("campaign.", "campaign"),
        ("export.", "task_id"),
        ("pending_message.", "message"),
        ("notification.", "cid"),
        ("moderation_rule.", "rule"),
    ];
    for name in &types {
        let came = service.received().into_iter().find(|came| came.header("x-streamgate-type") == *name);
        let body: Value =
            serde_json::from_slice(&came.unwrap_or_else(|| panic!("{name} did not arrive")).body).unwrap();
        if !name.starts_with("pending_message.") {
            assert_eq!(body["type"], *name);
            assert!(body["created_at"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok(), "{name}");
        }
        for (_, subject) in subjects.iter().filter(|(family, _)| name.starts_with(family)) {
            let read = *name == "message.read" && *subject == "message";
            assert!(read || !body[subject].is_null(), "{name} has no {subject}: {body}");
        }
    }
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_options_of_send_shape_the_body() {
    let site = Site::new();
    site.configure(&Setup::default());
    let service = Receiver::willing().await;
    let url = format!("http://{}", service.address);
    let file = site.write("body.json", r#"{"type":"a.b","n":1.10,"user":{"id":"x"}}"#);
    let file = file.to_str().unwrap();
    let command_file = site.write("command.json", r#"{"message":{"command":"ticket","args":"x"}}"#);
    let command_file = command_file.to_str().unwrap();
    for args in [
        &[
            "--text",
            "<b>",
            "--user",
            "ann",
            "--channel",
            "team:red",
            "--set",
            "message.color=\"red\"",
            "--set",
            "n=1.10",
        ][..],
        &["--file", file, "--type", "c.d", "--set", "user.banned=true"],
        &["--kind", "custom-command", "--type", "/poll", "--args", "open now", "--form", "choice=a=b", "--form", "n=1"],
        &["--kind", "custom-command", "--type", "poll", "--file", file],
        &["--kind", "custom-command", "--type", "poll", "--file", command_file],
        &["--type", "pending_message.deleted", "--file", file],
        &["--kind", "before-message-send", "--text", "hi", "--channel", "general"],
        &["--type", "mesage.new"],
    ] {
        let sent = site.run(&[&["send", "--url", &url], args].concat()).await;
        assert!(sent.status.success(), "{args:?}: {sent:?}");
    }
    let received = service.received();
    let body = |place: usize| serde_json::from_slice::<Value>(&received[place].body).unwrap();
    let said = body(0);
    assert_eq!((&said["message"]["text"], &said["message"]["html"]), (&"<b>".into(), &"<p>&lt;b&gt;</p>\n".into()));
    assert_eq!(
        (&said["cid"], &said["channel_type"], &said["channel_id"]),
        (&"team:red".into(), &"team".into(), &"red".into())
    );
    assert_eq!(
        (&said["user"]["id"], &said["message"]["user"]["id"], &said["message"]["color"]),
        (&"ann".into(), &"ann".into(), &"red".into())
    );
    assert!(text(&received[0].body).contains("\"n\":1.10"));
    assert_eq!(text(&received[1].body), r#"{"type":"c.d","n":1.10,"user":{"id":"x","banned":true}}"#);
    let command = body(2);
    assert_eq!(received[2].path, "/webhooks/stream/custom-commands?type=poll");
    assert_eq!((&command["message"]["command"], &command["message"]["args"]), (&"poll".into(), &"open now".into()));
    assert_eq!(command["message"]["text"], "/poll open now");
    assert_eq!(command["form_data"], serde_json::json!({"choice": "a=b", "n": "1"}));
    assert_eq!(received[3].path, "/webhooks/stream/custom-commands?type=poll");
    assert_eq!(text(&received[3].body), std::fs::read_to_string(file).unwrap());
    assert_eq!(text(&received[4].body), r#"{"message":{"command":"poll","args":"x"}}"#);
    assert_eq!(received[5].path, "/webhooks/stream/pending-message/DeletedPendingMessage");
    assert_eq!(text(&received[5].body), std::fs::read_to_string(file).unwrap(), "a callback has no type");
    assert_eq!((&body(6)["channel"]["cid"], &body(6)["message"]["text"]), (&"messaging:general".into(), &"hi".into()));
    assert_eq!((&body(6)["message"]["id"], body(6)["channel"]["config"].is_object()), (&"".into(), true));
    assert_eq!(body(7)["type"], "mesage.new");
    let doubted = site.run(&["send", "--url", &url, "--type", "mesage.new"]).await;
    assert!(text(&doubted.stderr).contains("message.new"), "{doubted:?}");
    for (args, why) in [
        (&["--set", "message.text=hello"][..], "quote a text"),
        (&["--set", "type.x=1"], "not an object"),
        (&["--id", "a\nb"], "valid in a header"),
        (&["--attempt", "0"], "0 is not in"),
        (&["--args", "x"], "custom-command"),
        (&["--kind", "custom-command", "--text", "x"], "--args"),
        (&["--channel", ":x"], "messaging:general"),
        (&["--form", "x"], "NAME=VALUE"),
        (&["--file", file, "--user", "ann"], "cannot be used with"),
        (&["--kind", "before-message-send", "--type", "x"], "has no type"),
    ] {
        let refused = site.run(&[&["send", "--url", &url], args].concat()).await;
        assert_eq!(refused.status.code(), Some(64), "{args:?}: {refused:?}");
        assert!(text(&refused.stderr).contains(why), "{args:?}: {refused:?}");
    }
    assert_eq!(service.received().len(), 9, "none of those was sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn send_reports_statuses_outcomes_and_latencies() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    let url = format!("http://{}", server.public);
    let many = site.run(&["send", "--url", &url, "--count", "200", "--concurrency", "8", "--gzip", "--json"]).await;
    let report = json(&many);
    assert!(many.status.success());
    assert_eq!(
        (&report["sent"], &report["statuses"]["200"], &report["outcomes"]["enqueued"]),
        (&200.into(), &200.into(), &200.into())
    );
    assert!(report["latency_ms"]["p99"].as_f64().unwrap() > 0.0);
    for outcome in ["enqueued", "duplicate"] {
        let repeat = site.run(&["send", "--url", &url, "--id", "made", "--json"]).await;
        assert_eq!(json(&repeat)["outcomes"][outcome], 1, "the same id is the same event: {repeat:?}");
    }
    let file = site.write("body.json", "{\"type\":\"from.a.file\"}");
    let same = ["send", "--url", &url, "--file", file.to_str().unwrap(), "--id", "same", "--attempt", "2", "--json"];
    assert_eq!(json(&site.run(&same).await)["outcomes"]["enqueued"], 1);
    assert_eq!(json(&site.run(&same).await)["outcomes"]["duplicate"], 1);
    let dated = site.write("dated.json", r#"{"type":"a.b","n":1.10,"created_at":"2026-01-01T00:00:00Z"}"#);
    let dated = ["send", "--url", &url, "--file", dated.to_str().unwrap(), "--count", "20", "--json"];
    assert_eq!(json(&site.run(&dated).await)["outcomes"]["enqueued"], 20, "each event has a date of its own");
    let repeats = site.run(&[&dated[..], &["--id", "one"]].concat()).await;
    assert_eq!(json(&repeats)["outcomes"]["duplicate"], 19);
    assert!(String::from_utf8_lossy(&repeats.stderr).contains("repeats"), "{repeats:?}");
    let mut piped = site
        .command(&["send", "--url", &url, "--file", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    piped.stdin.take().unwrap().write_all(b"{\"type\":\"from.stdin\"}").await.unwrap();
    assert!(piped.wait_with_output().await.unwrap().status.success());
    eventually("both events are logged", || async {
        site.log().contains("from.a.file") && site.log().contains("from.stdin")
    })
    .await;
    let mut wrong = site.command(&["send", "--url", &url]);
    wrong
        .env("STREAMGATE_CONFIG", "/dev/null")
        .env("STREAM_API_KEY", API_KEY)
        .env("STREAM_API_SECRET", "not the secret");
    let wrong = wrong.output().await.unwrap();
    assert_eq!(wrong.status.code(), Some(1));
    assert!(text(&wrong.stdout).contains("401 unauthorized: "), "{wrong:?}");
    assert!(server.terminate().await.success());
    let gone = site.run(&["send", "--url", &url]).await;
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone.stdout).contains("is `streamgate up` running"), "{gone:?}");
}
