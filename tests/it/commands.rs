//! The command line, as a person or a script uses it.

use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site, bare_command};
use crate::harness::receiver::{Receiver, reply};
use crate::harness::wire::{SECRET, Webhook, send};
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("no JSON: {output:?}"))
}

/// `streamgate` without a config file, in a directory of its own.
async fn bare(site: &Site, args: &[&str]) -> Server {
    let mut command = bare_command(args);
    command.current_dir(site.path("."));
    command.env("STREAMGATE__GATEWAY__LISTEN", "127.0.0.1:0").env("STREAMGATE__GATEWAY__OPS_LISTEN", "127.0.0.1:0");
    Server::of(command, site).await
}

pub fn pasted(server: &Server) -> String {
    server.greeting.lines().find(|line| line.contains(" send ")).unwrap().trim().to_owned()
}

pub async fn shell(command: &str) -> Output {
    let mut shell = tokio::process::Command::new("sh");
    shell.args(["-c", command]).current_dir("/").env_clear().output().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_event_goes_through_without_any_config() {
    let site = Site::new();
    let server = bare(&site, &[]).await;
    let sent = shell(&pasted(&server)).await;
    assert!(sent.status.success() && text(&sent.stdout).starts_with("200 enqueued in "), "{sent:?}");
    eventually("the event is logged", || async { site.log().contains("\"type\":\"message.new\"") }).await;
    let secret_file = site.path("streamgate-data/dev-secret");
    let secret = std::fs::read_to_string(&secret_file).unwrap();
    assert_eq!(secret_file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(site.path("streamgate-data").metadata().unwrap().permissions().mode() & 0o777, 0o700);
    assert!(!server.greeting.contains(secret.trim()) && !site.log().contains(secret.trim()));
    assert!(server.terminate().await.success());
    // The secret is kept, and the bare command is `up`.
    let server = bare(&site, &["up"]).await;
    assert!(shell(&pasted(&server)).await.status.success());
    assert_eq!(std::fs::read_to_string(&secret_file).unwrap(), secret);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn check_reports_all_mistakes_in_one_run() {
    let site = Site::new();
    site.write(
        "streamgate.toml",
        "[gateway]\nlisten = 'here'\nbody_timeout = '9'\n[worker]\nretries = 3\n[[apps]]\nname = 'a b'\n",
    );
    let checked = site.run(&["check"]).await;
    assert_eq!(checked.status.code(), Some(64));
    let errors = text(&checked.stderr);
    for key in ["gateway.listen", "gateway.body_timeout", "worker.retries", "apps[1].name", "apps[1].keys"] {
        assert!(errors.contains(&format!(": {key}: ")), "{key} in {errors}");
    }
    let checked = site.run(&["check", "--json"]).await;
    assert_eq!((checked.status.code(), json(&checked)["ok"].as_bool()), (Some(64), Some(false)));
    assert_eq!(json(&checked)["checks"].as_array().unwrap().len(), 5);
    assert_eq!(json(&checked)["checks"][2]["line"], 2, "{checked:?}");
    site.write("streamgate.toml", "[gateway]\nlisten = 'here'\nanswer_deadline = '1s'\n");
    let found = json(&site.run(&["check", "--json"]).await)["checks"].clone();
    let verdicts: Vec<_> = found.as_array().unwrap().iter().map(|check| (&check["ok"], &check["warning"])).collect();
    assert!(
        verdicts.len() >= 2 && verdicts[1..].iter().all(|(ok, warning)| **ok == true && **warning == true),
        "warnings in addition to the mistake: {found}"
    );
    assert!(text(&site.run(&["check"]).await.stderr).contains("over gateway.answer_deadline"));
    site.write("streamgate.toml", "[gateway]\nlisten = '127.0.0.1:0'\n");
    assert!(text(&site.run(&["check"]).await.stdout).contains("gateway.listen: has port 0"));
    for (wrong, text) in [("no file", None), ("no TOML", Some("[gateway"))] {
        match text {
            Some(text) => drop(site.write("streamgate.toml", text)),
            None => std::fs::remove_file(site.config()).unwrap(),
        }
        let checked = site.run(&["check", "--json"]).await;
        assert_eq!((checked.status.code(), json(&checked)["ok"].as_bool()), (Some(64), Some(false)), "{wrong}");
    }
    site.configure(&Setup { rest: "[gateway.tls]\ncert = \"/no/cert\"\nkey = \"/no/key\"".into(), ..Setup::default() });
    let checked = site.run(&["check"]).await;
    assert_eq!(checked.status.code(), Some(1));
    assert!(text(&checked.stdout).contains("FAIL  gateway.tls: cannot read /no/cert"), "{checked:?}");
    site.configure(&Setup::default());
    let server = site.start().await;
    let checked = site.run(&["check", "--json"]).await;
    assert!(checked.status.success() && text(&checked.stdout).contains("holds a store of this version"), "{checked:?}");
    assert!(server.terminate().await.success());
    assert!(site.run(&["check"]).await.status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_at_the_start_say_what_to_do() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    let second = site.run(&["up"]).await;
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stderr).contains("another streamgate process uses the data directory"), "{second:?}");
    let other = Site::new();
    other.configure(&Setup { listen: server.public, ..Setup::default() });
    let taken = other.run(&["up"]).await;
    assert!(text(&taken.stderr).contains("set gateway.listen (or STREAMGATE__GATEWAY__LISTEN)"), "{taken:?}");
    assert!(server.terminate().await.success());
    let file = site.write("a-file", "");
    let no_dir =
        bare_command(&["--data-dir", file.to_str().unwrap()]).current_dir(site.path(".")).output().await.unwrap();
    assert!(no_dir.status.code() == Some(1) && text(&no_dir.stderr).contains("a-file"), "{no_dir:?}");
    let no_store = bare_command(&["dead", "list", "--data-dir", "/nowhere"]).output().await.unwrap();
    assert!(text(&no_store.stderr).contains("there is no store in /nowhere"), "{no_store:?}");
    let no_secret = bare_command(&["send", "--data-dir", "/nowhere"]).output().await.unwrap();
    assert_eq!(no_secret.status.code(), Some(64));
    assert!(text(&no_secret.stderr).contains("STREAM_API_SECRET"), "{no_secret:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_outcome_of_a_command_has_its_exit_code() {
    for (args, code) in [
        (&["--help"][..], 0),
        (&["--version"], 0),
        (&["help", "send"], 0),
        (&["--no-such-flag"], 64),
        (&["no-such-command"], 64),
        (&["send", "--count", "0"], 64),
        (&["send", "--rate", "0"], 64),
        (&["send", "--url", "http://user:password@127.0.0.1"], 64),
        (&["check", "--data-dir", "/dev/null/x"], 1),
        (&["check", "--config", "/no/such/file"], 64),
    ] {
        let output = bare_command(args).output().await.unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
        assert!(!(output.stdout.is_empty() && output.stderr.is_empty()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_and_no_message_shows_anywhere() {
    const MESSAGE: &str = "a-very-private-message";
    const TOKEN: &str = "a-very-private-token";
    let site = Site::new();
    let service = Receiver::start(|_| reply(422, &[])).await;
    let route = format!(
        "[[worker.routes]]\nevents = [\"message.*\"]\nforward = {{ url = \"{}\", headers = {{ Authorization = \"{TOKEN}\" }} }}",
        service.url()
    );
    site.configure(&Setup { rest: route, ..Setup::default() });
    let mut command = site.command(&["up"]);
    command.env("STREAMGATE_LOG", "trace");
    let server = Server::of(command, &site).await;
    let body = format!("{{\"type\":\"message.new\",\"cid\":\"messaging:x\",\"text\":\"{MESSAGE}\"}}");
    let webhook = Webhook::push("private", body);
    assert_eq!(send(server.public, &webhook).await.unwrap().status, 200);
    assert_eq!(send(server.public, &webhook.clone().set("x-signature", &"0".repeat(64))).await.unwrap().status, 401);
    eventually("the event is dead", || async { text(&site.run(&["dead", "list"]).await.stdout).contains("rejected") })
        .await;
    let metrics = server.ops("/metrics").await.1;
    assert!(!metrics.contains("messaging:x") && !metrics.contains("\"private\""), "no ids in metrics");
    let greeting = server.greeting.clone();
    assert!(server.terminate().await.success());
    let mut said = vec![greeting, metrics, site.log()];
    for args in [&["check"][..], &["check", "--json"], &["dead", "list", "--json"], &["dead", "show", "private"]] {
        let output = site.run(args).await;
        said.extend([text(&output.stdout), text(&output.stderr)]);
    }
    for words in said {
        for secret in [SECRET, TOKEN, MESSAGE] {
            let place = words.find(secret).map(|at| &words[at.saturating_sub(200)..at + 20]);
            assert_eq!(place, None, "{secret} shows");
        }
    }
}
