//! An envelope as columns and back. What changes on the way (attempt, route) has columns; the rest is the versioned headers.

use bytes::Bytes;
use rusqlite::{Row, types::Type};
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
    let kind = Kind::parse(&kind).ok_or_else(|| malformed(first + 3, format!("no kind of webhook: {kind:?}")))?;
    let headers: String = row.get(first + 6)?;
    let headers: BTreeMap<String, String> =
        serde_json::from_str(&headers).map_err(|error| malformed(first + 6, error.to_string()))?;
    let properties =
        Properties { app: row.get(first + 2)?, kind, id: row.get(first + 4)?, event_type: row.get(first + 5)? };
    let body = Bytes::from(row.get::<_, Vec<u8>>(first + 7)?);
    let restored = Envelope::restore(properties, |name| headers.get(name).map(String::as_str), body);
    Ok(Envelope { attempt: row.get(first)?, route: row.get(first + 1)?, ..restored })
}

pub(super) fn malformed(column: usize, what: String) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, what.into())
}
