//! How many rows of each kind the store holds, for gauges.

use super::{alongside::Alongside, dead_letters, queue, unavailable};
use rusqlite::Connection;
use std::path::Path;
use std::time::{Duration, Instant};
use streamgate_core::ports::StoreError;

/// Waiting events have no index, so a count scans their table. It is repeated only after this many times its duration,
/// so that it takes at most 2% of one core, however many events there are.
const PAUSES: u32 = 50;

/// Number of events by state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Depths {
    /// Never failed, including those in hand. As of the last count.
    pub waiting: i64,
    /// To be tried again, including those in hand.
    pub retrying: i64,
    /// For each route with parked events, including those in hand.
    pub parked: Vec<(String, i64)>,
    pub dead: i64,
}

/// The depths of a data directory, for the command line: alongside its owner or without one.
pub async fn depths_of(data_dir: &Path) -> Result<Depths, StoreError> {
    let file = Alongside::open(data_dir).map_err(unavailable)?;
    let count = |connection: &mut Connection| {
        let (retrying, dead) = (queue::count_retrying(connection)?, dead_letters::count(connection)?);
        let (parked, events) = (queue::count_parked(connection)?, queue::count(connection)?);
        Ok(Depths::of(events, retrying, parked, dead))
    };
    file.run(count).await
}

impl Depths {
    fn of(events: i64, retrying: i64, parked: Vec<(String, i64)>, dead: i64) -> Depths {
        let elsewhere = parked.iter().map(|(_, events)| events).sum::<i64>() + retrying;
        Depths { waiting: events.saturating_sub(elsewhere).max(0), retrying, parked, dead }
    }
}

/// A connection of its own, and the latest counts.
#[derive(Debug)]
pub(super) struct Counter {
    connection: Connection,
    last: Option<Counted<i64>>,
    last_parked: Option<Counted<Vec<(String, i64)>>>,
}

#[derive(Clone, Debug)]
struct Counted<T> {
    events: T,
    ended: Instant,
    took: Duration,
}

impl<T: Clone> Counted<T> {
    /// The last count, if it is recent compared with what it took; otherwise a new one.
    fn again(last: &mut Option<Counted<T>>, count: impl FnOnce() -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        if let Some(Counted { events, ended, took }) = last
            && ended.elapsed() < *took * PAUSES
        {
            return Ok(events.clone());
        }
        let began = Instant::now();
        let events = count()?;
        *last = Some(Counted { events: events.clone(), ended: Instant::now(), took: began.elapsed() });
        Ok(events)
    }
}

impl Counter {
    pub(super) fn new(connection: Connection) -> Counter {
        Counter { connection, last: None, last_parked: None }
    }

    pub(super) fn depths(&mut self) -> rusqlite::Result<Depths> {
        let retrying = queue::count_retrying(&self.connection)?;
        let dead = dead_letters::count(&self.connection)?;
        let parked = Counted::again(&mut self.last_parked, || queue::count_parked(&self.connection))?;
        let events = Counted::again(&mut self.last, || queue::count(&self.connection))?;
        Ok(Depths::of(events, retrying, parked, dead))
    }
}
