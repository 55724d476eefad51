//! Reads a hook's signed body, and keeps what is unreadable apart from what is absent.

use crate::handler::HandlerError;
use serde_json::Value;
use streamgate_core::fields::Fields;
use streamgate_core::hook;

/// A hook's body, or a field of it, cannot be read: it is not JSON, has too many fields, or has a value of the wrong type.
///
/// A handler passes it on with `?`: then `on_unreadable` decides about a message that is about to be sent, and the policy
/// answers a command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} cannot be read")]
pub struct Unreadable(String);

impl From<Unreadable> for HandlerError {
    fn from(error: Unreadable) -> HandlerError {
        HandlerError::unreadable(error.to_string())
    }
}

/// A request and its message. `None`: unreadable.
#[derive(Clone, Debug)]
pub(super) struct Request {
    request: Option<Fields>,
    message: Option<Fields>,
}

impl Request {
    pub(super) fn read(body: &[u8]) -> Request {
        // Invalid UTF-8 is replaced as Stream's clients would show it.
        let body = String::from_utf8_lossy(body);
        let request = Fields::parse(body.as_bytes());
        let raw = request.as_ref().map(|request| request.get("message").map(serde_json::value::RawValue::get));
        let message = match raw {
            Some(None | Some("null")) => Some(Fields::default()),
            Some(Some(raw)) => Fields::parse(raw.as_bytes()),
            // The request has too many fields; its message may still be readable.
            None => hook::message(body.as_bytes()).and_then(|raw| Fields::parse(raw.get().as_bytes())),
        };
        Request { request, message }
    }

    /// The message; empty if it cannot be read, which as an answer changes nothing.
    pub(super) fn message(&self) -> Fields {
        self.message.clone().unwrap_or_default()
    }

    pub(super) fn of_message(&self, field: &str) -> Result<Option<Value>, Unreadable> {
        value(self.message.as_ref().ok_or_else(|| unreadable("the message"))?, field)
    }

    pub(super) fn of_request(&self, field: &str) -> Result<Option<Value>, Unreadable> {
        value(self.fields()?, field)
    }

    /// A string of the message.
    pub(super) fn message_text(&self, field: &str) -> Result<Option<String>, Unreadable> {
        text(self.message.as_ref().ok_or_else(|| unreadable("the message"))?, field)
    }

    /// A string of an object of the request.
    pub(super) fn text_of(&self, object: &str, field: &str) -> Result<Option<String>, Unreadable> {
        match self.object(object)? {
            Some(fields) => text(&fields, field),
            None => Ok(None),
        }
    }

    pub(super) fn object(&self, name: &str) -> Result<Option<Fields>, Unreadable> {
        object(self.fields()?, name)
    }

    /// The user's name, or the id of a user without a name. Stream writes an app's own fields, the name among them, either
    /// next to the id or in an object `Custom`, as in the examples of its documentation.
    pub(super) fn user_name(&self) -> Result<Option<String>, Unreadable> {
        let Some(user) = self.object("user")? else { return Ok(None) };
        let named = |fields: &Fields| fields.text("name").filter(|name| !name.is_empty());
        let custom = || ["Custom", "custom"].iter().find_map(|field| named(&user.object(field)?));
        match named(&user).or_else(custom) {
            Some(name) => Ok(Some(name)),
            None => text(&user, "id"),
        }
    }

    fn fields(&self) -> Result<&Fields, Unreadable> {
        self.request.as_ref().ok_or_else(|| unreadable("the request"))
    }
}

fn unreadable(what: &str) -> Unreadable {
    Unreadable(what.to_owned())
}

/// Whether a field is missing or null.
fn is_absent(fields: &Fields, name: &str) -> bool {
    fields.get(name).is_none_or(|value| value.get() == "null")
}

fn value(fields: &Fields, name: &str) -> Result<Option<Value>, Unreadable> {
    match fields.value(name) {
        None if !is_absent(fields, name) => Err(unreadable(name)),
        value => Ok(value.filter(|value| !value.is_null())),
    }
}

fn text(fields: &Fields, name: &str) -> Result<Option<String>, Unreadable> {
    match fields.text(name) {
        None if !is_absent(fields, name) => Err(unreadable(name)),
        text => Ok(text),
    }
}

fn object(fields: &Fields, name: &str) -> Result<Option<Fields>, Unreadable> {
    match fields.object(name) {
        None if !is_absent(fields, name) => Err(unreadable(name)),
        object => Ok(object),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreadable_message_is_not_taken_for_an_empty_one() {
        let text_of = |body: &[u8]| Request::read(body).message_text("text").map_err(|error| error.to_string());
        let text = |text: &str| Ok(Some(text.to_owned()));
        let many: Vec<_> = (0..5000).map(|number| format!("\"{number}\":0")).collect();
        let crowded = format!("{{\"message\":{{\"text\":\"x\"}},{}}}", many.join(","));
        for (body, expected) in [
            (&br#"{"message":{"text":"casino \ud83d"}}"#[..], text("casino \u{fffd}")),
            (br#"{"message":{"\ud83d":1,"text":"casino"}}"#, text("casino")),
            (br#"{"\ud83d":1,"message":{"text":"casino"}}"#, text("casino")),
            (b"{\"message\":{\"text\":\"casino \xff\"}}", text("casino \u{fffd}")),
            (crowded.as_bytes(), text("x")),
            (b"{}", Ok(None)),
            (br#"{"message":null}"#, Ok(None)),
            (br#"{"message":{}}"#, Ok(None)),
            (br#"{"message":{"text":null}}"#, Ok(None)),
            (br#"{"message":{"text":7}}"#, Err("text cannot be read".to_owned())),
            (br#"{"message":7}"#, Err("the message cannot be read".to_owned())),
            (b"no JSON", Err("the message cannot be read".to_owned())),
        ] {
            assert_eq!(text_of(body), expected, "{}", String::from_utf8_lossy(&body[..body.len().min(80)]));
        }
        let request = Request::read(crowded.as_bytes());
        assert_eq!(request.user_name(), Err(unreadable("the request")));
        assert_eq!(Request::read(br#"{"user":7}"#).text_of("user", "id"), Err(unreadable("user")));
        assert_eq!(Request::read(b"{}").text_of("user", "id"), Ok(None));
    }

    #[test]
    fn a_users_name_is_read_from_either_shape() {
        let named = |user: &str| Request::read(format!("{{\"user\":{user}}}").as_bytes()).user_name().unwrap();
        for (user, expected) in [
            (r#"{"id":"ann","name":"Ann"}"#, Some("Ann")),
            (r#"{"id":"ann","Custom":{"name":"Ann"}}"#, Some("Ann")),
            (r#"{"id":"ann","custom":{"name":"Ann"}}"#, Some("Ann")),
            (r#"{"id":"ann","name":"","Custom":{"name":"Ann"}}"#, Some("Ann")),
            (r#"{"id":"ann","name":"Ann","Custom":{"name":"Other"}}"#, Some("Ann")),
            (r#"{"id":"ann","Custom":{"name":7}}"#, Some("ann")),
            (r#"{"id":"ann","Custom":"Ann"}"#, Some("ann")),
            (r#"{"id":"ann"}"#, Some("ann")),
            ("{}", None),
            ("null", None),
        ] {
            assert_eq!(named(user).as_deref(), expected, "{user}");
        }
    }
}
