//! Hooks answered by an HTTP service: what it says goes back to Stream as it is.

use super::{Hook, HookHandler};
use crate::forward::{Service, unanswered};
use crate::handler::{BoxFuture, HandlerError};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::Uri;
use streamgate_service::config::{COMMAND_PLACE, ForwardConfig};
use streamgate_service::http_client::HttpClient;

/// Most bytes of an answer: far over any message, which Stream limits to a few KiB.
const MAX_ANSWER: usize = 256 << 10;

/// Asks one URL, in which `{type}` is the command's name.
#[derive(Clone, Debug)]
pub struct ForwardHook(Service);

impl ForwardHook {
    pub fn new(client: HttpClient, config: &ForwardConfig) -> ForwardHook {
        ForwardHook(Service::new(client, config))
    }
}

impl HookHandler for ForwardHook {
    fn answer(&self, hook: Hook) -> BoxFuture<Result<Bytes, HandlerError>> {
        let service = self.0.clone();
        Box::pin(async move {
            let url = place(&service.url, &hook.command())
                .ok_or_else(|| HandlerError::reject("the command's name cannot stand in a URL"))?;
            let asked = async {
                let response = service.client.request(service.request(url, hook.envelope())).await;
                let response = response.map_err(|error| unanswered(&error))?;
                if !response.status().is_success() {
                    return Err(HandlerError::retry(format!("the service answered {}", response.status().as_u16())));
                }
                let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
                let broken = |_| HandlerError::retry(format!("the answer broke off, or is over {MAX_ANSWER} bytes"));
                body.map(http_body_util::Collected::to_bytes).map_err(broken)
            };
            tokio::time::timeout(service.timeout, asked).await.unwrap_or_else(|_| {
                Err(HandlerError::retry(format!("the service did not answer within {:?}", service.timeout)))
            })
        })
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
