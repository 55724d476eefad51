//! Who has paused which route: a table, read by the owner and written by the command line of another process.

use super::{Embedded, OpenError, directory, queue, schema, unavailable};
use rusqlite::{Connection, params};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use streamgate_core::ports::{RouteRecords, StoreError};
use streamgate_core::route_record::{Records, RouteRecord};

/// The routes of a data directory, for the command line.
#[derive(Debug)]
pub struct RouteRecordsFile(Arc<Mutex<Connection>>);

impl RouteRecordsFile {
    pub fn open(data_dir: &Path) -> Result<RouteRecordsFile, OpenError> {
        let database = directory::database(data_dir);
        if !database.exists() {
            return Err(OpenError::Absent { path: data_dir.to_owned() });
        }
        Ok(RouteRecordsFile(Arc::new(Mutex::new(schema::open_alongside(&database)?))))
    }

    /// How many events are parked, for each route that has any.
    pub async fn parked(&self) -> Result<Vec<(String, i64)>, StoreError> {
        self.run(|connection| queue::count_parked(connection)).await
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = Arc::clone(&self.0);
        let run = move || work(&mut connection.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::task::spawn_blocking(run).await.map_err(unavailable)?.map_err(unavailable)
    }
}

impl RouteRecords for RouteRecordsFile {
    const GRACE: Duration = Duration::ZERO;

    async fn read(&self) -> Result<Records, StoreError> {
        self.run(|connection| read(connection)).await
    }

    async fn write(&self, route: &str, record: &RouteRecord) -> Result<bool, StoreError> {
        let (route, record) = (route.to_owned(), record.clone());
        self.run(move |connection| write(connection, &route, &record)).await
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
