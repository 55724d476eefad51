//! Exit codes, and how errors are told.

use std::io::Write;
use std::process::ExitCode;
use streamgate_service::config::ConfigError;

/// Bad usage or a bad configuration (`EX_USAGE` of sysexits.h).
pub const USAGE: u8 = 64;
pub const FAILED: u8 = 1;

/// A command line that clap takes but that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadUsage(pub String);

/// Tells the error on stderr and picks the code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    let usage = error.is::<ConfigError>() || error.is::<BadUsage>();
    // A stderr that is gone leaves only the code to tell.
    drop(writeln!(std::io::stderr(), "streamgate: {error:#}"));
    ExitCode::from(if usage { USAGE } else { FAILED })
}
