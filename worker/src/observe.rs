//! The handler of a worker without routes: logs one line for each event, without any of its content.

use crate::handler::{BoxFuture, Context, Event, Handler, HandlerError};
use streamgate_core::peek;

/// Logs an event's type, id, app and age.
#[derive(Clone, Copy, Debug)]
pub struct Observe;

impl Handler for Observe {
    fn handle(&self, event: Event, _context: Context) -> BoxFuture<Result<(), HandlerError>> {
        let envelope = event.envelope();
        // Stream's own timestamp where the event has one: that is the age a person means.
        let since = peek::peek(&envelope.body).created_at_ms.unwrap_or(envelope.received_at_ms);
        let age_ms = jiff::Timestamp::now().as_millisecond().saturating_sub(since).max(0);
        tracing::info!(r#type = envelope.event_type, id = envelope.id, app = envelope.app, age_ms, "event");
        Box::pin(std::future::ready(Ok(())))
    }
}
