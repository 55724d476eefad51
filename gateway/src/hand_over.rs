//! Moves events from the gateway's own disk to the queue: oldest first, in bounded batches. Each row is released after its
//! event's confirm.

use crate::progress::{Mode, Offered, Progress, RETRY};
use crate::spool::{SpoolState, Spooled};
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::envelope::Envelope;
use streamgate_core::gate::Ended;
use streamgate_core::ports::{Enqueue, Spool, StoreError};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Events in a batch, and the most batches at a time: enough that waiting for confirms does not limit the rate, and few
/// compared with live traffic.
const BATCH: usize = 128;
const BATCHES: usize = 4;
/// The longest pause after refusals: each further offer is a copy if the queue refuses by ending the connection, or if
/// another queue takes it.
const RETRY_MOST: Duration = Duration::from_secs(2);
/// Interval between looks at the disk without a notification, and between updates of its gauges.
const TICK: Duration = Duration::from_secs(1);
/// How long a stop waits for confirms that are under way.
const FAREWELL: Duration = Duration::from_secs(2);

/// The result of a look at the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Moved,
    /// There is nothing to hand over.
    Idle,
    /// The queue cannot be reached.
    Away,
    /// The queue did not take all events.
    Refused,
}

impl<Q: Enqueue, D: Spool> Spooled<Q, D> {
    /// Hands over whatever comes to the disk. After `stop` it continues while there are events to hand over and the queue
    /// takes them. If dropped, it stops between two steps.
    pub async fn hand_over(&self, stop: &CancellationToken) {
        tokio::select! {
            () = hand_over_all(&self.state, stop) => {}
            () = show(&self.state) => {}
        }
    }

    /// Waits a moment for confirms that are under way.
    pub async fn settle(&self) {
        self.state.tasks.close();
        drop(timeout(FAREWELL, self.state.tasks.wait()).await);
    }

    /// Stops retries that remove confirmed events from the disk; called before the disk is closed.
    pub fn give_up(&self) {
        self.state.given_up.cancel();
    }
}

/// Returns after `stop`, once nothing more can be handed over.
async fn hand_over_all<Q: Enqueue, D: Spool>(state: &Arc<SpoolState<Q, D>>, stop: &CancellationToken) {
    let mut progress = state.progress.lock().await;
    loop {
        let step = pass(state, &mut progress).await;
        state.metrics.spool_held.set(i64::try_from(progress.suspects.held()).unwrap_or(i64::MAX));
        let pause = match step {
            Step::Moved => {
                progress.pause = RETRY;
                continue;
            }
            Step::Idle => TICK,
            Step::Away => RETRY,
            Step::Refused => {
                let pause = progress.pause;
                progress.pause = (pause * 2).min(RETRY_MOST);
                pause
            }
        };
        if stop.is_cancelled() {
            return;
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = state.changed.notified(), if step == Step::Idle => {}
            () = stop.cancelled() => {}
        }
    }
}

async fn pass<Q: Enqueue, D: Spool>(state: &Arc<SpoolState<Q, D>>, progress: &mut Progress) -> Step {
    if state.queue.ready().is_err() {
        return Step::Away;
    }
    if state.spool.usage().events == 0 {
        *progress = Progress::default();
        // There is no event to probe with, so the next new event will be the probe.
        state.gate().open();
        return Step::Idle;
    }
    let result = match (state.is_open(), progress.mode) {
        (false, Mode::Probing { after, offered }) => probe(state, progress, after, offered).await,
        (false, Mode::SuspectsFirst | Mode::OthersFirst) => probe(state, progress, 0, Offered::Nothing).await,
        (true, mode) => {
            progress.mode = Mode::SuspectsFirst;
            match progress.suspects.next(Instant::now()) {
                Some(row) if mode != Mode::OthersFirst => ask_again(state, progress, row).await,
                _ => through(state, progress).await,
            }
        }
    };
    result.unwrap_or_else(|error| {
        tracing::error!(%error, "cannot read the spool, trying again");
        Step::Refused
    })
}

/// While the queue takes nothing, offers one event after another to find out whether it takes events again. It moves on each
/// time, in case the queue never takes this one. `after` is the last row that was tried, and `offered` says whether this round has
/// offered any.
async fn probe<Q: Enqueue, D: Spool>(
    state: &Arc<SpoolState<Q, D>>,
    progress: &mut Progress,
    mut after: i64,
    offered: Offered,
) -> Result<Step, StoreError> {
    progress.width = 1;
    loop {
        progress.mode = Mode::Probing { after, offered };
        let (mut rows, last) = read(state, progress, after, 1).await?;
        match (rows.pop(), last, offered) {
            (Some((row, event)), ..) => {
                progress.mode = Mode::Probing { after: row, offered: Offered::Some };
                if offer(Arc::clone(state), vec![(row, event)], Ended::Failed).await {
                    return Ok(Step::Moved);
                }
                progress.suspects.doubt(row);
                return Ok(Step::Refused);
            }
            (None, Some(last), _) => after = last,
            (None, None, Offered::Nothing) => {
                progress.mode = Mode::PROBE;
                // All rows are held or wait for their confirms, so the next new event is the probe.
                state.gate().open();
                return Ok(Step::Idle);
            }
            (None, None, Offered::Some) => {
                progress.mode = Mode::PROBE;
                progress.suspects.forget_doubts();
                return Ok(Step::Refused);
            }
        }
    }
}

/// Offers a row that was refused alone again, now that another was taken.
async fn ask_again<Q: Enqueue, D: Spool>(
    state: &Arc<SpoolState<Q, D>>,
    progress: &mut Progress,
    row: i64,
) -> Result<Step, StoreError> {
    let found = state
        .spool
        .read(row.saturating_sub(1), 1, BTreeSet::new())
        .await?
        .into_iter()
        .find(|(number, _)| *number == row);
    let Some((_, event)) = found.filter(|(_, event)| !state.is_late(&event.key)) else {
        progress.suspects.clear(row);
        return Ok(Step::Moved);
    };
    let (key, bytes) = (event.key.clone(), event.body.len());
    if offer(Arc::clone(state), vec![(row, event)], Ended::GivenUp).await {
        progress.suspects.clear(row);
        return Ok(Step::Moved);
    }
    (progress.width, progress.mode) = (1, Mode::OthersFirst);
    if progress.suspects.hold(row, Instant::now()) {
        tracing::error!(
            key,
            bytes,
            "the queue takes other events but not this one: it stays in the spool and is offered again now and then. See the log of \
             RabbitMQ: is it larger than max_message_size, or does another bound queue refuse it?"
        );
    }
    Ok(Step::Refused)
}

/// Whether a walk over the disk reads on.
enum Walk {
    On,
    AtEnd,
    /// The queue refused an event. However many moved, those that were refused are not offered again at once.
    Refused,
    Unreadable(StoreError),
}

/// Goes once over the disk, oldest first, as long as nothing is refused.
async fn through<Q: Enqueue, D: Spool>(
    state: &Arc<SpoolState<Q, D>>,
    progress: &mut Progress,
) -> Result<Step, StoreError> {
    let mut offers = FuturesUnordered::new();
    let (mut walk, mut after, mut moved) = (Walk::On, 0, false);
    loop {
        let has_room = offers.len() < (progress.width / BATCH).max(1);
        if matches!(walk, Walk::On) && has_room && state.is_open() {
            match read(state, progress, after, progress.width.min(BATCH)).await {
                Ok((rows, Some(last))) => {
                    after = last;
                    if rows.is_empty() {
                        continue;
                    }
                    let alone = if let [(row, _)] = rows[..] { Some(row) } else { None };
                    // On the state's own tasks: a stop between the confirm and the release would repeat all of them.
                    let offered = state.tasks.spawn(offer(Arc::clone(state), rows, Ended::Failed));
                    offers.push(async move { (offered.await, alone) });
                }
                Ok((_, None)) => walk = Walk::AtEnd,
                Err(error) => walk = Walk::Unreadable(error),
            }
            continue;
        }
        match offers.next().await {
            Some((Ok(true), _)) => {
                moved = true;
                progress.width = (progress.width * 2).min(BATCH * BATCHES);
            }
            // After a panic the rows are still on the disk.
            Some((result, alone)) => {
                if !matches!(walk, Walk::Unreadable(_)) {
                    walk = Walk::Refused;
                }
                progress.width = 1;
                if let (Ok(_), Some(row)) = (result, alone) {
                    progress.suspects.doubt(row);
                }
            }
            None => break,
        }
    }
    match (walk, moved) {
        (Walk::Unreadable(error), _) => Err(error),
        (Walk::Refused, _) => Ok(Step::Refused),
        (Walk::On | Walk::AtEnd, true) => Ok(Step::Moved),
        (Walk::On | Walk::AtEnd, false) => Ok(Step::Idle),
    }
}

type Rows = Vec<(i64, Envelope)>;

/// Reads events that may be offered together, and the number of the last row that was read, if any.
async fn read<Q: Enqueue, D: Spool>(
    state: &SpoolState<Q, D>,
    progress: &Progress,
    after: i64,
    most: usize,
) -> Result<(Rows, Option<i64>), StoreError> {
    // Checked before and after the read: a confirm that comes in between removes both the row and its mark.
    let late = state.late();
    let mut rows = state.spool.read(after, most, progress.suspects.numbers()).await?;
    let last = rows.last().map(|(last, _)| *last);
    rows.retain(|(_, event)| !late.contains(&event.key) && !state.is_late(&event.key));
    Ok((rows, last))
}

/// Publishes all events and releases those that were confirmed. Returns whether that is all. `refused` is what the gate gets
/// on a refusal.
async fn offer<Q: Enqueue, D: Spool>(state: Arc<SpoolState<Q, D>>, rows: Rows, refused: Ended) -> bool {
    let lost = state.queue.connections_lost();
    let publishes = rows.into_iter().map(|(row, event)| {
        let publish = state.publish_as(event, refused);
        async move { publish.await.map(|()| row) }
    });
    let results = join_all(publishes).await;
    let all = results.len();
    let confirmed: Vec<_> = results.into_iter().filter_map(Result::ok).collect();
    // If a returned message ended the connection, it may have confirmed what was returned: then the rows stay, at the price
    // of repeats. What a connection confirmed before an alarm blocked it stays confirmed.
    if confirmed.is_empty() || state.queue.connections_lost() != lost {
        return false;
    }
    let is_all = confirmed.len() == all;
    state.release(confirmed).await;
    is_all
}

/// Keeps the gauges up to date. Never returns.
async fn show<Q: Enqueue, D: Spool>(state: &SpoolState<Q, D>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let usage = state.spool.usage();
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        state.metrics.spool_events.set(gauge(usage.events));
        state.metrics.spool_bytes.set(gauge(usage.bytes));
        let oldest = if usage.events == 0 { Ok(Vec::new()) } else { state.spool.read(0, 1, BTreeSet::new()).await };
        // An unreadable disk is reported elsewhere; meanwhile the gauge keeps the last known age.
        if let Ok(oldest) = oldest {
            let now = jiff::Timestamp::now().as_millisecond();
            let age = oldest.first().map_or(0, |(_, event)| now.saturating_sub(event.received_at_ms).max(0) / 1000);
            state.metrics.spool_oldest.set(age);
        }
    }
}
