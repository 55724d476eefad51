//! How one dead letter is shown.

use crate::output;
use serde::{Serialize, Serializer};
use streamgate_core::attempts::Attempt;
use streamgate_core::dead_letter::DeadLetter;
use streamgate_core::timestamp::rfc3339;

/// A dead letter, as scripts see it.
#[derive(Debug, Serialize)]
pub(super) struct View<'a> {
    /// Written as text: it may have 19 digits, and JavaScript and jq round those.
    #[serde(serialize_with = "as_text")]
    number: i64,
    id: &'a str,
    key: &'a str,
    app: &'a str,
    kind: &'a str,
    #[serde(rename = "type")]
    event_type: &'a str,
    cid: Option<&'a str>,
    route: Option<&'a str>,
    reason: &'a str,
    error: Option<&'a str>,
    attempts: u32,
    /// The newest failed attempts, oldest first.
    history: Vec<Tried<'a>>,
    received_at: String,
    died_at: String,
    bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<String>,
}

fn as_text<S: Serializer>(number: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(number)
}

impl View<'_> {
    pub(super) fn of(dead_letter: &DeadLetter, body: bool) -> View<'_> {
        let envelope = &dead_letter.envelope;
        View {
            number: dead_letter.number,
            id: &envelope.id,
            key: &envelope.key,
            app: &envelope.app,
            kind: envelope.kind.as_str(),
            event_type: &envelope.event_type,
            cid: envelope.cid.as_deref(),
            route: envelope.route.as_deref(),
            reason: &dead_letter.reason,
            error: dead_letter.error.as_deref(),
            attempts: envelope.attempt,
            history: envelope.attempts.iter().map(Tried::of).collect(),
            received_at: rfc3339(envelope.received_at_ms),
            died_at: rfc3339(dead_letter.died_at_ms),
            bytes: envelope.body.len(),
            body: body.then(|| String::from_utf8_lossy(&envelope.body).into_owned()),
        }
    }
}

/// One attempt, as scripts see it.
#[derive(Debug, Serialize)]
struct Tried<'a> {
    attempt: u32,
    at: String,
    ms: u64,
    error: &'a str,
}

impl Tried<'_> {
    fn of(attempt: &Attempt) -> Tried<'_> {
        let Attempt { number, at_ms, took_ms, error } = attempt;
        Tried { attempt: *number, at: rfc3339(*at_ms), ms: *took_ms, error }
    }
}

/// Prints everything of a dead letter but its body, one field a line.
pub(super) fn whole(dead_letter: &DeadLetter) -> anyhow::Result<()> {
    let view = View::of(dead_letter, false);
    let fields = serde_json::to_value(&view)?;
    let shown = |(_, value): &(&String, &serde_json::Value)| !value.is_null() && !value.is_array();
    for (name, value) in fields.as_object().into_iter().flatten().filter(shown) {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        output::line(format_args!("{name:<12} {text}"))?;
    }
    for Tried { attempt, at, ms, error } in view.history {
        output::line(format_args!("attempt {attempt:<4} {at}, {ms} ms: {error}"))?;
    }
    Ok(())
}
