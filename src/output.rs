//! What commands print for people and scripts: on stdout, where logs never are.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, Write};

/// Prints a line. A reader that went away (`| head`) is no error of ours: the rest is simply not printed.
pub fn line(text: impl std::fmt::Display) -> io::Result<()> {
    bytes(format!("{text}\n").as_bytes())
}

pub fn bytes(bytes: &[u8]) -> io::Result<()> {
    match io::stdout().lock().write_all(bytes) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// A progress bar on stderr, for work on more than a few `things`. Drawn on a terminal only, and not for scripts.
pub fn bar(length: u64, things: &str, script: bool) -> ProgressBar {
    if length < 2 || script {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(length);
    let template = format!("{{bar:40}} {{pos}}/{{len}} {things}, {{per_sec}}, {{eta}} left");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}
