//! Before-message-send, as a handler sees it.

use super::{Answer, Hook};
use bytes::Bytes;
use serde_json::Value;
use streamgate_core::envelope::Envelope;
use streamgate_core::fields::Fields;

/// A message that is about to be sent or updated. Stream stores what the answer makes of it.
#[derive(Clone, Debug)]
pub struct BeforeMessageSend {
    envelope: Envelope,
    request: Fields,
    message: Fields,
}

impl From<Hook> for BeforeMessageSend {
    fn from(Hook(envelope): Hook) -> BeforeMessageSend {
        let request = Fields::parse(&envelope.body).unwrap_or_default();
        let message = request.object("message").unwrap_or_default();
        BeforeMessageSend { envelope, request, message }
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
        self.request.object("user")?.text("id")
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
