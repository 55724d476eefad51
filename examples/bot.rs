//! A bot in one process: counts messages, keeps links out, and opens tickets by a command with buttons.
//!
//! ```sh
//! STREAM_API_KEY=… STREAM_API_SECRET=… cargo run --release --example bot
//! ```
//!
//! Then, in another terminal with the same two variables:
//!
//! ```sh
//! streamgate send
//! streamgate send --kind before-message-send
//! streamgate send --kind custom-command --type ticket
//! ```

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use streamgate::{Answer, BeforeMessageSend, Button, Command, Context, Event, HandlerError, Streamgate, Style};

#[tokio::main]
async fn main() -> ExitCode {
    // Exits as the command does: with 64 if the configuration is wrong.
    run().await.map_or_else(|error| error.report(), |()| ExitCode::SUCCESS)
}

async fn run() -> Result<(), streamgate::Error> {
    let seen = Arc::new(AtomicU64::new(0));
    Streamgate::from_env()?
        .on("message.new", move |event: Event, _: Context| {
            let number = seen.fetch_add(1, Ordering::Relaxed) + 1;
            async move {
                tracing::info!(number, id = event.id(), "a message");
                Ok(())
            }
        })
        .before_message_send(moderate)
        .command("ticket", ticket)
        .up()
        .await
}

async fn moderate(hook: BeforeMessageSend) -> Result<Answer, HandlerError> {
    let text = hook.text()?;
    if text.contains("http://") || text.contains("https://") {
        return Ok(hook.reject("No links, please."));
    }
    if text.contains("secret") {
        return Ok(hook.rewrite().text(text.replace("secret", "******")));
    }
    Ok(hook.pass())
}

/// Answers with buttons first, for the sender only; a click calls it again, with the button in the form.
async fn ticket(command: Command) -> Result<Answer, HandlerError> {
    Ok(match command.form("action")?.as_deref() {
        None if command.args()?.is_empty() => command.error("What is it about? Write /ticket and a few words."),
        None => command.ephemeral(format!("Open a ticket about {:?}?", command.args()?)).buttons([
            Button::new("action", "open", "Open").style(Style::Primary),
            Button::new("action", "cancel", "Cancel"),
        ]),
        Some("open") => command.regular(format!("Ticket opened: {}", command.args()?)),
        Some(_) => command.cancel(),
    })
}
