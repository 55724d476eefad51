//! `streamgate dead`: how dead letters are shown, replayed and dropped.

use crate::commands::{json, text};
use crate::harness::eventually;
use crate::harness::process::{Setup, Site, binary};
use crate::harness::receiver::{Receiver, reply};
use crate::harness::terminal::on_a_terminal;
use crate::harness::wire::{Webhook, send};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// Runs a command on a terminal, and answers its question before all dead letters are changed.
async fn typed(site: &Site, args: &str, answer: &str) -> (Option<i32>, String) {
    let line = format!("exec {} {args} --config {}", binary(), site.config().display());
    on_a_terminal(&line, "[y/N]", answer).await
}

/// An `up` whose service fails, with `count` dead letters of two types.
async fn with_dead_letters(site: &Site, count: usize) -> crate::harness::process::Server {
    let service = Receiver::start(|_| reply(503, &[])).await;
    let worker = "retry = [\"10ms\", \"20ms\"]".to_owned();
    let rest = service.route().replace("forward", "breaker = false\nforward");
    site.configure(&Setup { rest, worker, ..Setup::default() });
    let server = site.start().await;
    for number in 0..count {
        let kind =
            if number % 2 == 0 { "message.new" } else { "a.type.that.is.longer.than.any.table.of.eighty.columns" };
        let webhook = Webhook::push(&format!("id-{number}"), format!("{{\"type\":\"{kind}\",\"number\":{number}}}"));
        assert_eq!(send(server.public, &webhook).await.unwrap().status, 200);
    }
    let dead = || async { json(&site.run(&["dead", "list", "--json"]).await).as_array().unwrap().len() == count };
    eventually("all events are dead", dead).await;
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_show_shows_every_attempt() {
    let site = Site::new();
    let server = with_dead_letters(&site, 1).await;
    let shown = json(&site.run(&["dead", "show", "id-0", "--json"]).await);
    let history = shown["history"].as_array().unwrap();
    assert_eq!((&shown["attempts"], history.len()), (&3.into(), 3), "{shown}");
    for (place, attempt) in history.iter().enumerate() {
        assert_eq!(attempt["attempt"], place + 1);
        assert!(attempt["at"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok(), "{attempt}");
        assert!(attempt["ms"].is_u64() && attempt["error"].as_str().unwrap().contains("503"), "{attempt}");
    }
    let printed = text(&site.run(&["dead", "show", "id-0"]).await.stdout);
    assert_eq!(
        printed.lines().filter(|line| line.starts_with("attempt ") && line.contains("503")).count(),
        3,
        "{printed}"
    );
    let causes = json(&site.run(&["dead", "list", "--group", "--json"]).await);
    assert_eq!((&causes[0]["count"], &causes[0]["reason"]), (&1.into(), &"retries_exhausted".into()));
    assert!(
        causes[0]["error"].as_str().unwrap().contains("503") && causes[0]["first"] == causes[0]["last"],
        "{causes}"
    );
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_output_of_dead_fits_80_columns() {
    let site = Site::new();
    let server = with_dead_letters(&site, 4).await;
    let columns = |shown: &str| shown.lines().map(|line| line.trim_end().chars().count()).max().unwrap();
    let listed = text(&site.run(&["dead", "list"]).await.stdout);
    assert!(columns(&listed) <= 80 && listed.lines().count() == 5, "{listed}");
    for column in ["NUMBER", "DIED", "REASON", "ATTEMPTS", "ROUTE", "TYPE", "ERROR"] {
        assert!(listed.lines().next().unwrap().contains(column), "{listed}");
    }
    let grouped = text(&site.run(&["dead", "list", "--group"]).await.stdout);
    assert!(columns(&grouped) <= 80, "{grouped}");
    let mut wide = site.command(&["dead", "list"]);
    let wide = text(&wide.env("COLUMNS", "300").output().await.unwrap().stdout);
    assert!(wide.contains("eighty.c") && wide.contains("id-3") && wide.contains("retries_exhausted"), "{wide}");
    // The progress bar is redrawn in place: each drawing counts as a line.
    let replayed = typed(&site, "dead replay --all --rate 20 --yes", "").await;
    let drawn =
        replayed.1.split(['\r', '\n']).map(without_escapes).find(|drawing| drawing.contains("dead letters,")).unwrap();
    assert!(drawn.chars().count() <= 80, "{drawn}");
    assert!(server.terminate().await.success());
}

fn without_escapes(drawing: &str) -> String {
    let mut plain = String::new();
    let mut rest = drawing;
    while let Some((before, escape)) = rest.split_once('\u{1b}') {
        plain.push_str(before);
        rest = escape.trim_start_matches(|part: char| !part.is_ascii_alphabetic()).get(1..).unwrap_or_default();
    }
    plain + rest
}

#[tokio::test(flavor = "multi_thread")]
async fn all_dead_letters_are_changed_only_after_a_yes_and_at_the_rate() {
    let site = Site::new();
    let server = with_dead_letters(&site, 6).await;
    let counted = || async { json(&site.run(&["dead", "list", "--json"]).await).as_array().unwrap().len() };
    // The answers: no, an empty line, the end of the input, and an interrupt.
    for answer in ["n\n", "\n", "\u{4}", "\u{3}"] {
        let refused = typed(&site, "dead drop --all", answer).await;
        assert!(refused.0 == Some(1) && refused.1.contains("nothing was changed"), "{answer:?}: {refused:?}");
        assert_eq!(refused.1.contains("draining"), answer == "\u{3}", "an interrupt ends the question: {refused:?}");
        assert_eq!(counted().await, 6);
    }
    let began = Instant::now();
    let dropped = typed(&site, "dead drop --all --rate 10 --why 'they are of a test'", "y\n").await;
    assert!(dropped.0 == Some(0) && dropped.1.contains("they are of a test"), "{dropped:?}");
    assert!(began.elapsed() >= Duration::from_millis(500), "the sixth is due half a second after the first");
    assert_eq!(counted().await, 0);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_can_be_listed_shown_replayed_and_dropped_while_up_runs() {
    let site = Site::new();
    let answer = Arc::new(AtomicU16::new(422));
    let status = Arc::clone(&answer);
    let service = Receiver::start(move |_| reply(status.load(Ordering::SeqCst), &[])).await;
    site.configure(&Setup { rest: service.route(), ..Setup::default() });
    let server = site.start().await;
    for (id, user) in [("one", "ann"), ("two", "bob"), ("three", "ann")] {
        let body = format!("{{\"type\":\"message.new\",\"user\":{{\"id\":\"{user}\"}},\"id\":\"{id}\"}}");
        assert_eq!(send(server.public, &Webhook::push(id, body)).await.unwrap().status, 200);
        let count = || async {
            json(&site.run(&["dead", "list", "--json"]).await)
                .as_array()
                .unwrap()
                .iter()
                .any(|dead_letter| dead_letter["id"] == id)
        };
        eventually("the event is dead", count).await;
    }
    let listed = text(&site.run(&["dead", "list"]).await.stdout);
    assert!(listed.starts_with("NUMBER") && listed.lines().count() == 4, "{listed}");
    assert_eq!(json(&site.run(&["dead", "list", "--user", "ann", "--json"]).await).as_array().unwrap().len(), 2);
    assert_eq!(json(&site.run(&["dead", "list", "--older-than", "1h", "--json"]).await).as_array().unwrap().len(), 0);
    let shown = site.run(&["dead", "show", "two"]).await;
    assert!(text(&shown.stdout).contains("rejected") && !text(&shown.stdout).contains("bob"), "{shown:?}");
    let body = site.run(&["dead", "show", "two", "--body"]).await;
    assert!(
        text(&body.stdout).contains("\"id\":\"bob\"") && text(&body.stderr).contains("showed the body"),
        "{body:?}"
    );
    for (args, code) in [
        (&["dead", "replay"][..], 64),
        (&["dead", "drop"], 64),
        (&["dead", "drop", "--all", "--user", "ann"], 64),
        (&["dead", "replay", "nobody"], 1),
        (&["dead", "drop", "one", "nobody"], 1),
        (&["dead", "show", "nobody"], 1),
        (&["dead", "list", "--reason", "fate"], 64),
        (&["dead", "drop", "--since", "1h", "--until", "2h"], 64),
    ] {
        let refused = site.run(args).await;
        assert_eq!(refused.status.code(), Some(code), "{args:?}: {refused:?}");
        assert!(!refused.stderr.is_empty());
    }
    for (select, count) in [
        (&["--app", "chat"][..], 3),
        (&["--app", "another"], 0),
        (&["--attempts", "1"], 3),
        (&["--attempts", "2"], 0),
        (&["--since", "1h"], 3),
        (&["--until", "1h"], 0),
        (&["--since", "2026-01-01", "--until", "2126-01-01T00:00:00Z", "--user", "bob"], 1),
    ] {
        let found = json(&site.run(&[&["dead", "list", "--json"], select].concat()).await);
        assert_eq!(found.as_array().unwrap().len(), count, "{select:?}: {found}");
        let would = site.run(&[&["dead", "drop", "--dry-run", "--json"], select].concat()).await;
        assert_eq!(json(&would), serde_json::json!({"dropped": 0, "selected": count}));
    }
    answer.store(200, Ordering::SeqCst);
    assert_eq!(
        json(&site.run(&["dead", "replay", "--user", "ann", "--why", "it takes them now", "--json"]).await)["replayed"],
        2
    );
    eventually("the replayed events are handled", || async { service.received().len() == 5 }).await;
    assert_eq!(text(&site.run(&["dead", "drop", "--all"]).await.stdout), "1 dropped\n");
    assert_eq!(text(&site.run(&["dead", "list"]).await.stdout), "no dead letters\n");
    assert!(server.terminate().await.success());
    assert!(site.run(&["dead", "list"]).await.status.success(), "`dead list` works without a running server, too");
}
