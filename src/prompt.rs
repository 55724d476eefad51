//! Asks the user a question on the terminal.

use std::io::{self, BufRead, IsTerminal, Write};
use tokio_util::sync::CancellationToken;

/// Whether a user can be asked.
pub(crate) fn is_possible() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks on the terminal; only a yes counts as agreement. Without a terminal, running the command counts as agreement.
pub(crate) async fn confirmed(question: &str, interrupted: &CancellationToken) -> anyhow::Result<bool> {
    if !is_possible() {
        return Ok(true);
    }
    write!(io::stderr(), "{question} [y/N] ")?;
    // The reader has its own thread, which the process does not wait for: an interrupt ends the question.
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
