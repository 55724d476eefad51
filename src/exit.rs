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
/// Time limit for writing the error to stderr.
const STDERR_TIMEOUT: Duration = Duration::from_secs(1);

/// A command line that clap accepts but that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadUsage(pub String);

/// Prints the error on stderr and returns the exit code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    let text = format!("streamgate: {error:#}");
    let (done, written) = mpsc::channel();
    // On a thread: if stderr is gone or nobody reads it, only the exit code reports the error.
    std::thread::spawn(move || {
        drop(writeln!(std::io::stderr(), "{text}"));
        done.send(()).ok();
    });
    written.recv_timeout(STDERR_TIMEOUT).ok();
    code(error)
}

/// The exit code: bad usage, or a failure.
pub fn code(error: &anyhow::Error) -> ExitCode {
    let usage = error.is::<ConfigError>() || error.is::<BadUsage>() || error.is::<FilterError>();
    ExitCode::from(if usage { USAGE } else { FAILED })
}
