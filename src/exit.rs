//! Exit codes, and how errors are printed.

use std::io::Write;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;
use streamgate_service::config::ConfigError;
use streamgate_service::telemetry::FilterError;

/// Bad usage or a bad configuration (`EX_USAGE` of sysexits.h).
pub const USAGE: u8 = 64;
pub const FAILED: u8 = 1;
/// For stderr to take the error.
const PATIENCE: Duration = Duration::from_secs(1);

/// A command line that clap takes but that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadUsage(pub String);

/// Prints the error on stderr and picks the code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    let text = format!("streamgate: {error:#}");
    let (done, written) = mpsc::channel();
    // A stderr that is gone leaves only the code to tell, and so does one that nobody reads.
    std::thread::spawn(move || {
        drop(writeln!(std::io::stderr(), "{text}"));
        done.send(()).ok();
    });
    written.recv_timeout(PATIENCE).ok();
    code(error)
}

/// Whose mistake it was.
pub fn code(error: &anyhow::Error) -> ExitCode {
    let usage = error.is::<ConfigError>() || error.is::<BadUsage>() || error.is::<FilterError>();
    ExitCode::from(if usage { USAGE } else { FAILED })
}
