//! Judges a request before its body is read: the form of its headers, the API key, and the declared length.

use crate::{
    apps::{AppKey, Apps},
    inflate::Declared,
    reason::Reason,
    signature::Signature,
};

/// Longest X-Api-Key, in bytes. Stream's have 12 characters.
const MAX_API_KEY: usize = 128;

/// A header that may occur only once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Single<'a> {
    Absent,
    One(&'a [u8]),
    Repeated,
}

/// What is known about a request before its body.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    pub api_key: Single<'a>,
    pub signature: Single<'a>,
    pub content_encoding: Option<&'a [u8]>,
    /// The Content-Length, if there is one.
    pub content_length: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most bytes of a body, on the wire and after inflation.
    pub max_body: usize,
}

/// A request whose body is worth reading.
#[derive(Clone, Copy, Debug)]
pub struct Admitted<'a> {
    pub api_key: &'a str,
    pub key: &'a AppKey,
    pub signature: Signature,
    pub declared: Declared,
}

/// Only refuses for good: a stranger learns nothing about the load, and Stream never repeats what can never be accepted.
pub fn admit<'a>(facts: &Facts<'a>, apps: &'a Apps, limits: &Limits) -> Result<Admitted<'a>, Reason> {
    let api_key = match facts.api_key {
        Single::Absent => apps.only().ok_or(Reason::MissingApiKey)?.0,
        Single::One(key) => api_key(key).ok_or(Reason::MalformedApiKey)?,
        Single::Repeated => return Err(Reason::MalformedApiKey),
    };
    let signature = match facts.signature {
        Single::Absent => return Err(Reason::MissingSignature),
        Single::One(header) => Signature::parse(header).ok_or(Reason::MalformedSignature)?,
        Single::Repeated => return Err(Reason::MalformedSignature),
    };
    let key = apps.get(api_key).ok_or(Reason::UnknownKey)?;
    let declared = declared(facts.content_encoding.unwrap_or_default()).ok_or(Reason::UnsupportedEncoding)?;
    if facts.content_length.is_some_and(|length| length > limits.max_body as u64) {
        return Err(Reason::TooLarge);
    }
    Ok(Admitted { api_key, key, signature, declared })
}

fn api_key(header: &[u8]) -> Option<&str> {
    let well_formed = (1..=MAX_API_KEY).contains(&header.len()) && header.iter().all(u8::is_ascii_graphic);
    if well_formed { std::str::from_utf8(header).ok() } else { None }
}

/// Gzip is recognised by its magic bytes instead; deflate and br have none. `None` for an encoding that can never be read.
fn declared(encoding: &[u8]) -> Option<Declared> {
    let encoding = encoding.trim_ascii();
    let is = |known: &[u8]| encoding.eq_ignore_ascii_case(known);
    match () {
        () if is(b"") || is(b"identity") || is(b"gzip") || is(b"x-gzip") => Some(Declared::Plain),
        () if is(b"deflate") => Some(Declared::Deflate),
        () if is(b"br") => Some(Declared::Brotli),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signature::SigningKey;

    const SIGNATURE: &[u8] = &[b'a'; 64];

    #[test]
    fn a_table_of_heads() {
        let mut apps = Apps::default();
        apps.insert("key".to_owned(), AppKey { app: "chat".into(), secrets: vec![SigningKey::new(b"secret")] });
        let limits = Limits { max_body: 100 };
        let good = Facts {
            api_key: Single::One(b"key"),
            signature: Single::One(SIGNATURE),
            content_encoding: None,
            content_length: None,
        };
        let long = [b'k'; 129];
        let cases = [
            (good, None),
            (Facts { content_encoding: Some(b"GZIP"), ..good }, None),
            (Facts { content_encoding: Some(b"identity"), ..good }, None),
            (Facts { content_length: Some(100), ..good }, None),
            (Facts { api_key: Single::Absent, ..good }, None),
            (Facts { api_key: Single::Repeated, ..good }, Some(Reason::MalformedApiKey)),
            (Facts { api_key: Single::One(b""), ..good }, Some(Reason::MalformedApiKey)),
            (Facts { api_key: Single::One(b"k\xff"), ..good }, Some(Reason::MalformedApiKey)),
            (Facts { api_key: Single::One(&long), ..good }, Some(Reason::MalformedApiKey)),
            (Facts { signature: Single::Absent, ..good }, Some(Reason::MissingSignature)),
            (Facts { signature: Single::Repeated, ..good }, Some(Reason::MalformedSignature)),
            (Facts { signature: Single::One(b"abc"), ..good }, Some(Reason::MalformedSignature)),
            (Facts { api_key: Single::One(b"other"), ..good }, Some(Reason::UnknownKey)),
            (Facts { content_encoding: Some(b"br"), ..good }, None),
            (Facts { content_encoding: Some(b"Deflate"), ..good }, None),
            (Facts { content_encoding: Some(b"zstd"), ..good }, Some(Reason::UnsupportedEncoding)),
            (Facts { content_encoding: Some(b"gzip, gzip"), ..good }, Some(Reason::UnsupportedEncoding)),
            (Facts { content_length: Some(101), ..good }, Some(Reason::TooLarge)),
        ];
        for (facts, expected) in cases {
            assert_eq!(admit(&facts, &apps, &limits).err(), expected, "{facts:?}");
        }
        let key = apps.get("key").unwrap().clone();
        apps.insert("second".to_owned(), key);
        let absent = Facts { api_key: Single::Absent, ..good };
        assert_eq!(admit(&absent, &apps, &limits).err(), Some(Reason::MissingApiKey), "it could be either");
        assert_eq!(admit(&absent, &Apps::default(), &limits).err(), Some(Reason::MissingApiKey));
    }
}
