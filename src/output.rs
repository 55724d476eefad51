//! What commands print for people and scripts: on stdout, where logs never are.

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
