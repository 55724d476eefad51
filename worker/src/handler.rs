//! What business logic sees: an event, its context, and how to report a failure.

use bytes::Bytes;
use std::borrow::Cow;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;
use streamgate_core::{
    breaker::Health,
    envelope::{Envelope, PENDING, UNKNOWN_TYPE},
    peek,
    retry::Failure,
};

pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// An event of Stream's, with the bytes as they were signed.
#[derive(Clone, Debug)]
pub struct Event(pub(crate) Envelope);

impl Event {
    /// The body's `type`; `None` if the body has none.
    pub fn event_type(&self) -> Option<String> {
        raw_type(&self.0).map(Cow::into_owned)
    }

    /// X-Webhook-Id, the same in all of Stream's retries.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// The idempotency key. Delivery is at least once: a handler that must act only once remembers this key.
    pub fn key(&self) -> &str {
        &self.0.key
    }

    /// The app's name in the configuration.
    pub fn app(&self) -> &str {
        &self.0.app
    }

    /// `channel_type:channel_id`, if the event has one.
    pub fn cid(&self) -> Option<&str> {
        self.0.cid.as_deref()
    }

    /// The signed bytes, uncompressed.
    pub fn body(&self) -> &Bytes {
        &self.0.body
    }

    /// The body together with all metadata.
    pub fn envelope(&self) -> &Envelope {
        &self.0
    }
}

/// The type in the signed body, which outranks all unsigned metadata. Only a callback of a pending message has its type from its
/// path, and no body can claim to be one.
pub(crate) fn raw_type(envelope: &Envelope) -> Option<Cow<'_, str>> {
    let beside = Some(&envelope.event_type).filter(|name| *name != UNKNOWN_TYPE).map(Cow::from);
    match beside {
        Some(name) if name.starts_with(PENDING) => Some(name),
        beside => peek::peek(&envelope.body).event_type.filter(|name| !name.starts_with(PENDING)).or(beside),
    }
}

/// What else a handler may want to know about an attempt.
#[derive(Clone, Debug)]
pub struct Context {
    /// The number of this attempt, from 1.
    pub attempt: u32,
    /// How long the handler may take before the attempt counts as failed.
    pub timeout: Duration,
}

/// A handler's failure. Its text goes into logs and dead letters: put no message text into it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct HandlerError {
    message: String,
    retryable: bool,
    retry_after: Option<Duration>,
    is_unreadable: bool,
    is_unavailable: bool,
}

impl HandlerError {
    /// Another attempt may help.
    pub fn retry(message: impl Into<String>) -> HandlerError {
        let (is_unreadable, is_unavailable) = (false, false);
        HandlerError { message: message.into(), retryable: true, retry_after: None, is_unreadable, is_unavailable }
    }

    /// Something that the handler depends on is down, whatever the event: another attempt may help once it is back. The route's
    /// breaker opens after several of these in a row.
    pub fn unavailable(message: impl Into<String>) -> HandlerError {
        HandlerError { is_unavailable: true, ..HandlerError::retry(message) }
    }

    /// Another attempt may help, but not before this long.
    pub fn retry_after(message: impl Into<String>, wait: Duration) -> HandlerError {
        HandlerError::retry(message).not_before(Some(wait))
    }

    /// Delays the next attempt by at least `wait`, if given.
    #[must_use]
    pub fn not_before(self, wait: Option<Duration>) -> HandlerError {
        HandlerError { retry_after: wait, ..self }
    }

    /// No attempt can help: the event goes to the dead letters at once.
    pub fn reject(message: impl Into<String>) -> HandlerError {
        HandlerError { retryable: false, ..HandlerError::retry(message) }
    }

    /// The handler's input cannot be read.
    pub(crate) fn unreadable(message: String) -> HandlerError {
        HandlerError { is_unreadable: true, ..HandlerError::reject(message) }
    }

    /// What the failure says about the service that the handler depends on.
    pub(crate) fn health(&self) -> Health {
        if self.is_unavailable { Health::Down { retry_after: self.retry_after } } else { Health::Up }
    }

    pub(crate) fn is_unreadable(&self) -> bool {
        self.is_unreadable
    }
}

impl From<HandlerError> for Failure {
    fn from(error: HandlerError) -> Failure {
        match error {
            HandlerError { message, retryable: true, retry_after, .. } => {
                Failure::Retry { error: message, retry_after }
            }
            HandlerError { message, retryable: false, .. } => Failure::Reject { error: message },
        }
    }
}

/// Business logic for events. Closures `|event, context| async { … }` are handlers.
pub trait Handler: Send + Sync + 'static {
    fn handle(&self, event: Event, context: Context) -> BoxFuture<Result<(), HandlerError>>;
}

impl<F, R> Handler for F
where
    F: Fn(Event, Context) -> R + Send + Sync + 'static,
    R: Future<Output = Result<(), HandlerError>> + Send + 'static,
{
    fn handle(&self, event: Event, context: Context) -> BoxFuture<Result<(), HandlerError>> {
        Box::pin(self(event, context))
    }
}
