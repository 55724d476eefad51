//! The `streamgate` command.

use clap::Parser;
use std::process::ExitCode;
use streamgate::cli::{Cli, Command};
use streamgate::{check, connect, dead, drain, exit, gateway, route, send, status, up, worker};
use streamgate_service::telemetry;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // clap returns help and version as errors, but the user asked for them.
            let code = if error.use_stderr() { exit::USAGE } else { 0 };
            return if error.print().is_ok() { ExitCode::from(code) } else { ExitCode::from(exit::FAILED) };
        }
    };
    if let Err(error) = cli.global.start_logs() {
        return exit::report(&error.into());
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::report(&anyhow::anyhow!("cannot start the async runtime: {error}")),
    };
    let command = cli.command.unwrap_or(Command::Up);
    let result = runtime.block_on(async {
        match command {
            Command::Up => up::command(&cli.global).await,
            Command::Gateway => gateway::command(&cli.global).await,
            Command::Worker => worker::command(&cli.global).await,
            Command::Check(args) => check::command(&cli.global, &args).await,
            Command::Connect(args) => connect::command(&cli.global, &args).await,
            Command::Send(args) => send::command(&cli.global, &args).await,
            Command::Drain(args) => drain::command(&cli.global, &args).await,
            Command::Dead(args) => dead::command(&cli.global, args).await,
            Command::Route(args) => route::command(&cli.global, args).await,
            Command::Status(args) => status::command(&cli.global, args).await,
        }
    });
    // Remaining tasks had their time: a lingering connection must not hold the process.
    runtime.shutdown_background();
    telemetry::flush();
    result.unwrap_or_else(|error| exit::report(&error))
}
