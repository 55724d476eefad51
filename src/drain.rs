//! `streamgate drain`: hands the events of a stranded spool over to RabbitMQ, then exits.

use crate::backends::rabbitmq::for_services;
use crate::backends::rabbitmq::{self, Servers};
use crate::global::Global;
use crate::output;
use anyhow::bail;
use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::ports::{Enqueue, Spool};
use streamgate_gateway::Spooled;
use streamgate_service::metrics::Metrics;
use streamgate_store::rabbitmq::Exchange;
use streamgate_store::sqlite::{self, OpenError, SpoolFile};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long the command waits without progress before it gives up.
const GIVE_UP_AFTER: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(250);

#[derive(Debug, Args)]
pub struct Drain {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    handed_over: u64,
    left: u64,
}

pub async fn command(global: &Global, args: &Drain) -> anyhow::Result<ExitCode> {
    let loaded = for_services(global.load_without_secrets()?)?;
    let Servers { endpoint, topology, .. } = Servers::of(&loaded)?;
    let (config, metrics) = (loaded.config, Metrics::new());
    // A mistyped path must not create a spool. An older file is migrated and a damaged one set aside, as by any owner.
    match sqlite::inspect(&config.store.data_dir) {
        Ok(()) | Err(OpenError::Older { .. } | OpenError::Database { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let spool = Arc::new(SpoolFile::open(&rabbitmq::spool_options(&config))?);
    let found = spool.usage().events;
    let bar = output::bar(found, "events", args.json);
    let on_return: Arc<dyn Fn() + Send + Sync> = Arc::new(|| ());
    let exchange = Arc::new(Exchange::start(endpoint, topology, config.gateway.max_in_flight, &on_return));
    let spooled = rabbitmq::spooled(&config, &exchange, &spool, &metrics);
    let result = hand_over(&spooled, &exchange, &spool, found, &bar).await;
    bar.finish_and_clear();
    let left = spool.usage().events;
    drop(spooled);
    exchange.close().await;
    spool.close().await;
    let report = Report { handed_over: found.saturating_sub(left), left };
    if args.json {
        output::line(serde_json::to_string(&report)?)?;
    } else {
        output::line(format!("{} events handed over to RabbitMQ, {left} left", report.handed_over))?;
    }
    result?;
    let aside = sqlite::set_aside_in(&config.store.data_dir)?;
    if !aside.is_empty() {
        let names = aside.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        bail!("events may be in what was set aside as damaged, and are not handed over: {names}; keep it");
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns when nothing is left, or an error after too long without progress.
async fn hand_over(
    spooled: &Spooled<Exchange, SpoolFile>,
    exchange: &Exchange,
    spool: &SpoolFile,
    found: u64,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let show = async {
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            bar.set_position(found.saturating_sub(spool.usage().events));
        }
    };
    let move_all = async {
        // The token is cancelled from the start, so that each round ends when nothing more can be handed over.
        let stop = CancellationToken::new();
        stop.cancel();
        let (mut least, mut moved) = (found, Instant::now());
        loop {
            let left = match exchange.ready() {
                Ok(()) => {
                    spooled.hand_over(&stop).await;
                    spooled.settle().await;
                    spool.usage().events
                }
                Err(_) => spool.usage().events,
            };
            if left == 0 {
                return Ok(());
            }
            if left < least {
                (least, moved) = (left, Instant::now());
            }
            if moved.elapsed() >= GIVE_UP_AFTER {
                let why =
                    exchange.ready().err().map_or_else(|| "it refuses them".to_owned(), |error| error.to_string());
                bail!("RabbitMQ has taken no event for {GIVE_UP_AFTER:?}: {why}");
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    };
    tokio::select! {
        result = move_all => result,
        () = show => Ok(()),
    }
}
