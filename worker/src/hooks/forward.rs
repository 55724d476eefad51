//! Hooks answered by an HTTP service: what it says goes back to Stream as it is.

use super::{Hook, HookHandler};
use crate::forward::Service;
use crate::handler::{BoxFuture, HandlerError};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{Response, Uri, body::Incoming};
use std::sync::Arc;
use std::time::Duration;
use streamgate_service::config::{COMMAND_PLACE, ForwardConfig};
use streamgate_service::http_client::{CallFailure, FailureClass, ServiceClient};

/// Most bytes of an answer: far over any message, which Stream limits to a few KiB.
const MAX_ANSWER: usize = 256 << 10;

/// A service that is being restarted refuses connections for a moment. More often or longer would only keep users waiting where it
/// is down.
const CONNECTS: usize = 3;
const BETWEEN_CONNECTS: Duration = Duration::from_millis(100);

/// Asks one URL, in which `{type}` is the command's name.
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
            let asked = async {
                let response = connected(&service, &url, &hook).await;
                let response = response.map_err(|failure| HandlerError::retry(failure.to_string()))?;
                if !response.status().is_success() {
                    return Err(HandlerError::retry(format!("the service answered {}", response.status().as_u16())));
                }
                let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
                body.map(http_body_util::Collected::to_bytes).map_err(|error| {
                    HandlerError::retry(match error.is::<LengthLimitError>() {
                        true => format!("the service's answer is over {MAX_ANSWER} bytes"),
                        false => "the service's answer broke off".to_owned(),
                    })
                })
            };
            tokio::time::timeout(service.timeout, asked).await.unwrap_or_else(|_| {
                Err(HandlerError::retry(format!("the service did not answer within {:?}", service.timeout)))
            })
        })
    }
}

/// Calls the service; a refused connection is tried again, for Stream asks once.
async fn connected(service: &Service, url: &Uri, hook: &Hook) -> Result<Response<Incoming>, CallFailure> {
    let mut tries = 1;
    loop {
        match service.client.call(|| service.request(url.clone(), hook.envelope())).await {
            Err(failure) if failure.class == FailureClass::Refused && tries < CONNECTS => {
                tries += 1;
                tokio::time::sleep(BETWEEN_CONNECTS).await;
            }
            answer => return answer,
        }
    }
}

/// The URL with the command's name in its place. The name is escaped, dots too: it must not climb to other paths.
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
