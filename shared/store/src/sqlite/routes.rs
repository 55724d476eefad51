//! Who has paused which route: a table, read by the owner and written by the command line of another process.

use super::{Embedded, OpenError, alongside::Alongside, queue};
use rusqlite::{Connection, params};
use std::path::Path;
use std::time::Duration;
use streamgate_core::ports::{RouteRecords, StoreError};
use streamgate_core::route_record::{Records, RouteRecord};

/// The routes of a data directory, for the command line.
#[derive(Debug)]
pub struct RouteRecordsFile(Alongside);

impl RouteRecordsFile {
    pub fn open(data_dir: &Path) -> Result<RouteRecordsFile, OpenError> {
        Alongside::open(data_dir).map(RouteRecordsFile)
    }

    /// How many events are parked, for each route that has any.
    pub async fn parked(&self) -> Result<Vec<(String, i64)>, StoreError> {
        self.0.run(|connection| queue::count_parked(connection)).await
    }
}

impl RouteRecords for RouteRecordsFile {
    const GRACE: Duration = Duration::ZERO;

    async fn read(&self) -> Result<Records, StoreError> {
        self.0.run(|connection| read(connection)).await
    }

    async fn write(&self, route: &str, record: &RouteRecord) -> Result<bool, StoreError> {
        let (route, record) = (route.to_owned(), record.clone());
        self.0.run(move |connection| write(connection, &route, &record)).await
    }
}

impl RouteRecords for Embedded {
    const GRACE: Duration = Duration::ZERO;

    async fn read(&self) -> Result<Records, StoreError> {
        self.inbox.query(read).await
    }

    async fn write(&self, route: &str, record: &RouteRecord) -> Result<bool, StoreError> {
        // Only the command line writes as well, and its record has the later epoch.
        self.writer.record_route(route.to_owned(), record.clone()).await.map(|()| true)
    }
}

fn read(connection: &Connection) -> rusqlite::Result<Records> {
    let mut records = connection.prepare_cached("SELECT name, record FROM routes")?;
    let record = |row: &rusqlite::Row<'_>| {
        let json: String = row.get(1)?;
        Ok((row.get(0)?, RouteRecord::parse(&json).unwrap_or(RouteRecord::RUNNING)))
    };
    records.query_map([], record)?.collect()
}

/// Keeps the record with the later epoch. Returns whether it is this one.
pub(super) fn write(connection: &Connection, route: &str, record: &RouteRecord) -> rusqlite::Result<bool> {
    let sql = "INSERT INTO routes (name, epoch, record) VALUES (?1, ?2, ?3)
               ON CONFLICT (name) DO UPDATE SET epoch = excluded.epoch, record = excluded.record WHERE excluded.epoch > epoch";
    let epoch = i64::try_from(record.epoch).unwrap_or(i64::MAX);
    connection.prepare_cached(sql)?.execute(params![route, epoch, record.to_json()]).map(|rows| rows > 0)
}
