//! Kinds of webhook, their ids, and the idempotency key that everything downstream deduplicates on.

use sha2::{Digest, Sha256};

/// Longest X-Webhook-Id that is kept as it is, in bytes. Stream sends UUIDs; a longer one is a stranger's, and is hashed.
pub const MAX_ID: usize = 128;

/// The three kinds of webhook that Stream sends. Their names are part of the idempotency key, of routing keys and of labels.
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

/// The X-Webhook-Id header as a webhook id; none where it is absent or empty. One that is over [`MAX_ID`] bytes or outside
/// printable ASCII is replaced by its own digest, so that an id is always safe to log, to store and to send in a header.
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

/// `app:kind:id:sig16`. The id is not signed, so the signature's first 16 hex digits are part of the key: whoever replays
/// an id with another signed body gets another key, and cannot shadow an event.
pub fn idempotency_key(app: &str, kind: Kind, id: &str, signature_hex: &str) -> String {
    let sig16 = signature_hex.get(..16).unwrap_or(signature_hex);
    format!("{app}:{}:{id}:{sig16}", kind.as_str())
}

/// 128 bits that stand for a key where millions of keys are remembered.
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
    fn keys_differ_by_signature() {
        let one = idempotency_key("chat", Kind::Push, "id", &"a".repeat(64));
        assert_eq!(one, "chat:push:id:aaaaaaaaaaaaaaaa");
        assert_ne!(one, idempotency_key("chat", Kind::Push, "id", &"b".repeat(64)));
    }

    #[test]
    fn kinds_read_back() {
        for kind in [Kind::Push, Kind::BeforeMessageSend, Kind::CustomCommand] {
            assert_eq!(Kind::parse(kind.as_str()), Some(kind));
        }
    }
}
