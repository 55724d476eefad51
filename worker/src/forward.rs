//! Forwards events to an HTTP service: a drop-in for the webhook endpoint that the service already has.

use crate::handler::{BoxFuture, Context, Event, Handler, HandlerError};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{
    ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT,
};
use hyper::{Method, Request, Response, StatusCode, Uri, body::Incoming};
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::envelope::{Envelope, header};
use streamgate_service::config::ForwardConfig;
use streamgate_service::http_client::ServiceClient;

/// Bytes of a response that are read and thrown away, so that the connection can be reused.
const MAX_ANSWER: usize = 64 << 10;
/// How long reading them may take: the verdict is known already, and a slow response is not worth the wait.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);

/// A response that is read within this time frees its connection for the next event at once.
const ANSWER_AT_HAND: Duration = Duration::from_millis(20);

/// One service: its URL, and the headers that every request to it carries.
pub(crate) struct Service {
    pub(crate) client: ServiceClient,
    pub(crate) url: Uri,
    pub(crate) timeout: Duration,
    headers: HeaderMap,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service")
            .field("host", &self.url.host())
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl Service {
    pub(crate) fn new(client: ServiceClient, config: &ForwardConfig) -> Service {
        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("streamgate/", env!("CARGO_PKG_VERSION"))));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // Responses are not decompressed.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        for (name, value) in &config.headers {
            // The configuration has validated each of them already.
            if let Ok(mut value) = HeaderValue::from_str(value.expose()) {
                value.set_sensitive(true);
                headers.insert(name, value);
            }
        }
        Service { client, url: config.url.clone(), timeout: config.timeout, headers }
    }

    /// The webhook as Stream sent it, addressed to `url`.
    pub(crate) fn request(&self, url: Uri, envelope: &Envelope) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(envelope.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = url;
        let headers = request.headers_mut();
        headers.clone_from(&self.headers);
        // Set for an empty body too: HTTP libraries omit it from an empty POST, and some servers then fail.
        headers.insert(CONTENT_LENGTH, HeaderValue::from(envelope.body.len()));
        for (name, value) in envelope.further.iter() {
            // A configured header takes precedence.
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_str(value)) {
                headers.entry(name).or_insert(value);
            }
        }
        let attempt = envelope.attempt.to_string();
        let webhook_attempt = envelope.webhook_attempt.to_string();
        let own = [
            (header::WEBHOOK_ID, Some(envelope.id.as_str())),
            (header::WEBHOOK_ATTEMPT, Some(&webhook_attempt)),
            (header::API_KEY, Some(&envelope.api_key)),
            (header::SIGNATURE, Some(&envelope.signature)),
            (header::KEY, Some(&envelope.key)),
            (header::ATTEMPT, Some(&attempt)),
            (header::TYPE, Some(&envelope.event_type)),
            (header::TRACEPARENT, envelope.traceparent.as_deref()),
        ];
        for (name, value) in own {
            // All of them were bounded to printable ASCII when the event was accepted.
            if let Some(Ok(value)) = value.map(HeaderValue::from_str) {
                headers.insert(HeaderName::from_static(name), value);
            }
        }
        request
    }
}

/// Posts each event to one URL.
#[derive(Clone, Debug)]
pub struct Forward(Arc<Service>);

impl Forward {
    pub fn new(client: ServiceClient, config: &ForwardConfig) -> Forward {
        Forward(Arc::new(Service::new(client, config)))
    }
}

impl Handler for Forward {
    fn handle(&self, event: Event, _context: Context) -> BoxFuture<Result<(), HandlerError>> {
        let service = Arc::clone(&self.0);
        Box::pin(async move {
            let request = || service.request(service.url.clone(), event.envelope());
            match service.client.call(service.timeout, request).await {
                Ok(response) => {
                    let verdict = verdict(response.status(), response.headers(), jiff::Timestamp::now());
                    finish(response).await;
                    verdict
                }
                Err(failure) => Err(HandlerError::unavailable(failure.to_string())),
            }
        })
    }
}

/// Reads the rest of the response within bounds and ignores it. A slow rest is read in a task of its own, so that it cannot
/// delay the verdict past the handler's timeout.
async fn finish(response: Response<Incoming>) {
    let rest = tokio::spawn(async {
        let rest = Limited::new(response.into_body(), MAX_ANSWER).collect();
        drop(tokio::time::timeout(ANSWER_PATIENCE, rest).await);
    });
    drop(tokio::time::timeout(ANSWER_AT_HAND, rest).await);
}

/// What a response means. Only a status which says that this very request can never succeed ends the event. All others are
/// retried, even a missing endpoint or a refused token: a deployment fixes both, and the event should still be there.
fn verdict(status: StatusCode, headers: &HeaderMap, now: jiff::Timestamp) -> Result<(), HandlerError> {
    let message = format!("the service answered {}", status.as_u16());
    match status.as_u16() {
        200..=299 => Ok(()),
        400 | 405 | 410 | 413 | 415 | 422 => Err(HandlerError::reject(message)),
        code => {
            let wait = headers.get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?, now));
            // These statuses mean that the service takes nothing, whatever the event.
            let error = if matches!(code, 429 | 500..) { HandlerError::unavailable } else { HandlerError::retry };
            Err(error(message).not_before(wait))
        }
    }
}

/// Retry-After is a number of seconds or an HTTP date.
fn retry_after(value: &str, now: jiff::Timestamp) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(value.trim()).ok()?.timestamp();
    Some(Duration::from_millis(u64::try_from(date.as_millisecond() - now.as_millisecond()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_verdicts() {
        let judge = |status: u16| {
            verdict(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), jiff::Timestamp::UNIX_EPOCH)
        };
        for status in [200, 201, 204, 299] {
            assert_eq!(judge(status), Ok(()));
        }
        for status in [400, 405, 410, 413, 415, 422] {
            assert_eq!(judge(status), Err(HandlerError::reject(format!("the service answered {status}"))));
        }
        for status in [301, 302, 307, 401, 403, 404, 408, 409, 425] {
            assert_eq!(judge(status), Err(HandlerError::retry(format!("the service answered {status}"))));
        }
        for status in [429, 500, 502, 503, 504, 599] {
            assert_eq!(judge(status), Err(HandlerError::unavailable(format!("the service answered {status}"))));
        }
    }

    #[test]
    fn retry_after_in_both_forms() {
        let now: jiff::Timestamp = "2015-10-21T07:27:50Z".parse().unwrap();
        assert_eq!(retry_after("120", now), Some(Duration::from_secs(120)));
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:28:00 GMT", now), Some(Duration::from_secs(10)));
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:00:00 GMT", now), Some(Duration::ZERO));
        assert_eq!(retry_after("soon", now), None);
        let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static("7"))]);
        let judged = verdict(StatusCode::SERVICE_UNAVAILABLE, &headers, now);
        let expected = HandlerError::unavailable("the service answered 503").not_before(Some(Duration::from_secs(7)));
        assert_eq!(judged, Err(expected));
    }
}
