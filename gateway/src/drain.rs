//! From the gateway's own disk to the queue: oldest first, in bounded batches, each row let go after its event is confirmed.

use crate::spool::{Desk, Spooled};
use futures_util::future::join_all;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::envelope::Envelope;
use streamgate_core::ports::{Enqueue, Spool};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Events handed over together, and how many batches of them at a time: enough that the broker's confirms do not set the
/// pace, and few beside live traffic.
const BATCH: usize = 128;
const BATCHES: usize = 4;
/// Events that find out whether the queue takes any again.
const PROBE: usize = 16;
/// Between looks at a queue that cannot be reached, and after one that refused.
const RETRY: Duration = Duration::from_millis(250);
/// Between looks at the disk when nothing is told of it, and of its gauges.
const TICK: Duration = Duration::from_secs(1);
/// How long a stop waits for confirms that are under way.
const FAREWELL: Duration = Duration::from_secs(2);

/// What a look at the disk led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Moved,
    /// There is nothing to hand over.
    Idle,
    /// The queue takes nothing now.
    Refused,
}

impl<Q: Enqueue, D: Spool> Spooled<Q, D> {
    /// Hands over whatever comes to the disk. After `stop` it goes on while there is something to hand over and a queue that
    /// takes it, but no longer than `patience`. Returns how many events are left.
    pub async fn drain(&self, stop: &CancellationToken, patience: Duration) -> u64 {
        let desk = &self.desk;
        let until = async {
            stop.cancelled().await;
            sleep(patience).await;
        };
        tokio::select! {
            () = hand_over_all(desk, stop) => {}
            () = show(desk) => {}
            () = until => {}
        }
        desk.tasks.close();
        drop(timeout(FAREWELL, desk.tasks.wait()).await);
        desk.spool.usage().events
    }
}

/// Returns after `stop`, when nothing more can be handed over.
async fn hand_over_all<Q: Enqueue, D: Spool>(desk: &Arc<Desk<Q, D>>, stop: &CancellationToken) {
    loop {
        let step = pass(desk).await;
        let pause = match step {
            Step::Moved => continue,
            Step::Idle => TICK,
            Step::Refused => RETRY,
        };
        if stop.is_cancelled() {
            return;
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = desk.news.notified(), if step == Step::Idle => {}
            () = stop.cancelled() => {}
        }
    }
}

/// Once through the disk, oldest first. While the gate is shut, a probe of the oldest only.
async fn pass<Q: Enqueue, D: Spool>(desk: &Arc<Desk<Q, D>>) -> Step {
    if desk.queue.ready().is_err() {
        return Step::Refused;
    }
    if desk.spool.usage().events == 0 {
        // Nothing could be a probe: the next event that comes will be.
        desk.gate().open();
        return Step::Idle;
    }
    let most = if desk.is_open() { BATCH } else { PROBE };
    let mut batches = JoinSet::new();
    let (mut after, mut moved, mut refused) = (0, 0, false);
    loop {
        // Waiting rows are read on only for as long as all goes well.
        let wanted = batches.len() < BATCHES && !refused && (most == BATCH && desk.is_open() || after == 0);
        if wanted {
            // Looked up before the read and after it: a confirm that comes between the two removes the row and its mark.
            let late = desk.late();
            match desk.spool.read(after, most).await {
                Ok(mut rows) if !rows.is_empty() => {
                    after = rows.last().map_or(after, |(last, _)| *last);
                    rows.retain(|(_, event)| !late.contains(&event.key) && !desk.is_late(&event.key));
                    batches.spawn(hand_over(Arc::clone(desk), rows));
                    continue;
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot read the spool, trying again");
                    refused = true;
                }
            }
        }
        match batches.join_next().await {
            Some(Ok((confirmed, all))) => {
                moved += confirmed;
                refused |= !all;
            }
            // A panic in a batch: its rows are on the disk.
            Some(Err(_)) => refused = true,
            None => break,
        }
    }
    match (moved, refused) {
        // However many moved: those that were refused are not offered again at once.
        (_, true) => Step::Refused,
        (0, false) => Step::Idle,
        _ => Step::Moved,
    }
}

/// Publishes all, and lets go of those that were confirmed: how many, and whether that is all.
async fn hand_over<Q: Enqueue, D: Spool>(desk: Arc<Desk<Q, D>>, rows: Vec<(i64, Envelope)>) -> (usize, bool) {
    let publishes = rows.into_iter().map(|(row, event)| {
        let publish = desk.publish(event);
        async move { publish.await.map(|()| row) }
    });
    let told = join_all(publishes).await;
    let all = told.len();
    let confirmed: Vec<_> = told.into_iter().filter_map(Result::ok).collect();
    // A session that a returned message ended may have confirmed what came back: then the rows stay, at the price of repeats.
    if confirmed.is_empty() || desk.queue.ready().is_err() {
        return (0, all == 0);
    }
    let count = confirmed.len();
    desk.release(confirmed).await;
    (count, count == all)
}

/// Keeps the gauges true. Never returns.
async fn show<Q: Enqueue, D: Spool>(desk: &Desk<Q, D>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let usage = desk.spool.usage();
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        desk.metrics.spool_events.set(gauge(usage.events));
        desk.metrics.spool_bytes.set(gauge(usage.bytes));
        let oldest = if usage.events == 0 { Ok(Vec::new()) } else { desk.spool.read(0, 1).await };
        // A disk that cannot be read has told so elsewhere; the last known age grows no younger by it.
        if let Ok(oldest) = oldest {
            let now = jiff::Timestamp::now().as_millisecond();
            let age = oldest.first().map_or(0, |(_, event)| now.saturating_sub(event.received_at_ms).max(0) / 1000);
            desk.metrics.spool_oldest.set(age);
        }
    }
}
