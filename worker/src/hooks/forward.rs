//! Hooks answered by an HTTP service, whose answer goes back to Stream unchanged.

use super::{Hook, HookHandler};
use crate::forward::Service;
use crate::handler::{BoxFuture, HandlerError};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{Response, Uri, body::Incoming};
use std::sync::Arc;
use std::time::Duration;
use streamgate_service::config::{COMMAND_PLACE, ForwardConfig};
use streamgate_service::http_client::{CallFailure, ServiceClient};
use tokio::time::Instant;

/// Most bytes of an answer: far over any message, which Stream limits to a few KiB.
const MAX_ANSWER: usize = 256 << 10;

/// Wait before a service that did not respond at all is called again, doubled each time: one that restarts is back in a moment.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// What must be left of the hook's time for another try: a service needs some to answer.
const RESERVE: Duration = Duration::from_millis(150);

/// Asks one URL, in which `{type}` stands for the command's name.
#[derive(Clone, Debug)]
pub struct ForwardHook(Arc<Service>);

impl ForwardHook {
    pub fn new(client: ServiceClient, config: &ForwardConfig) -> ForwardHook {
        ForwardHook(Arc::new(Service::new(client, config)))
    }
}

impl HookHandler for ForwardHook {
    fn answer(&self, hook: Hook) -> BoxFuture<Result<Bytes, HandlerError>> {
        let service = Arc::clone(&self.0);
        Box::pin(async move {
            let url = place(&service.url, &hook.command())
                .ok_or_else(|| HandlerError::reject("the command's name cannot stand in a URL"))?;
            let until = hook.until().min(Instant::now() + service.timeout);
            let response = connected(&service, &url, &hook, until).await;
            let response = response.map_err(|failure| HandlerError::retry(failure.to_string()))?;
            if !response.status().is_success() {
                return Err(HandlerError::retry(format!("the service answered {}", response.status().as_u16())));
            }
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect();
            let broken = |what: String| HandlerError::retry(format!("closed: the service's answer {what}"));
            match tokio::time::timeout_at(until, body).await {
                Ok(Ok(body)) => Ok(body.to_bytes()),
                Ok(Err(error)) if error.is::<LengthLimitError>() => Err(broken(format!("is over {MAX_ANSWER} bytes"))),
                Ok(Err(error)) => Err(broken(format!("broke off: {}", innermost(&*error)))),
                Err(_) => Err(HandlerError::retry("timeout: the service's answer was not complete in time")),
            }
        })
    }
}

/// Calls the service, again and again while there is time and it did not respond at all, because Stream asks only once.
async fn connected(
    service: &Service,
    url: &Uri,
    hook: &Hook,
    until: Instant,
) -> Result<Response<Incoming>, CallFailure> {
    let mut wait = FIRST_WAIT;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match service.client.call(left, || service.request(url.clone(), hook.envelope())).await {
            Err(failure) if failure.is_silence() && Instant::now() + wait + RESERVE < until => {
                tokio::time::sleep(wait).await;
                wait *= 2;
            }
            answer => return answer,
        }
    }
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source()).last().map(ToString::to_string).unwrap_or_default()
}

/// The URL with the command's name in its place. The name is escaped, dots included: it must not reach other paths.
fn place(url: &Uri, command: &str) -> Option<Uri> {
    let text = url.to_string();
    if !text.contains(COMMAND_PLACE) {
        return Some(url.clone());
    }
    let mut escaped = String::with_capacity(command.len());
    for byte in command.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => escaped.push(char::from(byte)),
            other => escaped.push_str(&format!("%{other:02X}")),
        }
    }
    text.replace(COMMAND_PLACE, &escaped).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commands_name_takes_its_place() {
        let at = |url: &'static str, command: &str| place(&Uri::from_static(url), command).map(|url| url.to_string());
        assert_eq!(
            at("http://h/commands/{type}?t={type}", "ticket").as_deref(),
            Some("http://h/commands/ticket?t=ticket")
        );
        assert_eq!(at("http://h/{type}", "../é").as_deref(), Some("http://h/%2E%2E%2F%C3%A9"));
        assert_eq!(at("http://h/fixed", "ticket").as_deref(), Some("http://h/fixed"));
    }
}
