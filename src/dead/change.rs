//! Replays or drops the selected dead letters, at a given rate; asks before it changes all of them.

use super::choose;
use super::select::Select;
use crate::{output, prompt};
use anyhow::{Context, bail};
use clap::Args;
use std::time::Duration;
use streamgate_core::dead_letter::DeadLetterId;
use streamgate_core::ports::{DeadLetters, Moved};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Dead letters moved at a time.
const STEP: usize = 100;
/// How long a paced run withholds skipped dead letters from others. RabbitMQ closes a channel that holds a delivery for
/// longer than its consumer_timeout, 30 minutes by default.
const HOLD: Duration = Duration::from_secs(60);

/// Which dead letters to change, and how.
#[derive(Debug, Args)]
pub(super) struct Change {
    #[command(flatten)]
    select: Select,
    /// Change nothing, and print how many dead letters are selected
    #[arg(long)]
    dry_run: bool,
    /// At most this many dead letters a second; without it, as fast as the store takes them
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: Option<u32>,
    /// The reason, for the log line about the change
    #[arg(long, value_name = "TEXT")]
    why: Option<String>,
    /// Do not ask before all dead letters are changed
    #[arg(long)]
    yes: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Changes the selected dead letters, and prints how many were changed and how many are left.
pub(super) async fn change<F>(
    dead_letters: &impl DeadLetters,
    verb: &str,
    how: Change,
    interrupted: &CancellationToken,
    each: impl FnMut(Vec<DeadLetterId>) -> F,
) -> anyhow::Result<()>
where
    F: Future<Output = Moved>,
{
    let Change { select, dry_run, rate, why, yes, json } = how;
    let must_ask = select.means_all() && !yes && !dry_run;
    let chosen = choose(dead_letters, &select.explicit()?, interrupted).await?;
    if dry_run {
        let count = chosen.len();
        match json {
            true => output::line(serde_json::json!({ verb: 0, "selected": count }))?,
            false => output::line(format_args!("{count} would be {verb}; nothing was changed"))?,
        }
        return Ok(());
    }
    if must_ask && !chosen.is_empty() {
        // The dead letters are released while the user decides, so that others can use them.
        dead_letters.release().await?;
        let question = format!("All {} dead letters will be {verb}. Go on?", chosen.len());
        if !prompt::confirmed(&question, interrupted).await? {
            bail!("nothing was changed");
        }
    }
    let asked = chosen.len();
    let moved = in_steps(dead_letters, chosen, rate, json, interrupted, each).await;
    let left = asked - moved.count;
    tracing::info!(count = moved.count, left, why, "dead letters were {verb} by hand");
    report(verb, moved, left, json, interrupted.is_cancelled())
}

/// Changes them in steps, to show progress, at most `rate` a second.
async fn in_steps<F>(
    store: &impl DeadLetters,
    dead_letters: Vec<DeadLetterId>,
    rate: Option<u32>,
    json: bool,
    interrupted: &CancellationToken,
    mut each: impl FnMut(Vec<DeadLetterId>) -> F,
) -> Moved
where
    F: Future<Output = Moved>,
{
    let bar = output::bar(dead_letters.len() as u64, "dead letters", json);
    let (began, mut done, mut all) = (Instant::now(), 0u32, Moved::default());
    let mut held = began;
    let step = rate.map_or(STEP, |rate| STEP.min(rate.div_ceil(10) as usize));
    for some in dead_letters.chunks(step) {
        if let Some(rate) = rate {
            let due = began + Duration::from_secs_f64(f64::from(done) / f64::from(rate));
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                () = interrupted.cancelled() => {}
            }
        }
        if interrupted.is_cancelled() || all.stopped.is_some() {
            break;
        }
        if rate.is_some() && held.elapsed() > HOLD {
            held = Instant::now();
            if let Err(error) = store.release().await {
                all.stopped = Some(error);
                break;
            }
        }
        let Moved { count, stopped } = each(some.to_vec()).await;
        all = Moved { count: all.count + count, stopped };
        done = done.saturating_add(u32::try_from(some.len()).unwrap_or(u32::MAX));
        bar.inc(some.len() as u64);
    }
    bar.finish_and_clear();
    all
}

fn report(verb: &str, moved: Moved, left: usize, json: bool, was_interrupted: bool) -> anyhow::Result<()> {
    let Moved { count, stopped } = moved;
    match (json, left) {
        (true, 0) => output::line(serde_json::json!({ verb: count }))?,
        (true, _) => output::line(serde_json::json!({ verb: count, "left": left }))?,
        (false, 0) => output::line(format!("{count} {verb}"))?,
        (false, _) => output::line(format!("{count} {verb}, {left} left"))?,
    }
    let go_on = "the same command goes on with those that are left";
    match stopped {
        Some(error) => Err(error).context(go_on),
        None if was_interrupted && left > 0 => bail!("interrupted; {go_on}"),
        None if left > 0 => bail!("{left} could not be reached, or somebody else has moved them; {go_on}"),
        None => Ok(()),
    }
}
