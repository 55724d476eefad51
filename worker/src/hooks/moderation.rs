//! Before-message-send as a handler sees it.

use super::request::{Request, Unreadable};
use super::{Answer, Hook};
use bytes::Bytes;
use serde_json::Value;
use streamgate_core::envelope::Envelope;

/// A message that is about to be sent or updated. Stream stores what the answer makes of it.
///
/// What cannot be read is an error, not absent: `on_unreadable` decides about a message whose handler returns it with `?`.
#[derive(Clone, Debug)]
pub struct BeforeMessageSend {
    envelope: Envelope,
    request: Request,
}

impl From<Hook> for BeforeMessageSend {
    fn from(hook: Hook) -> BeforeMessageSend {
        let envelope = hook.into_envelope();
        BeforeMessageSend { request: Request::read(&envelope.body), envelope }
    }
}

impl BeforeMessageSend {
    /// The message's text, which may be empty. An unpaired surrogate becomes U+FFFD, as clients show it.
    pub fn text(&self) -> Result<String, Unreadable> {
        self.request.message_text("text").map(Option::unwrap_or_default)
    }

    /// Any field of the message.
    pub fn message(&self, field: &str) -> Result<Option<Value>, Unreadable> {
        self.request.of_message(field)
    }

    /// Any field of the request outside the message: `user`, `channel`, `request_info`.
    pub fn request(&self, field: &str) -> Result<Option<Value>, Unreadable> {
        self.request.of_request(field)
    }

    /// The id of the user who sends it.
    pub fn user_id(&self) -> Result<Option<String>, Unreadable> {
        self.request.text_of("user", "id")
    }

    /// The user's name, or the id of a user without a name.
    pub fn user_name(&self) -> Result<Option<String>, Unreadable> {
        self.request.user_name()
    }

    /// `channel_type:channel_id`
    pub fn cid(&self) -> Result<Option<String>, Unreadable> {
        self.request.text_of("channel", "cid")
    }

    /// X-Webhook-Id, or the id that replaces it where there is none.
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

    /// Lets the message through unchanged.
    pub fn pass(&self) -> Answer {
        Answer::of(self.request.message())
    }

    /// Lets it through with changes: `hook.rewrite().text("…")`. Stream takes text, attachments, i18n, silent,
    /// show_in_channel, type and custom fields, and ignores the rest.
    pub fn rewrite(&self) -> Answer {
        self.pass()
    }

    /// Rejects the message; its sender sees this text.
    pub fn reject(&self, text: impl AsRef<str>) -> Answer {
        Answer::error(text.as_ref())
    }
}
