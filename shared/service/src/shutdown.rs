//! Signals: the first SIGTERM or SIGINT drains, the second aborts; SIGHUP reloads.

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Handed to everything that must stop in order. Not static: two servers in one test stop separately.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Stop taking new work, finish what is in hand.
    pub drain: CancellationToken,
    /// Stop now.
    pub abort: CancellationToken,
}

impl Shutdown {
    pub fn new() -> Shutdown {
        Shutdown::default()
    }

    /// The process's exit code: an abort is a failure.
    pub fn code(&self) -> ExitCode {
        if self.abort.is_cancelled() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }

    /// Waits until the stop begins. Returns the time by which work in hand must be done.
    pub async fn deadline(&self, within: Duration) -> Instant {
        tokio::select! {
            () = self.drain.cancelled() => {}
            () = self.abort.cancelled() => {}
        }
        Instant::now() + within
    }

    /// Listens to the process's signals until it ends.
    pub fn listen(&self) -> io::Result<()> {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = self.clone();
        tokio::spawn(async move {
            loop {
                let received = tokio::select! {
                    Some(()) = terminate.recv() => "SIGTERM",
                    Some(()) = interrupt.recv() => "SIGINT",
                    else => return,
                };
                if stop.drain.is_cancelled() {
                    tracing::warn!(signal = received, "second signal: aborting");
                    stop.abort.cancel();
                } else {
                    tracing::info!(signal = received, "draining; a second signal aborts");
                    stop.drain.cancel();
                }
            }
        });
        Ok(())
    }
}

/// Wakes the reload on each SIGHUP, until the process ends.
pub fn on_hangup(reload: Arc<Notify>) -> io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            reload.notify_one();
        }
    });
    Ok(())
}
