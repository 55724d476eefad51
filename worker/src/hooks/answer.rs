//! The answer that goes back to Stream: a message, changed only where the handler changed it.

use bytes::Bytes;
use serde_json::{Value, json};
use streamgate_core::fields::Fields;

/// The answer to a hook. [`BeforeMessageSend`](super::BeforeMessageSend) and [`Command`](super::Command) make it; setters then
/// change single fields, and all other fields stay as Stream sent them.
#[derive(Clone, Debug)]
pub struct Answer {
    /// `None` deletes the message.
    message: Option<Fields>,
}

impl Answer {
    /// The message with all its fields, including unknown ones.
    pub(super) fn of(message: Fields) -> Answer {
        Answer { message: Some(message) }
    }

    /// A message that has only the type `error` and a text.
    pub(super) fn error(text: &str) -> Answer {
        Answer::of(Fields::default()).message_type("error").text(text)
    }

    /// `{"message":null}`
    pub(super) fn nothing() -> Answer {
        Answer { message: None }
    }

    /// Sets any field of the message, also a custom one.
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

    /// A silent message does not count as unread and notifies nobody.
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

    /// Appends one attachment.
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
