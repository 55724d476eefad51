//! A command on a terminal of its own, whose question is answered.

use std::process::Stdio;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Runs the shell's line in 80 columns, and types `answer` once `question` is shown. Returns the exit code and the text shown.
pub async fn on_a_terminal(line: &str, question: &str, answer: &str) -> (Option<i32>, String) {
    let mut terminal = tokio::process::Command::new("script");
    terminal.args(["-qec", &format!("stty cols 80; {line}"), "/dev/null"]).env_clear().env("TERM", "xterm");
    let mut terminal = terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    // The keyboard stays open until the end: end-of-file would be an answer, too.
    let (mut keyboard, mut screen) = (terminal.stdin.take().unwrap(), terminal.stdout.take().unwrap());
    let (mut shown, mut bytes, mut is_typed) = (Vec::new(), [0; 4096], false);
    loop {
        let read = screen.read(&mut bytes).await.unwrap();
        let text = String::from_utf8_lossy(&shown).into_owned();
        if read == 0 {
            return (terminal.wait().await.unwrap().code(), text);
        }
        shown.extend(&bytes[..read]);
        if !is_typed && String::from_utf8_lossy(&shown).contains(question) {
            keyboard.write_all(answer.as_bytes()).await.unwrap();
            is_typed = true;
        }
    }
}
