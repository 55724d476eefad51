//! The strings in a message that a chat user wrote and others will read, with their positions in the JSON. Ids, users and the
//! addresses of uploads are never among them.
//!
//! The JSON is walked token by token, without a tree and without recursion, and read as Stream's clients show it: an unpaired
//! surrogate is U+FFFD, and every value of a repeated key counts.

use crate::peek::unescaped;
use std::borrow::Cow;
use std::ops::Range;

/// Most keys and bytes of a message: far over what Stream accepts (5 KB), and where judging gets slow.
const MAX_FIELDS: usize = 4096;
const MAX_BYTES: usize = 256 << 10;

/// The parts of a message that rules can judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The text with its derivatives: `html`, `mml`, and the quoted message.
    Text,
    /// The text after a command.
    Args,
    I18n,
    Attachments,
    Poll,
    /// Fields unknown to Stream.
    Custom,
}

impl Part {
    pub const ALL: [Part; 6] = [Part::Text, Part::Args, Part::I18n, Part::Attachments, Part::Poll, Part::Custom];

    pub fn as_str(self) -> &'static str {
        match self {
            Part::Text => "text",
            Part::Args => "args",
            Part::I18n => "i18n",
            Part::Attachments => "attachments",
            Part::Poll => "poll",
            Part::Custom => "custom",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// The message's own `text`.
    Text,
    /// Text with tags, which are not shown: `html` and `mml`.
    Markup,
    /// The target of a click on an attachment.
    Target,
    /// The address in the text from which Stream made an attachment; not prose.
    Preview,
    Other,
}

/// One string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Written<'m> {
    pub(super) text: Cow<'m, str>,
    pub(super) part: Part,
    pub(super) form: Form,
    /// Whether Stream accepts changes to it in an answer.
    pub(super) is_changeable: bool,
    /// The range of its literal in the message's JSON, including the quotes.
    pub(super) literal: Range<usize>,
}

/// The message is too long or has too many fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooMuch;

impl Written<'_> {
    /// Whether a reader sees it. An empty text counts, because a rule may reject empty texts.
    pub(super) fn is_read(&self) -> bool {
        match self.form {
            Form::Text => true,
            Form::Preview => false,
            Form::Markup | Form::Target | Form::Other => !self.text.is_empty(),
        }
    }
}

/// Fields of a message that Stream sets, or that are not prose.
const STREAMS: [&str; 45] = [
    "before_message_send_failed",
    "channel",
    "cid",
    "command",
    "created_at",
    "deleted_at",
    "deleted_for_me",
    "deleted_reply_count",
    "draft",
    "id",
    "image_labels",
    "latest_reactions",
    "member",
    "mentioned_channel",
    "mentioned_here",
    "mentioned_roles",
    "mentioned_users",
    "message_text_updated_at",
    "moderation",
    "moderation_details",
    "own_reactions",
    "parent_id",
    "pin_expires",
    "pinned",
    "pinned_at",
    "pinned_by",
    "poll_id",
    "quoted_message_id",
    "reaction_counts",
    "reaction_groups",
    "reaction_scores",
    "reminder",
    "reply_count",
    "restricted_visibility",
    "shadowed",
    "shared_location",
    "show_in_channel",
    "silent",
    "skip_enrich_url",
    "skip_push",
    "thread_participants",
    "type",
    "updated_at",
    "user",
    "user_id",
];

/// Which values under a key are not prose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Skip {
    /// Ids and times: strings, and lists of them. Objects count, because a user could hide words there.
    Scalars,
    /// Users.
    Objects,
    /// Addresses of uploads.
    All,
}

/// What to skip under this key, at any depth.
fn skip(key: &str) -> Option<Skip> {
    const USERS: [&str; 4] = ["user", "users", "created_by", "updated_by"];
    const UPLOADS: [&str; 4] = ["image_url", "asset_url", "thumb_url", "mime_type"];
    let ends = |ends: &[&str]| ends.iter().any(|end| key.ends_with(end));
    match key {
        _ if UPLOADS.contains(&key) => Some(Skip::All),
        _ if USERS.contains(&key) || ends(&["_user"]) => Some(Skip::Objects),
        "id" | "ids" => Some(Skip::Scalars),
        _ if ends(&["_id", "_ids", "_at"]) => Some(Skip::Scalars),
        _ => None,
    }
}

/// What the strings of a value count as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counts {
    Nothing,
    /// The message itself, or the message it quotes.
    Message {
        is_quoted: bool,
    },
    As {
        part: Part,
        form: Form,
        is_changeable: bool,
        skip: Option<Skip>,
    },
}

impl Counts {
    /// What the fields of an object or the items of a list count as, if the container counts as this.
    fn within(self, is_object: bool) -> Counts {
        match self {
            Counts::As { skip: Some(Skip::Objects), .. } if is_object => Counts::Nothing,
            Counts::As { part, form, is_changeable, skip: Some(Skip::Scalars) } if is_object => {
                Counts::As { part, form, is_changeable, skip: None }
            }
            Counts::Nothing | Counts::Message { .. } | Counts::As { .. } => self,
        }
    }

    /// What the value of a key counts as, in an object that counts as this.
    fn under(self, key: &str) -> Counts {
        match self {
            Counts::Nothing => Counts::Nothing,
            Counts::Message { is_quoted } => {
                let part = |part, is_changeable| {
                    // A quoted message belongs to somebody else, and the answer cannot change it.
                    let part = if is_quoted { Part::Text } else { part };
                    let form = match key {
                        "text" if !is_quoted => Form::Text,
                        "html" | "mml" => Form::Markup,
                        _ => Form::Other,
                    };
                    Counts::As { part, form, is_changeable: is_changeable && !is_quoted, skip: None }
                };
                match key {
                    "text" => part(Part::Text, true),
                    "html" | "mml" => part(Part::Text, false),
                    "args" => part(Part::Args, false),
                    "i18n" => part(Part::I18n, true),
                    "attachments" => part(Part::Attachments, true),
                    "poll" => part(Part::Poll, false),
                    "quoted_message" if is_quoted => Counts::Nothing,
                    "quoted_message" => Counts::Message { is_quoted: true },
                    _ if STREAMS.contains(&key) => Counts::Nothing,
                    _ => part(Part::Custom, true).under(key),
                }
            }
            Counts::As { part: Part::Attachments, .. } if is_media(key) => Counts::Nothing,
            Counts::As { part: Part::Poll, .. } if key == "voting_visibility" => Counts::Nothing,
            Counts::As { part, is_changeable, form, .. } => {
                let form = match key {
                    "title_link" | "author_link" if part == Part::Attachments => Form::Target,
                    "og_scrape_url" if part == Part::Attachments => Form::Preview,
                    _ => form,
                };
                match skip(key) {
                    Some(Skip::All) => Counts::Nothing,
                    skip => Counts::As { part, form, is_changeable, skip },
                }
            }
        }
    }
}

/// Whether the value is shown or played rather than read.
fn is_media(key: &str) -> bool {
    let is_address = key.ends_with("_url") && key != "og_scrape_url";
    is_address || key.ends_with("_icon") || ["type", "url", "giphy"].contains(&key)
}

/// Most bytes of a language code with its quotes.
const MAX_LANGUAGE: usize = 14;

/// The strings that count in `message`, a JSON object.
pub(super) fn written<'m>(message: &'m str, parts: &[Part]) -> Result<Vec<Written<'m>>, TooMuch> {
    if message.len() > MAX_BYTES {
        return Err(TooMuch);
    }
    let mut written = Vec::new();
    // Open objects and lists, the innermost last: whether each is an object, and what it counts as.
    let mut open: Vec<(bool, Counts)> = Vec::new();
    let (mut at, mut fields) = (0, 0);
    let (mut is_at_key, mut value, mut key) = (false, Counts::Message { is_quoted: false }, Cow::Borrowed(""));
    while let Some(byte) = message.as_bytes().get(at) {
        let here = at;
        at += 1;
        // In a list each value counts as the list does.
        let counts = match open.last() {
            Some((false, counts)) => *counts,
            Some((true, _)) | None => value,
        };
        match byte {
            b'"' => {
                let end = end_of_string(message.as_bytes(), at);
                let inner = message.get(at..end).unwrap_or_default();
                at = end + 1;
                match (is_at_key, counts) {
                    (true, _) => {
                        fields += 1;
                        if fields > MAX_FIELDS {
                            return Err(TooMuch);
                        }
                        let around = open.last().map_or(Counts::Nothing, |(_, around)| *around);
                        key = unescaped(inner);
                        value = around.under(&key);
                        is_at_key = false;
                    }
                    // A language code.
                    (false, Counts::As { part: Part::I18n, .. }) if at - here <= MAX_LANGUAGE && key == "language" => {}
                    (false, Counts::As { skip: Some(Skip::Scalars), .. }) => {}
                    (false, Counts::As { part, form, is_changeable, .. }) if parts.contains(&part) => {
                        let (text, literal) = (unescaped(inner), here..at.min(message.len()));
                        written.push(Written { text, part, form, is_changeable, literal });
                    }
                    (false, _) => {}
                }
            }
            b'{' | b'[' => {
                is_at_key = *byte == b'{';
                open.push((is_at_key, counts.within(is_at_key)));
            }
            b'}' | b']' => {
                open.pop();
                is_at_key = false;
            }
            b',' => is_at_key = open.last().is_some_and(|(is_object, _)| *is_object),
            _ => {}
        }
    }
    Ok(written)
}

/// The end of the string whose first byte is at `at`.
fn end_of_string(json: &[u8], mut at: usize) -> usize {
    while let Some(byte) = json.get(at).filter(|byte| **byte != b'"') {
        at += if *byte == b'\\' { 2 } else { 1 };
    }
    at.min(json.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn texts(message: &str, parts: &[Part]) -> Vec<(String, Part, bool)> {
        let written = written(message, parts).unwrap();
        written.into_iter().map(|one| (one.text.into_owned(), one.part, one.is_changeable)).collect()
    }

    #[test]
    fn rules_read_every_visible_string_and_no_other() {
        let message = r#"{
            "id": "no", "type": "regular", "cid": "no:no", "command": "no", "user": {"id": "no", "name": "no"},
            "mentioned_users": [{"name": "no"}], "parent_id": "no",
            "text": "text", "html": "html", "mml": "mml", "args": "args",
            "i18n": {"en_text": "english", "language": "no"},
            "attachments": [
                {"type": "no", "title": "title", "title_link": "link", "image_url": "no", "asset_url": "no",
                 "thumb_url": "no", "mime_type": "no", "fields": [{"title": "field", "value": "value"}], "file_size": 7,
                 "actions": [{"type": "no", "text": "button"}], "file_id": "no", "author_icon": "no",
                 "giphy": {"original": {"url": "no"}}}
            ],
            "poll": {"id": "no", "name": "question", "options": [{"id": "no", "text": "option"}], "created_by": {"name": "no"}},
            "quoted_message": {"text": "quoted", "user": {"name": "no"}, "attachments": [{"title": "quoted title"}],
                               "quoted_message": {"text": "no"}},
            "mood": "custom", "nested": {"deep": [["list", {"note": "note", "order_id": "no"}]]}, "order_id": "no", "sent_at": "no",
            "tag_ids": ["no"], "own": {"user": "scalar"}, "hidden_id": {"x": "object"}, "friend": {"user": {"name": "no"}}
        }"#;
        let expected: [(&str, Part, bool); 19] = [
            ("text", Part::Text, true),
            ("html", Part::Text, false),
            ("mml", Part::Text, false),
            ("args", Part::Args, false),
            ("english", Part::I18n, true),
            ("title", Part::Attachments, true),
            ("link", Part::Attachments, true),
            ("field", Part::Attachments, true),
            ("value", Part::Attachments, true),
            ("button", Part::Attachments, true),
            ("question", Part::Poll, false),
            ("option", Part::Poll, false),
            ("quoted", Part::Text, false),
            ("quoted title", Part::Text, false),
            ("custom", Part::Custom, true),
            ("list", Part::Custom, true),
            ("note", Part::Custom, true),
            ("scalar", Part::Custom, true),
            ("object", Part::Custom, true),
        ];
        let expected: Vec<_> =
            expected.into_iter().filter(|it| !it.0.is_empty()).map(|it| (it.0.to_owned(), it.1, it.2)).collect();
        assert_eq!(texts(message, &Part::ALL), expected);
        for part in Part::ALL {
            let of_part: Vec<_> = expected.iter().filter(|one| one.1 == part).cloned().collect();
            assert_eq!(texts(message, &[part]), of_part);
        }
    }

    #[test]
    fn halves_and_repeats_are_read() {
        let read = |message: &str| texts(message, &[Part::Text]).into_iter().map(|one| one.0).collect::<Vec<_>>();
        assert_eq!(read(r#"{"text":"casino \ud83d"}"#), ["casino \u{fffd}"]);
        assert_eq!(
            read(r#"{"text":"\ude00 casino \ud83d\u0041 \ud83d\ud83d\ude00"}"#),
            ["\u{fffd} casino \u{fffd}A \u{fffd}\u{1f600}"]
        );
        assert_eq!(read(r#"{"text":"one","t\u0065xt":"\"two\"\\\/"}"#), ["one", "\"two\"\\/"]);
        assert_eq!(read(r#"{"\ud83d":{"x":1},"text":"one"}"#), ["one"]);
        let many: Vec<_> = (0..MAX_FIELDS).map(|number| format!("\"{number}\":0")).collect();
        assert!(written(&format!("{{{}}}", many.join(",")), &Part::ALL).is_ok());
        assert!(written(&format!("{{{},\"more\":0}}", many.join(",")), &Part::ALL).is_err());
        assert!(written(&format!("{{\"text\":\"{}\"}}", "x".repeat(MAX_BYTES)), &Part::ALL).is_err());
    }

    /// A JSON string in which any UTF-16 unit may be escaped; an unpaired surrogate always is.
    fn literal(units: &[(u16, bool)]) -> String {
        let escape = |unit: u16| format!("\\u{unit:04x}");
        let mut text = String::from("\"");
        for (unit, escaped) in units {
            match char::from_u32(u32::from(*unit)) {
                Some(plain) if !escaped && plain >= ' ' && plain != '"' && plain != '\\' => text.push(plain),
                _ => text.push_str(&escape(*unit)),
            }
        }
        text.push('"');
        text
    }

    proptest! {
        /// Whatever a chat user sends, however it is escaped: the rules read the text that clients show.
        #[test]
        fn rules_read_what_clients_show(units in proptest::collection::vec((any::<u16>(), any::<bool>()), 0..40), place in 0..4_usize) {
            let literal = literal(&units);
            let expected = String::from_utf16_lossy(&units.iter().map(|(unit, _)| *unit).collect::<Vec<_>>());
            let message = match place {
                0 => format!("{{\"text\":{literal}}}"),
                1 => format!("{{ \"n\" : [ 1.5 , {{}} ] , \"attachments\" : [ {{ \"title\" : {literal} }} ] }}"),
                2 => format!("{{\"i18n\":{{\"de_text\":{literal}}},\"text\":\"\"}}"),
                _ => format!("{{\"own\":[[{literal}]]}}"),
            };
            let read = written(&message, &Part::ALL).unwrap();
            let read: Vec<_> = read.iter().filter(|one| one.literal.len() > 2 || units.is_empty()).collect();
            prop_assert!(read.iter().any(|one| one.text == expected && message[one.literal.clone()] == literal), "{message}");
        }

        #[test]
        fn nothing_panics(message in any::<String>(), json in "[\\[\\]{}\",:\\\\u0d8text ]{0,40}") {
            for message in [message, json] {
                for one in written(&message, &Part::ALL).unwrap() {
                    prop_assert!(message.get(one.literal).is_some());
                }
            }
        }
    }
}
