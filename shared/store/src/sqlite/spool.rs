//! A gateway's spool: the events that RabbitMQ did not take, in the same file that `up` uses for its queue.

use super::directory::Owned;
use super::limits::Limits;
use super::reader::{MAX_BYTES, Reader};
use super::writer::Writer;
use super::{OpenError, damage, millis, queue, row, schema};
use rusqlite::{Connection, params};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use streamgate_core::envelope::Envelope;
use streamgate_core::ports::{Spool, StoreError, Usage};

#[derive(Clone, Debug)]
pub struct SpoolOptions {
    pub data_dir: PathBuf,
    /// Bytes that the file may take before events are refused.
    pub max_bytes: u64,
    /// A repeat of an event that was spooled is recognised for this long.
    pub seen_window: Duration,
    /// Most writes that wait for a commit.
    pub max_waiting: usize,
}

/// The spool of a process that owns its data directory.
#[derive(Debug)]
pub struct SpoolFile {
    writer: Writer,
    reader: Reader,
    /// `None` once the spool is closed. The last field: the lock is released after the threads that use the file have
    /// ended.
    owned: Mutex<Option<Owned>>,
}

impl SpoolFile {
    /// Takes the data directory, sets a damaged file aside, and starts the threads. Call within a tokio runtime.
    pub fn open(options: &SpoolOptions) -> Result<SpoolFile, OpenError> {
        let owned = Owned::take(&options.data_dir)?;
        let path = owned.database();
        let writing = damage::open_owner(&path, options.max_bytes)?;
        let waiting = queue::count(&writing).map_err(|error| OpenError::Database { path: path.clone(), error })?;
        let reader = Reader::start(schema::open_reader(&path)?)?;
        let window = millis(options.seen_window);
        let limits = Limits {
            max_bytes: options.max_bytes,
            seen_window_ms: window,
            remember_ms: window,
            max_waiting: options.max_waiting,
        };
        let writer = Writer::start(writing, &path, limits, Some(waiting))?;
        Ok(SpoolFile { writer, reader, owned: Mutex::new(Some(owned)) })
    }

    /// Ends the threads once their work is committed, and releases the directory. Later calls fail.
    pub async fn close(&self) {
        self.reader.close().await;
        self.writer.close().await;
        drop(self.owned.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Spool for SpoolFile {
    async fn keep(&self, envelope: Envelope) -> Result<Option<i64>, StoreError> {
        self.writer.enqueue(envelope).await
    }

    async fn read(&self, after: i64, most: usize, skip: BTreeSet<i64>) -> Result<Vec<(i64, Envelope)>, StoreError> {
        self.reader.query(move |connection| read(connection, after, most, &skip)).await
    }

    async fn release(&self, numbers: Vec<i64>) -> Result<(), StoreError> {
        self.writer.release(numbers).await
    }

    fn ready(&self) -> Result<(), StoreError> {
        self.writer.ready()
    }

    fn usage(&self) -> Usage {
        Usage { events: self.writer.waiting(), bytes: self.writer.used() }
    }
}

/// Includes the retries that an `up` left behind, whenever they are due.
fn read(
    connection: &Connection,
    after: i64,
    most: usize,
    skip: &BTreeSet<i64>,
) -> rusqlite::Result<Vec<(i64, Envelope)>> {
    let sql = format!("SELECT seq, {} FROM events WHERE seq > ?1 ORDER BY seq", row::COLUMNS);
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query(params![after])?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    while found.len() < most && bytes < MAX_BYTES {
        let Some(row) = rows.next()? else { break };
        let number = row.get(0)?;
        // Skipped before the body is touched: SQLite reads it only then.
        if skip.contains(&number) {
            continue;
        }
        let envelope = row::envelope(row, 1)?;
        bytes += envelope.body.len();
        found.push((number, envelope));
    }
    Ok(found)
}
