//! What goes back to Stream: a message, changed as far as the handler says.

use bytes::Bytes;
use serde_json::{Value, json};
use streamgate_core::fields::Fields;

/// The answer to a hook. Made by [`BeforeMessageSend`](super::BeforeMessageSend) or [`Command`](super::Command), then
/// changed field by field; what is not named stays as Stream sent it.
#[derive(Clone, Debug)]
pub struct Answer {
    /// None deletes the message.
    message: Option<Fields>,
}

impl Answer {
    /// The message with all its fields, unknown ones too.
    pub(super) fn of(message: Fields) -> Answer {
        Answer { message: Some(message) }
    }

    /// A message of type `error`, and nothing else of it.
    pub(super) fn error(text: &str) -> Answer {
        Answer::of(Fields::default()).message_type("error").text(text)
    }

    /// `{"message":null}`
    pub(super) fn nothing() -> Answer {
        Answer { message: None }
    }

    /// Sets any field of the message, a custom one too.
    pub fn set(mut self, field: &str, value: impl Into<Value>) -> Answer {
        if let Some(message) = &mut self.message {
            message.set(field, &value.into());
        }
        self
    }

    pub fn text(self, text: impl Into<String>) -> Answer {
        self.set("text", text.into())
    }

    /// `regular`, `ephemeral`, `error` or `system`.
    pub fn message_type(self, message_type: &str) -> Answer {
        self.set("type", message_type)
    }

    /// Whether the message counts as unread and notifies.
    pub fn silent(self, silent: bool) -> Answer {
        self.set("silent", silent)
    }

    /// Whether a reply in a thread shows in the channel too.
    pub fn show_in_channel(self, show: bool) -> Answer {
        self.set("show_in_channel", show)
    }

    /// Translations, as Stream writes them: `{"en_text": "…", "language": "en"}`.
    pub fn i18n(self, translations: impl Into<Value>) -> Answer {
        self.set("i18n", translations)
    }

    /// Message Markup Language, for clients that draw it.
    pub fn mml(self, mml: impl Into<String>) -> Answer {
        self.set("mml", mml.into())
    }

    /// Replaces all attachments; `Value::Null` removes them.
    pub fn attachments(self, attachments: impl Into<Value>) -> Answer {
        self.set("attachments", attachments)
    }

    /// Adds one attachment to those that are there.
    pub fn attachment(mut self, attachment: impl Into<Value>) -> Answer {
        if let Some(message) = &mut self.message {
            message.push("attachments", &attachment.into());
        }
        self
    }

    /// Adds an attachment of buttons. A click sends the command again, with the button's name and value in `form_data`.
    pub fn buttons(self, buttons: impl IntoIterator<Item = Button>) -> Answer {
        let actions: Vec<_> = buttons.into_iter().map(Button::into_value).collect();
        self.attachment(json!({"type": "text", "actions": actions}))
    }

    /// The bytes that Stream gets.
    pub(super) fn into_bytes(self) -> Bytes {
        let message = self.message.map_or_else(|| "null".to_owned(), |message| message.to_json());
        format!("{{\"message\":{message}}}").into()
    }
}

/// How a button looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Default,
    Primary,
}

/// A button under a message.
#[derive(Clone, Debug)]
pub struct Button {
    name: String,
    value: String,
    text: String,
    style: Style,
}

impl Button {
    /// `name` and `value` come back in `form_data`; `text` is what the user reads.
    pub fn new(name: impl Into<String>, value: impl Into<String>, text: impl Into<String>) -> Button {
        Button { name: name.into(), value: value.into(), text: text.into(), style: Style::Default }
    }

    pub fn style(self, style: Style) -> Button {
        Button { style, ..self }
    }

    fn into_value(self) -> Value {
        let style = match self.style {
            Style::Default => "default",
            Style::Primary => "primary",
        };
        json!({"type": "button", "name": self.name, "value": self.value, "text": self.text, "style": style})
    }
}
