//! A route's own settings: the events that it takes, their handler, its retry ladder and its timeout.

use crate::commands::text;
use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::receiver::{Receiver, reply};
use crate::harness::servers::Backends;
use crate::harness::wire::{SECRET, Webhook, send};
use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};

/// An executable file of the site.
fn script(site: &Site, name: &str, text: &str) -> String {
    let path = site.write(name, format!("#!/bin/sh\n{text}"));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

async fn outcomes(server: &Server, route: &str, outcome: &str) -> f64 {
    server.metric(&format!("streamgate_worker_deliveries_total{{outcome=\"{outcome}\",route=\"{route}\"}}")).await
}

async fn push(server: &Server, id: &str, body: &str) {
    assert_eq!(send(server.public, &Webhook::push(id, body.to_owned())).await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_gets_the_event_and_its_exit_code_decides() {
    let site = Site::new();
    let directory = site.path("seen");
    std::fs::create_dir(&directory).unwrap();
    // Renamed when it is complete, so that a file under its final name is whole.
    let handle = format!(
        "cd {}\n{{ env; echo; cat; }} > \"$STREAMGATE_ID.part\"\nmv \"$STREAMGATE_ID.part\" \"$STREAMGATE_ID\"\n\
         echo lots of output\nyes | head -c 300000\nexit $1\n",
        directory.display()
    );
    let command = script(&site, "handle", &handle);
    let route = |name: &str, event: &str, code: u8| {
        format!(
            "[[worker.routes]]\nname = \"{name}\"\nevents = [\"{event}\"]\nexec = {{ command = [\"{command}\", \"{code}\"] }}\n"
        )
    };
    let rest =
        [route("done", "message.new", 0), route("later", "message.updated", 75), route("never", "*", 3)].concat();
    site.configure(&Setup { worker: "retry = [\"1h\"]".into(), rest, ..Setup::default() });
    let mut command = site.command(&["up"]);
    command.env("PATH", "/usr/bin:/bin").env("STREAMGATE_LOG", "trace").env("DATABASE_PASSWORD", "geheim");
    let server = Server::of(command, &site).await;
    let body = r#"{"type":"message.new","cid":"messaging:x","html":"\u003cb\u003e"}"#;
    push(&server, "one", body).await;
    push(&server, "two", r#"{"type":"message.updated"}"#).await;
    push(&server, "three", r#"{"type":"reaction.new"}"#).await;
    for (route, outcome) in [("done", "done"), ("later", "retry"), ("never", "dead")] {
        eventually(outcome, || async { outcomes(&server, route, outcome).await == 1.0 }).await;
    }
    let seen = std::fs::read_to_string(directory.join("one")).unwrap();
    let (environment, got) = seen.split_once("\n\n").unwrap();
    assert_eq!(got, body, "byte for byte");
    let environment: HashSet<&str> = environment.lines().collect();
    for expected in
        ["STREAMGATE_TYPE=message.new", "STREAMGATE_ID=one", "STREAMGATE_ATTEMPT=1", "STREAMGATE_CID=messaging:x"]
    {
        assert!(environment.contains(expected), "{expected} in {environment:?}");
    }
    assert!(environment.iter().any(|line| line.starts_with("STREAMGATE_KEY=chat:push:")), "{environment:?}");
    assert!(environment.iter().any(|line| line.starts_with("PATH=")), "{environment:?}");
    assert!(!seen.contains("geheim") && !seen.contains(SECRET) && !seen.contains("STREAMGATE_CONFIG"), "{seen}");
    let dead = text(&site.run(&["dead", "list", "--json"]).await.stdout);
    assert!(dead.contains("rejected") && dead.contains("exit code 3"), "{dead}");
    site.logged("\"stdout_bytes\":").await;
    assert!(server.terminate().await.success());
    assert!(
        !site.log().contains("lots of output"),
        "a command's output may hold what chat users wrote: {}",
        site.log()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_hangs_is_killed_with_all_that_it_started() {
    let site = Site::new();
    let pids = site.path("pids");
    // The command, and the process that it starts, ignore every signal that can be ignored.
    let hang =
        format!("trap '' TERM HUP INT\nsleep 1000 &\necho $$ $! > {0}.part\nmv {0}.part {0}\nwait\n", pids.display());
    let command = script(&site, "hang", &hang);
    let rest = format!(
        "[[worker.routes]]\nname = \"app\"\nevents = [\"*\"]\nexec = {{ command = [\"{command}\"], timeout = \"6s\" }}\n\
         [[worker.routes]]\nname = \"absent\"\nevents = [\"nothing.*\"]\nexec = {{ command = [\"./absent\"] }}\n"
    );
    let worker = "retry = [\"1h\"]\ndrain_timeout = \"300ms\"".into();
    site.configure(&Setup { worker, rest, ..Setup::default() });
    let server = site.start().await;
    let running = async || {
        eventually("the command runs", || async { pids.exists() }).await;
        let found = std::fs::read_to_string(&pids).unwrap();
        std::fs::remove_file(&pids).unwrap();
        found
    };
    push(&server, "one", r#"{"type":"message.new"}"#).await;
    let first = running().await;
    eventually("the command was killed", || async { outcomes(&server, "app", "retry").await == 1.0 }).await;
    site.logged("did not end within 6s").await;
    // A zombie counts as dead, even if it is never reaped.
    let lives = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !stat.is_empty() && !stat.rsplit(") ").next().unwrap().starts_with('Z')
    };
    let gone = async |pids: &str| {
        for pid in pids.split_whitespace() {
            eventually("no process of the group is left", || async { !lives(pid) }).await;
        }
    };
    gone(&first).await;
    let checked = text(&site.run(&["check", "--offline"]).await.stdout);
    assert!(checked.contains("worker.routes[1].exec") && checked.contains(&format!("runs {command}")), "{checked}");
    assert!(checked.contains("./absent is not an executable file"), "{checked}");
    push(&server, "two", r#"{"type":"message.updated"}"#).await;
    let second = running().await;
    assert!(server.terminate().await.success());
    gone(&second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_can_be_for_some_types_of_channels() {
    let (site, support, others) = (Site::new(), Receiver::willing().await, Receiver::willing().await);
    let rest = format!(
        "[[worker.routes]]\nname = \"support\"\nevents = [\"*\"]\nchannel_types = [\"support\", \"sales\"]\nforward = {{ url = \"{}\" }}\n\
         [[worker.routes]]\nname = \"others\"\nevents = [\"*\"]\nforward = {{ url = \"{}\" }}\n",
        support.url(),
        others.url()
    );
    site.configure(&Setup { rest, ..Setup::default() });
    let server = site.start().await;
    for (id, cid) in
        [("a", "support:1"), ("b", "sales:support"), ("c", "messaging:support"), ("d", "support"), ("e", "")]
    {
        push(&server, id, &format!(r#"{{"type":"message.new","cid":"{cid}","n":"{id}"}}"#)).await;
    }
    push(&server, "f", r#"{"type":"user.updated"}"#).await;
    let set = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<HashSet<_>>();
    eventually("all events arrived", || async { support.ids().len() + others.ids().len() == 6 }).await;
    assert_eq!((support.ids(), others.ids()), (set(&["a", "b"]), set(&["c", "d", "e", "f"])));
    assert!(server.terminate().await.success());
}

/// One route uses the worker's ladder, an hour, and another its own; over both stores.
#[tokio::test(flavor = "multi_thread")]
async fn a_route_has_its_own_ladder_and_its_own_time() {
    for services in [false, true] {
        let site = Site::new();
        let tries = AtomicUsize::new(0);
        let fails_once = Receiver::start(move |request| {
            let first = request.path.ends_with("quick") && tries.fetch_add(1, Ordering::SeqCst) == 0;
            reply(if first || request.path.ends_with("slow") { 503 } else { 200 }, &[])
        })
        .await;
        let (hangs, gate) = Receiver::gated().await;
        let base = format!("http://{}", fails_once.address);
        let routes = format!(
            "[[worker.routes]]\nname = \"quick\"\nevents = [\"message.new\"]\nretry = [\"150ms\", \"2h\"]\nforward = {{ url = \"{base}/quick\" }}\n\
             [[worker.routes]]\nname = \"slow\"\nevents = [\"message.updated\"]\nforward = {{ url = \"{base}/slow\" }}\n\
             [[worker.routes]]\nname = \"never\"\nevents = [\"message.read\"]\nretry = []\nforward = {{ url = \"{base}/slow\" }}\n\
             [[worker.routes]]\nname = \"hangs\"\nevents = [\"*\"]\nretry = []\nhandler_timeout = \"300ms\"\nforward = {{ url = \"{}\" }}\n",
            hangs.url()
        );
        let backends = if services { Some(Backends::shared().await) } else { None };
        let tables = backends.as_ref().map(|backends| backends.tables(&site.name())).unwrap_or_default();
        site.configure(&Setup { worker: "retry = [\"1h\"]".into(), rest: routes + &tables, ..Setup::default() });
        let (gateway, worker) = match services {
            true => (site.start_as("gateway").await.ready().await, Some(site.start_as("worker").await.ready().await)),
            false => (site.start().await, None),
        };
        let handles = worker.as_ref().unwrap_or(&gateway);
        for (id, event) in
            [("a", "message.new"), ("b", "message.updated"), ("c", "message.read"), ("d", "user.updated")]
        {
            push(&gateway, id, &format!(r#"{{"type":"{event}"}}"#)).await;
        }
        for (route, outcome) in
            [("quick", "retry"), ("quick", "done"), ("slow", "retry"), ("never", "dead"), ("hangs", "dead")]
        {
            eventually(&format!("{route} {outcome}"), || async { outcomes(handles, route, outcome).await == 1.0 })
                .await;
        }
        let dead = text(&site.run(&["dead", "list", "--json"]).await.stdout);
        assert!(dead.contains("did not end within 300ms") && dead.contains("the service answered 503"), "{dead}");
        gate.open();
        for server in worker.into_iter().chain([gateway]) {
            assert!(server.terminate().await.success());
        }
    }
}
