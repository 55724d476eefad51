//! Hooks that need no code, with the real binary: services, rules and reply templates answer them.

use crate::harness::process::{Server, Setup, Site};
use crate::harness::receiver::{Gate, Received, Receiver, reply};
use crate::harness::wire::{API_KEY, COMMANDS, Webhook, sign};
use crate::hook_faults::{SPACED, ask, json};

async fn up(site: &Site, hooks: String) -> Server {
    site.configure(&Setup { rest: hooks, ..Setup::default() });
    site.start().await
}

/// A command whose URL names another command.
fn queried(query: &str, name: &str) -> Webhook {
    Webhook { path: format!("{COMMANDS}?type={query}"), ..Webhook::command(name, "x", None) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_services_answer_goes_back_as_it_is() {
    let site = Site::new();
    let service = Receiver::start(|_| json(200, SPACED)).await;
    site.write("token", "Bearer of-the-service\n");
    let to = |path: &str| {
        let (address, token) = (service.address, site.path("token"));
        format!("{{ url = \"http://{address}{path}\", headers = {{ Authorization = \"file:{}\" }} }}", token.display())
    };
    let hooks = format!(
        "[hooks.before_message_send]\nforward = {}\n[hooks.custom_commands]\nforward = {}\n\
         [hooks.custom_commands.commands.ticket]\nforward = {}\n",
        to("/moderate?x=1"),
        to("/commands/{type}"),
        to("/tickets")
    );
    let server = up(&site, hooks).await;
    let moderated = Webhook::moderation(r#"{"text":"\u003cb\u003e"}"#).set("x-webhook-attempt", "1");
    for (webhook, path, kind) in [
        (moderated.clone(), "/moderate?x=1", "before-message-send"),
        (moderated.clone().set("x-webhook-id", "zipped").zipped(), "/moderate?x=1", "before-message-send"),
        (Webhook::command("ticket", "x", None), "/tickets", "ticket"),
        (Webhook::command("giphy", "x", None), "/commands/giphy", "giphy"),
        // The query is not signed, so the name in it is ignored.
        (queried("another", "giphy"), "/commands/giphy", "giphy"),
    ] {
        let answer = ask(&server, &webhook).await;
        assert_eq!((&answer.body[..], answer.outcome()), (SPACED.as_bytes(), "answered"));
        let received: Received = service.received().pop().unwrap();
        assert_eq!(received.path, path);
        for (name, value) in [
            ("x-webhook-id", webhook.id()),
            ("x-api-key", API_KEY),
            ("x-signature", &sign(&received.body)),
            ("x-streamgate-type", kind),
            ("authorization", "Bearer of-the-service"),
            ("content-encoding", ""),
        ] {
            assert_eq!(received.header(name), value, "{name}");
        }
    }
    assert_eq!(service.received()[1].body, moderated.body, "inflated, as it was signed");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_without_a_proper_answer_is_a_failure() {
    let (site, gate) = (Site::new(), Gate::default());
    let closed = gate.clone();
    let service = Receiver::start(move |received| match received.header("x-webhook-id") {
        "refused" => json(403, "{}"),
        "redirected" => reply(302, &[("location", "/elsewhere")]),
        "empty" => json(200, ""),
        "html" => json(200, "<html>"),
        "array" => json(200, "[]"),
        "error" => json(200, r#"{"errorMessage":"words of the service","code":7}"#),
        "ok" => json(200, r#"{"ok":true}"#),
        "text" => json(200, r#"{"message":"Internal server error"}"#),
        "list" => json(200, r#"{"message":[]}"#),
        "bare" => json(200, "{}"),
        "silent" => {
            closed.wait();
            json(200, "{}")
        }
        _ => json(200, SPACED),
    })
    .await;
    let away = "[hooks.custom_commands]\nforward = { url = \"http://127.0.0.1:9/\" }\n";
    let forward = format!("forward = {{ url = \"{}\", timeout = \"200ms\" }}", service.url());
    let server = up(&site, format!("[hooks.before_message_send]\n{forward}\n{away}")).await;
    for id in ["refused", "redirected", "empty", "html", "array", "error", "ok", "text", "list", "bare", "silent"] {
        let answer = ask(&server, &Webhook::moderation(r#"{"text":"x"}"#).set("x-webhook-id", id)).await;
        assert_eq!((&answer.body[..], answer.outcome()), (&br#"{"message":{"text":"x"}}"#[..], "hook_failed"), "{id}");
    }
    assert_eq!(ask(&server, &Webhook::command("ticket", "x", None)).await.outcome(), "hook_failed");
    gate.open();
    assert_eq!(ask(&server, &Webhook::moderation("{}")).await.outcome(), "answered");
    for text in [
        "answered 403",
        "answered 302",
        "it is not JSON",
        "it is nothing",
        r#"it is {\"errorMessage\":string,\"code\":number}"#,
        r#"it is {\"message\":array}"#,
        "did not answer within 200ms",
        "cannot connect to the service at 127.0.0.1:9: connection refused",
    ] {
        site.logged(text).await;
    }
    assert!(server.terminate().await.success());
    for said in ["<html>", "words of the service", "Internal server error"] {
        assert!(!site.log().contains(said), "no text of a service is logged");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_and_replies_need_no_code() {
    let site = Site::new();
    let hooks = r#"
        [hooks.before_message_send]
        max_length = 30
        max_links = 1
        rules = [
            { pattern = "(?i)\\bspam\\b", action = "reject", text = "No spam." },
            { pattern = '\d{4}', action = "mask" },
        ]
        [hooks.custom_commands.commands.ticket]
        reply = "Ticket for {user}: {args}"
        [hooks.custom_commands.commands.news]
        reply = "{{{command}}}"
        reply_type = "regular"
    "#;
    let server = up(&site, hooks.into()).await;
    let moderated = async |text: &str| {
        let answer = ask(&server, &Webhook::moderation(&format!(r#"{{"text":"{text}","x":1.10}}"#))).await;
        assert_eq!(answer.outcome(), "answered");
        String::from_utf8(answer.body.to_vec()).unwrap()
    };
    assert_eq!(moderated("hello").await, r#"{"message":{"text":"hello","x":1.10}}"#);
    assert_eq!(moderated("card 1234").await, r#"{"message":{"text":"card ***","x":1.10}}"#);
    assert_eq!(moderated("SPAM 1234").await, r#"{"message":{"type":"error","text":"No spam."}}"#);
    assert!(moderated(&"x".repeat(31)).await.contains("too long"));
    assert!(moderated("http://a http://b").await.contains("too many links"));
    let commanded = async |name: &str| {
        let answer = ask(&server, &Webhook::command(name, "a {user} b", None)).await;
        serde_json::from_slice::<serde_json::Value>(&answer.body).unwrap()["message"].clone()
    };
    let ticket = commanded("ticket").await;
    assert_eq!((&ticket["type"], &ticket["text"]), (&"ephemeral".into(), &"Ticket for Ann: a {user} b".into()));
    assert_eq!(commanded("news").await["text"], "{news}");
    assert_eq!(ask(&server, &Webhook::command("other", "x", None)).await.outcome(), "unhandled");
    assert!(server.terminate().await.success());
}

/// Messages by which chat users try to get around a rule; each must be judged as it reads.
#[tokio::test(flavor = "multi_thread")]
async fn rules_judge_a_message_as_its_readers_see_it() {
    let site = Site::new();
    let service = Receiver::start(|_| json(200, SPACED)).await;
    let hooks = format!(
        "[hooks.before_message_send]\nmax_links = 0\nfailure_text = \"unreadable\"\nforward = {{ url = \"{}\" }}\n\
         rules = [{{ pattern = '(?i)\\bcasino\\b', action = \"reject\", text = \"No.\" }}]\n",
        service.url()
    );
    let server = up(&site, hooks.clone()).await;
    let judged = async |body: &[u8]| {
        let answer = ask(&server, &Webhook::moderation_of(body.to_vec())).await;
        assert_eq!(answer.outcome(), "answered");
        let answer: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        answer["message"]["text"].as_str().unwrap().to_owned()
    };
    let many: String = (0..5_000).map(|number| format!(",\"f{number}\":0")).collect();
    let table: [(&[u8], &str); 17] = [
        (r#"{"text":"a casino"}"#.as_bytes(), "No."),
        (r#"{"text":"casino \ud83d"}"#.as_bytes(), "No."),
        (b"{\"text\":\"casino \xff\"}", "No."),
        ("{\"text\":\"cas\u{200b}ino c\u{ad}asino\"}".as_bytes(), "No."),
        ("{\"text\":\"ｃａｓｉｎｏ\"}".as_bytes(), "No."),
        ("{\"text\":\"c\u{336}a\u{336}sino\"}".as_bytes(), "No."),
        ("{\"text\":\"cаsinо\"}".as_bytes(), "No."),
        (r#"{"text":"ca**si**no"}"#.as_bytes(), "No."),
        (r#"{"attachments":[{"title":"casino"}]}"#.as_bytes(), "No."),
        (r#"{"poll":{"name":"casino?"}}"#.as_bytes(), "No."),
        (r#"{"text":"x","own":["casino"]}"#.as_bytes(), "No."),
        (r#"{"text":"[win](evil.com)"}"#.as_bytes(), "Links are not allowed here."),
        (r#"{"text":"","attachments":[{"title_link":"https://evil.com"}]}"#.as_bytes(), "Links are not allowed here."),
        (r#"{"text":"","attachments":[{"image_url":"https://cdn.example.com/1"}]}"#.as_bytes(), "<by the service>"),
        ("{\"text\":\"Мы сидим в кафе, c'est la vie\"}".as_bytes(), "<by the service>"),
        (r#"{"text":"x","id":"casino","user":{"name":"casino"}}"#.as_bytes(), "<by the service>"),
        (b"7", "unreadable"),
    ];
    for (message, expected) in table {
        let body = [b"{\"message\":", message, b"}"].concat();
        assert_eq!(judged(&body).await, expected, "{}", String::from_utf8_lossy(message));
    }
    let crowded = format!("{{\"message\":{{\"text\":\"x\"{many}}}}}");
    for body in [crowded.as_bytes(), b"no JSON"] {
        assert_eq!(judged(body).await, "unreadable");
    }
    assert_eq!(service.received().len(), 3, "the service is not asked about what a rule rejects");
    assert!(server.terminate().await.success());

    // With `on_unreadable = "allow"` the service is asked about it all the same, with the bytes that Stream signed.
    let server = up(&site, hooks.replace("max_links = 0", "on_unreadable = \"allow\"\nfields = [\"text\"]")).await;
    let crowded = Webhook::moderation_of(crowded);
    assert_eq!(ask(&server, &crowded).await.body, SPACED.as_bytes());
    assert_eq!(service.received().pop().unwrap().body, crowded.body);
    let attached = Webhook::moderation(r#"{"attachments":[{"title":"casino"}]}"#);
    assert_eq!(ask(&server, &attached).await.body, SPACED.as_bytes(), "rules look at the text only");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn send_prints_the_answer_to_a_hook() {
    let site = Site::new();
    let hooks = "[hooks.before_message_send]\nmax_length = 5\n[hooks.custom_commands.commands.ticket]\nreply = \"Ticket: {args}\"\n";
    let server = up(&site, hooks.into()).await;
    let url = format!("http://{}", server.public);
    let printed = async |args: &[&str]| {
        let output = site.run(&[&["send", "--url", &url], args].concat()).await;
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let moderated = printed(&["--kind", "before-message-send"]).await;
    assert!(moderated.contains("200 answered") && moderated.contains("\"type\": \"error\""), "{moderated}");
    assert!(moderated.contains("rejected"), "{moderated}");
    let ticket = printed(&["--kind", "custom-command", "--type", "ticket"]).await;
    assert!(ticket.contains("ephemeral") && ticket.contains("Ticket: "), "{ticket}");
    let ticket: serde_json::Value =
        serde_json::from_str(&printed(&["--kind", "custom-command", "--json"]).await).unwrap();
    assert_eq!(
        (&ticket["outcomes"]["answered"], &ticket["answer"]["message"]["type"]),
        (&1.into(), &"ephemeral".into())
    );
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_in_hooks_are_reported_with_their_keys() {
    let site = Site::new();
    let hooks = r#"
        [hooks]
        colour = "red"
        [hooks.before_message_send]
        deadline = "6s"
        fields = ["text", "mood"]
        on_failure = "shrug"
        forward = { url = "http://127.0.0.1:1/{type}" }
        rules = [{ pattern = "(", action = "mask" }, { pattern = "x", action = "burn" }, { text = "x" }]
        [hooks.custom_commands.commands.both]
        reply = "x"
        forward = { url = "http://127.0.0.1:1/" }
        [hooks.custom_commands.commands.none]
        reply_type = "ephemeral"
        [hooks.custom_commands.commands.odd]
        reply = "{who}"
    "#;
    site.configure(&Setup { rest: hooks.into(), ..Setup::default() });
    let checked = site.run(&["check", "--json"]).await;
    assert_eq!(checked.status.code(), Some(64));
    let report: serde_json::Value = serde_json::from_slice(&checked.stdout).unwrap();
    let mut keys: Vec<_> = report["checks"].as_array().unwrap().iter().map(|it| it["what"].as_str().unwrap()).collect();
    keys.sort_unstable();
    let expected = [
        "hooks.before_message_send.deadline",
        "hooks.before_message_send.fields",
        "hooks.before_message_send.forward.url",
        "hooks.before_message_send.on_failure",
        "hooks.before_message_send.rules[1].pattern",
        "hooks.before_message_send.rules[2].action",
        "hooks.before_message_send.rules[3].action",
        "hooks.before_message_send.rules[3].pattern",
        "hooks.colour",
        "hooks.custom_commands.commands.both.forward",
        "hooks.custom_commands.commands.none.forward",
        "hooks.custom_commands.commands.none.reply_type",
        "hooks.custom_commands.commands.odd.reply",
    ];
    assert_eq!(keys, expected, "{report:#}");
    let mask = "[hooks.before_message_send]\nforward = { url = \"http://h/\" }\nrules = [{ pattern = \"x\", action = \"mask\" }]";
    site.configure(&Setup { rest: mask.into(), ..Setup::default() });
    let errors = String::from_utf8(site.run(&["check"]).await.stderr).unwrap();
    assert!(errors.contains("hooks.before_message_send.rules") && errors.contains("cannot be combined"), "{errors}");
}
