//! A question on a terminal.

use std::io::{self, BufRead, IsTerminal, Write};
use tokio_util::sync::CancellationToken;

/// Whether somebody can be asked.
pub(crate) fn is_possible() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks on a terminal; only a yes is one. Without a terminal the command line is the answer.
pub(crate) async fn agreed(question: &str, interrupted: &CancellationToken) -> anyhow::Result<bool> {
    if !is_possible() {
        return Ok(true);
    }
    write!(io::stderr(), "{question} [y/N] ")?;
    // On a thread of its own, which the process does not wait for: an interrupt ends the question.
    let (sender, answer) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = io::stdin().lock().read_line(&mut line);
        sender.send(read.map(|_| line)).ok();
    });
    tokio::select! {
        answer = answer => Ok(matches!(answer??.trim(), "y" | "Y" | "yes")),
        () = interrupted.cancelled() => Ok(false),
    }
}
