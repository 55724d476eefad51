//! Logs are best effort: whatever happens to stderr and stdout, events are taken.

use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::servers::free_port;
use crate::harness::wire::{Webhook, raw, read_to_end, send};
use futures_util::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::process::Stdio;
use tokio::process::Child;

const DROPPED: &str = "streamgate_log_lines_dropped_total";

/// Stops a process that is not a `Server`, since its stdout cannot be read.
async fn ends_in_order(mut child: Child) {
    let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert!(child.wait().await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unread_log_pipe_delays_no_event() {
    let site = Site::in_memory();
    site.configure(&Setup::default());
    let mut command = site.command(&["up"]);
    command.env("STREAMGATE_LOG", "trace");
    let server = Server::with_log(command, Stdio::piped(), &site).await;
    // More lines than the pipe and the queue hold.
    eventually("lines are dropped", || async {
        let sent = (0..100).map(async |_| send(server.public, &Webhook::fresh()).await.unwrap().status);
        assert!(join_all(sent).await.into_iter().all(|status| status == 200));
        server.metric(DROPPED).await > 0.0
    })
    .await;
    assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    assert_eq!((server.ops("/healthz").await.0, server.ops("/readyz").await.0), (200, 200));
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_device_for_stdout_and_stderr_stops_neither_a_start_nor_a_service() {
    let site = Site::new();
    let [public, ops] = [free_port(), free_port()].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    site.configure(&Setup { listen: public, ops, ..Setup::default() });
    let full = || Stdio::from(OpenOptions::new().write(true).open("/dev/full").unwrap());
    let mut command = site.command(&["up"]);
    let mut child = command.env("STREAMGATE_LOG", "debug").stdout(full()).stderr(full()).spawn().unwrap();
    eventually("the server takes events", || async {
        send(public, &Webhook::fresh()).await.is_ok_and(|answer| answer.outcome() == "enqueued")
    })
    .await;
    assert!(child.try_wait().unwrap().is_none(), "the server goes on");
    let metrics = read_to_end(raw(ops, b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await).await;
    let dropped = metrics.lines().find_map(|line| line.strip_prefix(DROPPED)?.trim().parse::<f64>().ok());
    assert!(dropped.unwrap() > 0.0, "{metrics}");
    ends_in_order(child).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_filter_that_would_mute_everything_is_an_error_of_usage() {
    let site = Site::new();
    site.configure(&Setup::default());
    for filter in ["verbose", "warning", ""] {
        let mut command = site.command(&["check"]);
        let refused = command.env("STREAMGATE_LOG", filter).output().await.unwrap();
        let text = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(64), "{filter}: {text}");
        assert!(text.contains("STREAMGATE_LOG") && text.contains("expected off, error, warn"), "{filter}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pipe_for_stdout_and_stderr_delays_neither_the_start_nor_events() {
    let site = Site::new();
    let [public, ops] = [free_port(), free_port()].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    site.configure(&Setup { listen: public, ops, ..Setup::default() });
    let (unread, full) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&full, true).unwrap();
    while std::io::Write::write(&mut &full, &[b' '; 512]).is_ok() {}
    rustix::io::ioctl_fionbio(&full, false).unwrap();
    let mut command = site.command(&["up"]);
    let child = command.stdout(full.try_clone().unwrap()).stderr(full).spawn().unwrap();
    eventually("the server takes events", || async {
        send(public, &Webhook::fresh()).await.is_ok_and(|answer| answer.outcome() == "enqueued")
    })
    .await;
    ends_in_order(child).await;
    drop(unread);
}
