//! Kinds of webhook, their ids, and the idempotency key that everything downstream deduplicates on.

use sha2::{Digest, Sha256};

/// Longest X-Webhook-Id that is kept as it is, in bytes. Stream sends UUIDs; a longer one is not Stream's, and is hashed.
pub const MAX_ID: usize = 128;

/// The three kinds of webhook that Stream sends. Their names are part of idempotency keys, routing keys and labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Push,
    BeforeMessageSend,
    CustomCommand,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Push => "push",
            Kind::BeforeMessageSend => "before-message-send",
            Kind::CustomCommand => "custom-command",
        }
    }

    pub fn parse(name: &str) -> Option<Kind> {
        [Kind::Push, Kind::BeforeMessageSend, Kind::CustomCommand].into_iter().find(|kind| kind.as_str() == name)
    }
}

/// The X-Webhook-Id header as a webhook id; `None` if it is absent or empty. A value over [`MAX_ID`] bytes or outside
/// printable ASCII is replaced by its digest, so that an id is always safe to log, to store and to send in a header.
pub fn header_id(header: Option<&[u8]>) -> Option<String> {
    let id = header.filter(|id| !id.is_empty())?;
    let is_safe = id.len() <= MAX_ID && id.iter().all(|byte| matches!(byte, 0x20..=0x7e));
    Some(if is_safe { id.iter().map(|byte| char::from(*byte)).collect() } else { digest(id) })
}

/// The webhook id of a body that came without one: `sha256:` and its hex digest.
pub fn body_id(body: &[u8]) -> String {
    digest(body)
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// What identifies a webhook of an app and kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyedBy<'a> {
    /// The body that Stream signed, whatever its id: the signature identifies it.
    Body,
    /// The X-Webhook-Id, or the id that replaces it. It is not signed, so the key also contains a part of the signature: the
    /// same id with another body neither hides an event nor repeats one.
    Id(&'a str),
}

/// What is known about a push when its key is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PushFacts<'a> {
    pub id: &'a str,
    /// The type that the path of a pending-message callback implies.
    pub path_type: Option<&'a str>,
    /// Whether the signed body contains its date.
    pub is_dated: bool,
}

/// The setting `dedup.by`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DedupBy {
    #[default]
    Body,
    Id,
}

impl DedupBy {
    /// A body without a date may legitimately occur again, so two equal events would count as one. Callbacks of pending
    /// messages have no date, but there is only one of each for a message.
    pub fn of_push<'a>(self, push: &PushFacts<'a>) -> KeyedBy<'a> {
        match self {
            DedupBy::Body if push.is_dated || push.path_type.is_some() => KeyedBy::Body,
            DedupBy::Body | DedupBy::Id => KeyedBy::Id(push.id),
        }
    }
}

/// `app:kind:` and the first 32 hex digits of the signature, or `app:kind:id:` and the first 16. `path_type` and a slash precede
/// the last part, because both callbacks of a pending message may carry the same body.
pub fn idempotency_key(app: &str, kind: Kind, path_type: Option<&str>, by: KeyedBy<'_>, signature_hex: &str) -> String {
    let signature = |digits: usize| signature_hex.get(..digits).unwrap_or(signature_hex);
    let (place, slash) = path_type.map_or(("", ""), |path| (path, "/"));
    match by {
        KeyedBy::Body => format!("{app}:{}:{place}{slash}{}", kind.as_str(), signature(32)),
        KeyedBy::Id(id) => format!("{app}:{}:{place}{slash}{id}:{}", kind.as_str(), signature(16)),
    }
}

/// 128 bits that represent a key where millions of keys are remembered.
pub fn fingerprint(key: &str) -> [u8; 16] {
    let digest: [u8; 32] = Sha256::digest(key).into();
    let [first @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = digest;
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        let long = vec![b'a'; 129];
        let cases: [(Option<&[u8]>, Option<&str>); 6] = [
            (Some(b"0190-abc"), Some("0190-abc")),
            (Some(b"with space"), Some("with space")),
            (None, None),
            (Some(b""), None),
            (Some(b"tab\t"), Some(&digest(b"tab\t"))),
            (Some(&long), Some(&digest(&long))),
        ];
        for (header, id) in cases {
            assert_eq!(header_id(header).as_deref(), id);
        }
        let of_body = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
        assert_eq!(body_id(b"{}"), of_body);
    }

    #[test]
    fn a_table_of_keys() {
        let (a, b) = ("a".repeat(64), "b".repeat(64));
        let push = |path_type, by, signature: &str| idempotency_key("chat", Kind::Push, path_type, by, signature);
        let cases = [
            (push(None, KeyedBy::Body, &a), "chat:push:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
            (push(None, KeyedBy::Body, &b), "chat:push:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"),
            (push(None, KeyedBy::Id("id"), &a), "chat:push:id:aaaaaaaaaaaaaaaa"),
            (push(None, KeyedBy::Id("id"), &b), "chat:push:id:bbbbbbbbbbbbbbbb"),
            (push(Some("p.q"), KeyedBy::Body, &a), "chat:push:p.q/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
            (push(Some("p.q"), KeyedBy::Id("id"), &a), "chat:push:p.q/id:aaaaaaaaaaaaaaaa"),
        ];
        for (key, expected) in cases {
            assert_eq!(key, expected);
        }
        // No id makes a key of the other form: one has a second colon after the kind, the other does not.
        assert_ne!(push(None, KeyedBy::Id(""), &a), push(None, KeyedBy::Body, &a));
    }

    #[test]
    fn the_idempotency_key_says_which_pushes_are_the_same() {
        let facts = |path_type, is_dated| PushFacts { id: "id", path_type, is_dated };
        let cases = [
            (DedupBy::Body, facts(None, true), KeyedBy::Body),
            (DedupBy::Body, facts(None, false), KeyedBy::Id("id")),
            (DedupBy::Body, facts(Some("p.q"), false), KeyedBy::Body),
            (DedupBy::Id, facts(None, true), KeyedBy::Id("id")),
            (DedupBy::Id, facts(Some("p.q"), true), KeyedBy::Id("id")),
        ];
        for (by, push, expected) in cases {
            assert_eq!(by.of_push(&push), expected, "{by:?} {push:?}");
        }
    }

    #[test]
    fn kinds_read_back() {
        for kind in [Kind::Push, Kind::BeforeMessageSend, Kind::CustomCommand] {
            assert_eq!(Kind::parse(kind.as_str()), Some(kind));
        }
    }
}
