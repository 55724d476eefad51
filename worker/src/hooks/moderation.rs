//! Before-message-send, as a handler sees it.

use super::{Answer, Hook, user};
use crate::handler::HandlerError;
use bytes::Bytes;
use serde_json::Value;
use streamgate_core::envelope::Envelope;
use streamgate_core::fields::Fields;
use streamgate_core::hook;

/// A message that is about to be sent or updated. Stream stores what the answer makes of it.
#[derive(Clone, Debug)]
pub struct BeforeMessageSend {
    envelope: Envelope,
    request: Fields,
    message: Fields,
}

impl TryFrom<Hook> for BeforeMessageSend {
    type Error = HandlerError;

    fn try_from(Hook(envelope): Hook) -> Result<BeforeMessageSend, HandlerError> {
        let (request, message) = read(&envelope.body)?;
        Ok(BeforeMessageSend { envelope, request, message })
    }
}

/// The request and its message. One that is there and cannot be read, with half a surrogate pair in it say, must not be taken
/// for an empty one, which passes: that is for the policy to decide.
pub(super) fn read(body: &[u8]) -> Result<(Fields, Fields), HandlerError> {
    let unreadable = || HandlerError::reject("the message cannot be read");
    let request = match Fields::parse(body) {
        Some(request) => request,
        None if hook::message(body).is_some() || std::str::from_utf8(body).is_err() => return Err(unreadable()),
        None => Fields::default(),
    };
    let message = match request.get("message") {
        Some(raw) if raw.get().starts_with('{') => request.object("message").ok_or_else(unreadable)?,
        _ => Fields::default(),
    };
    match message.get("text") {
        Some(raw) if raw.get().starts_with('"') && message.text("text").is_none() => Err(unreadable()),
        _ => Ok((request, message)),
    }
}

impl BeforeMessageSend {
    /// The message's text; empty where it has none.
    pub fn text(&self) -> String {
        self.message.text("text").unwrap_or_default()
    }

    /// Any field of the message.
    pub fn message(&self, field: &str) -> Option<Value> {
        self.message.value(field)
    }

    /// Any field of the request beside the message: `user`, `channel`, `request_info`.
    pub fn request(&self, field: &str) -> Option<Value> {
        self.request.value(field)
    }

    /// Who sends it.
    pub fn user_id(&self) -> Option<String> {
        user::id(&self.request)
    }

    /// The user's name, or the id where there is none.
    pub fn user_name(&self) -> Option<String> {
        user::name(&self.request)
    }

    /// `channel_type:channel_id`
    pub fn cid(&self) -> Option<String> {
        self.request.object("channel")?.text("cid")
    }

    /// X-Webhook-Id, or what stands for it.
    pub fn id(&self) -> &str {
        &self.envelope.id
    }

    /// The app's name in the configuration.
    pub fn app(&self) -> &str {
        &self.envelope.app
    }

    /// The signed bytes.
    pub fn body(&self) -> &Bytes {
        &self.envelope.body
    }

    /// Lets the message through, as it is.
    pub fn pass(&self) -> Answer {
        Answer::of(self.message.clone())
    }

    /// Lets it through with changes: `hook.rewrite().text("…")`. Stream takes text, attachments, i18n, silent,
    /// show_in_channel, type and custom fields, and ignores the rest.
    pub fn rewrite(&self) -> Answer {
        self.pass()
    }

    /// Keeps it from being stored; its sender reads this text.
    pub fn reject(&self, text: impl AsRef<str>) -> Answer {
        Answer::error(text.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_not_taken_for_nothing() {
        for body in [
            &br#"{"message":{"text":"casino \ud83d"}}"#[..],
            br#"{"message":{"\ud83d":1,"text":"casino"}}"#,
            br#"{"\ud83d":1,"message":{"text":"casino"}}"#,
            b"{\"message\":{\"text\":\"casino \xff\"}}",
        ] {
            assert_eq!(read(body).unwrap_err(), HandlerError::reject("the message cannot be read"), "{body:?}");
        }
        for body in [&b"{}"[..], b"no JSON", br#"{"message":null}"#, br#"{"message":{"text":7}}"#, br#"{"message":{}}"#]
        {
            assert!(read(body).is_ok(), "{body:?}");
        }
    }
}
