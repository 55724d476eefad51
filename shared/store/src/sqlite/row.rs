//! Conversion between envelopes and rows. What changes on the way (attempt, route, attempts) has columns; the rest is
//! the versioned headers.

use bytes::Bytes;
use rusqlite::Row;
use std::collections::BTreeMap;
use streamgate_core::{
    attempts::Attempts,
    envelope::{Envelope, Properties, header},
    id::Kind,
};

/// The columns that `envelope` reads, in its order.
pub(super) const COLUMNS: &str = "attempt, route, app, kind, webhook_id, type, headers, body, attempts";

/// The headers column: a JSON object of strings. Headers of a newer version are kept as they were written.
pub(super) fn headers_json(envelope: &Envelope) -> String {
    let mut headers: BTreeMap<_, _> = envelope.headers().into_iter().collect();
    headers.remove(header::ATTEMPTS);
    serde_json::json!(headers).to_string()
}

/// Reads [`COLUMNS`] from place `first` on.
pub(super) fn envelope(row: &Row<'_>, first: usize) -> rusqlite::Result<Envelope> {
    let kind: String = row.get(first + 3)?;
    let headers: String = row.get(first + 6)?;
    // A row that a newer version wrote, or that a broken disk damaged, must not stop all rows after it.
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
    let attempts: Option<String> = row.get(first + 8)?;
    let attempts = attempts.as_deref().map(Attempts::parse).unwrap_or_default();
    Ok(Envelope { attempt: row.get(first)?, route: row.get(first + 1)?, attempts, ..restored })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;

    #[test]
    fn a_row_of_a_newer_version_is_read_with_defaults() {
        let connection = Connection::open_in_memory().unwrap();
        let sql =
            "SELECT 3, 'app', 'chat', 'a-new-kind', 'id', 'message.new', 'no JSON', CAST('{}' AS BLOB), 'no JSON'";
        let read = connection.query_row(sql, [], |row| envelope(row, 0)).unwrap();
        assert_eq!(
            (read.kind, read.attempt, read.route.as_deref(), &read.body[..]),
            (Kind::Push, 3, Some("app"), &b"{}"[..])
        );
    }
}
