//! Erased events are gone from the disk, and the data directory is its owner's alone.

use crate::harness::process::{Setup, Site};
use crate::harness::receiver::{Receiver, reply};
use crate::harness::wire::{Webhook, raw, send};
use crate::harness::{PATIENCE, eventually};
use std::os::unix::fs::{PermissionsExt, symlink};
use tokio::net::TcpStream;

/// How often this text occurs in the files of a data directory.
fn occurrences(site: &Site, text: &str) -> usize {
    let files = std::fs::read_dir(site.data_dir()).unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap());
    files.map(|bytes| bytes.windows(text.len()).filter(|window| *window == text.as_bytes()).count()).sum()
}

fn event(number: usize, place: &str, text: &str) -> Webhook {
    let body = format!(r#"{{"type":"message.new",{place},"message":{{"text":"{text}-{number}"}}}}"#);
    Webhook::push(&format!("{text}-{number}"), body)
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_dead_letters_are_erased_from_every_file() {
    let site = Site::new();
    let service = Receiver::start(|_| reply(422, &[])).await;
    site.configure(&Setup { rest: service.route(), ..Setup::default() });
    let server = site.start().await;
    // Events with ann in each place where Stream puts a user, and events of another user.
    let places = [
        r#""user":{"id":"ann"}"#,
        r#""members":[{"user":{"id":"bob"}},{"user_id":"ann"}]"#,
        r#""reaction":{"user_id":"ann"}"#,
        r#""target_user":{"id":"ann"}"#,
        r#""user":{"id":"ann"},"user":{"id":"bob"}"#,
    ];
    for (number, place) in places.iter().enumerate() {
        send(server.public, &event(number, place, "of-ann")).await.unwrap();
        send(server.public, &event(number, r#""user":{"id":"bob"}"#, "of-bob")).await.unwrap();
    }
    let count = async || {
        let listed = site.run(&["dead", "list", "--json"]).await;
        serde_json::from_slice::<serde_json::Value>(&listed.stdout).unwrap().as_array().unwrap().len()
    };
    eventually("all are dead letters", || async { count().await == 10 }).await;
    let dropped = site.run(&["dead", "drop", "--user", "ann", "--json"]).await;
    assert_eq!(String::from_utf8_lossy(&dropped.stdout), "{\"dropped\":5}\n");
    assert_eq!(count().await, 5);
    assert_eq!(occurrences(&site, "of-ann"), 0, "erased while the server runs");
    assert!(server.terminate().await.success());
    assert_eq!(occurrences(&site, "of-ann"), 0);
    assert!(occurrences(&site, "of-bob") > 0, "this test can fail");
    assert!(site.run(&["dead", "drop", "--all"]).await.status.success());
    assert_eq!(occurrences(&site, "of-bob"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn handled_events_are_gone_after_a_stop() {
    let site = Site::new();
    let service = Receiver::willing().await;
    site.configure(&Setup { rest: service.route(), ..Setup::default() });
    let server = site.start().await;
    for number in 0..50 {
        send(server.public, &event(number, r#""user":{"id":"ann"}"#, "handled-text")).await.unwrap();
    }
    eventually("all are handled", || async { service.received().len() == 50 }).await;
    assert!(server.terminate().await.success());
    assert_eq!(occurrences(&site, "handled-text"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_in_the_data_directory_is_not_followed() {
    for name in ["owner.lock", "streamgate.db", "dev-secret"] {
        let site = Site::new();
        let free = "listen = \"127.0.0.1:0\"\nops_listen = \"127.0.0.1:0\"";
        let data_dir = site.data_dir();
        site.write("streamgate.toml", format!("[gateway]\n{free}\n[store]\ndata_dir = \"{}\"\n", data_dir.display()));
        std::fs::create_dir(site.data_dir()).unwrap();
        std::fs::set_permissions(site.data_dir(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let elsewhere = site.write("elsewhere", "somebody's secret");
        symlink(&elsewhere, site.data_dir().join(name)).unwrap();
        // A server that followed the link would serve and never end.
        let ended = tokio::time::timeout(PATIENCE, site.run(&["up"])).await.expect("an error at the start");
        let errors = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!ended.status.success() && errors.contains("data"), "{name}: {errors}");
        assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), "somebody's secret", "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn root_uses_a_data_directory_of_another_user_and_logs_it() {
    if !rustix::process::geteuid().is_root() {
        // Only root can give a directory away; a unit test of the store covers who is refused.
        return;
    }
    let site = Site::new();
    site.configure(&Setup::default());
    std::fs::create_dir(site.data_dir()).unwrap();
    std::os::unix::fs::chown(site.data_dir(), Some(12_345), None).unwrap();
    assert!(site.start().await.terminate().await.success());
    site.logged("another user owns the data directory").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_to_the_ops_port_hold_up_no_probe() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(server.ops).await.unwrap());
    }
    // Half a head counts as silent, too.
    for _ in 0..100 {
        silent.push(raw(server.ops, b"GET /healthz HTTP/1.1\r\n").await);
    }
    let asked = tokio::time::timeout(std::time::Duration::from_secs(20), server.ops("/healthz")).await;
    assert_eq!(asked.expect("an answer before the silent connections time out").0, 200);
    drop(silent);
    assert!(server.terminate().await.success());
}
