//! How many rows of each kind the store holds, for gauges.

use super::{dead_letters, queue};
use rusqlite::Connection;
use std::time::{Duration, Instant};

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
        let elsewhere = parked.iter().map(|(_, events)| events).sum::<i64>() + retrying;
        Ok(Depths { waiting: events.saturating_sub(elsewhere).max(0), retrying, parked, dead })
    }
}
