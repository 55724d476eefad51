//! An envelope as columns and back. What changes on the way (attempt, route) has columns; the rest is the versioned headers.

use bytes::Bytes;
use rusqlite::Row;
use std::collections::BTreeMap;
use streamgate_core::{
    envelope::{Envelope, Properties},
    id::Kind,
};

/// The columns that `envelope` reads, in its order.
pub(super) const COLUMNS: &str = "attempt, route, app, kind, webhook_id, type, headers, body";

/// The headers column: a JSON object of strings.
pub(super) fn headers_json(envelope: &Envelope) -> String {
    let headers: BTreeMap<_, _> = envelope.headers().into_iter().collect();
    serde_json::json!(headers).to_string()
}

/// Reads [`COLUMNS`] from place `first` on.
pub(super) fn envelope(row: &Row<'_>, first: usize) -> rusqlite::Result<Envelope> {
    let kind: String = row.get(first + 3)?;
    let headers: String = row.get(first + 6)?;
    // One row that a newer version wrote, or a broken disk, must not stop all that come after it.
    let kind = Kind::parse(&kind).unwrap_or_else(|| {
        tracing::error!(kind, "an event of a kind that is unknown here; handled as a push");
        Kind::Push
    });
    let headers: BTreeMap<String, String> = serde_json::from_str(&headers).unwrap_or_else(|error| {
        tracing::error!(%error, "an event with headers that cannot be read; going on with defaults");
        BTreeMap::new()
    });
    let properties =
        Properties { app: row.get(first + 2)?, kind, id: row.get(first + 4)?, event_type: row.get(first + 5)? };
    let body = Bytes::from(row.get::<_, Vec<u8>>(first + 7)?);
    let restored = Envelope::restore(properties, |name| headers.get(name).map(String::as_str), body);
    Ok(Envelope { attempt: row.get(first)?, route: row.get(first + 1)?, ..restored })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;

    #[test]
    fn a_row_of_a_newer_version_is_read_with_defaults() {
        let connection = Connection::open_in_memory().unwrap();
        let sql = "SELECT 3, 'app', 'chat', 'a-new-kind', 'id', 'message.new', 'no JSON', CAST('{}' AS BLOB)";
        let read = connection.query_row(sql, [], |row| envelope(row, 0)).unwrap();
        assert_eq!(
            (read.kind, read.attempt, read.route.as_deref(), &read.body[..]),
            (Kind::Push, 3, Some("app"), &b"{}"[..])
        );
    }
}
