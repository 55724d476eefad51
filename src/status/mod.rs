//! `streamgate status`: everything that runs and waits, from any machine with the configuration.

mod gather;
mod page;
mod report;

use crate::global::Global;
use crate::{exit, output};
use anyhow::Context;
use clap::Args;
use report::Report;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;
use streamgate_service::shutdown::Shutdown;

/// Interval between two reports of `--watch`.
const INTERVAL: Duration = Duration::from_secs(2);
/// Moves the cursor to the top left, and clears the screen from there.
const CLEAR: &[u8] = b"\x1b[H\x1b[J";

#[derive(Debug, Args)]
pub struct Status {
    /// Report again every 2 seconds, until interrupted
    #[arg(long)]
    watch: bool,
    /// Print one JSON object, with --watch one a line
    #[arg(long)]
    json: bool,
}

pub async fn command(global: &Global, args: Status) -> anyhow::Result<ExitCode> {
    let loaded = global.load_without_secrets()?;
    let stop = Shutdown::new();
    stop.listen().context("cannot listen to signals")?;
    loop {
        let report = tokio::select! {
            report = gather::report(&loaded) => report,
            () = stop.drain.cancelled() => return Ok(ExitCode::from(exit::FAILED)),
        };
        show(&report, &args)?;
        let code = if report.ok { ExitCode::SUCCESS } else { ExitCode::from(exit::FAILED) };
        if !args.watch {
            return Ok(code);
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = stop.drain.cancelled() => return Ok(code),
        }
    }
}

fn show(report: &Report, args: &Status) -> anyhow::Result<()> {
    if args.json {
        return Ok(output::line(serde_json::to_string(report)?)?);
    }
    if args.watch && std::io::stdout().is_terminal() {
        output::bytes(CLEAR)?;
    }
    for line in page::lines(report, output::width()) {
        output::line(line)?;
    }
    Ok(())
}
