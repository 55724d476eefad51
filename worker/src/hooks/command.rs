//! A custom command as a handler sees it.

use super::request::{Request, Unreadable};
use super::{Answer, Hook};
use bytes::Bytes;
use serde_json::Value;
use streamgate_core::envelope::Envelope;

/// A /command that a user sent, or a click on a button of its answer.
///
/// A command with buttons is first answered `ephemeral`. A click calls the command again, with the button's name and value in
/// `form_data`; the last answer is `regular`, or [`cancel`](Command::cancel).
///
/// What cannot be read is an error, not absent: a handler that returns it with `?` leaves the answer to the policy.
#[derive(Clone, Debug)]
pub struct Command {
    envelope: Envelope,
    name: String,
    request: Request,
}

impl From<Hook> for Command {
    fn from(hook: Hook) -> Command {
        let name = hook.command();
        let envelope = hook.into_envelope();
        Command { request: Request::read(&envelope.body), envelope, name }
    }
}

impl Command {
    /// The name without the slash.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The text after the name, which may be empty.
    pub fn args(&self) -> Result<String, Unreadable> {
        self.request.message_text("args").map(Option::unwrap_or_default)
    }

    /// Any field of the message.
    pub fn message(&self, field: &str) -> Result<Option<Value>, Unreadable> {
        self.request.of_message(field)
    }

    /// Any field of the request outside the message.
    pub fn request(&self, field: &str) -> Result<Option<Value>, Unreadable> {
        self.request.of_request(field)
    }

    /// The id of the user who sent it.
    pub fn user_id(&self) -> Result<Option<String>, Unreadable> {
        self.request.text_of("user", "id")
    }

    /// The user's name, or the id of a user without a name.
    pub fn user_name(&self) -> Result<Option<String>, Unreadable> {
        self.request.user_name()
    }

    /// `channel_type:channel_id`
    pub fn cid(&self) -> Result<Option<String>, Unreadable> {
        self.request.message_text("cid")
    }

    /// Whether this is a click or an input rather than the command's first call.
    pub fn is_action(&self) -> Result<bool, Unreadable> {
        Ok(self.request.object("form_data")?.is_some_and(|form| !form.is_empty()))
    }

    /// The value of the button or input of that name.
    pub fn form(&self, name: &str) -> Result<Option<String>, Unreadable> {
        self.request.text_of("form_data", name)
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

    /// A message that only the sender sees and that is not stored. It removes the buttons of an earlier answer.
    pub fn ephemeral(&self, text: impl Into<String>) -> Answer {
        let answer = self.pass().message_type("ephemeral").text(text);
        match self.is_action() {
            Ok(true) => answer.attachments(Value::Null),
            Ok(false) | Err(_) => answer,
        }
    }

    /// A message for everybody in the channel. It removes the buttons of an earlier answer.
    pub fn regular(&self, text: impl Into<String>) -> Answer {
        self.pass().message_type("regular").text(text).attachments(Value::Null)
    }

    /// An error that only the sender sees.
    pub fn error(&self, text: impl AsRef<str>) -> Answer {
        Answer::error(text.as_ref())
    }

    /// Deletes the message, as after a click on "Cancel".
    pub fn cancel(&self) -> Answer {
        Answer::nothing()
    }

    /// The message unchanged.
    pub fn pass(&self) -> Answer {
        Answer::of(self.request.message())
    }
}
