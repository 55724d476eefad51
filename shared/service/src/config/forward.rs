//! `forward = { … }`: a service that events or hooks are forwarded to.

use super::{
    environment::Environment,
    reader::{Section, is_reference},
};
use crate::http_client;
use crate::secret::Secret;
use hyper::Uri;
use hyper::header::{HeaderName, HeaderValue};
use std::time::Duration;

/// Headers that a forwarded request has by itself: a configured header may not replace them.
const OWN_HEADERS: [&str; 12] = [
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "host",
    "te",
    "traceparent",
    "transfer-encoding",
    "x-api-key",
    "x-signature",
    "x-webhook-attempt",
    "x-webhook-id",
];

/// `forward = { url, timeout, headers, ca }`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardConfig {
    pub url: Uri,
    /// From connecting to the answer; a shorter `handler_timeout` applies first. Default 10 s.
    pub timeout: Duration,
    /// Whether the configuration sets it explicitly.
    pub(super) timeout_is_given: bool,
    /// Sent with each request. The values may be secrets.
    pub headers: Vec<(HeaderName, Secret)>,
    /// The contents of a PEM file of certificate authorities to trust in addition to the system's.
    pub ca: Option<String>,
}

impl ForwardConfig {
    /// `places`: the placeholders that its URL may contain.
    pub(super) fn read(mut section: Section<'_>, environment: &Environment, places: &[&str]) -> Option<ForwardConfig> {
        let url = section.reference("url").map(|text| match environment.route_secret(&text) {
            // A gateway leaves it unread.
            Ok(url) if url.expose().is_empty() => Ok(Uri::from_static(UNREAD)),
            Ok(url) => {
                url_doubt(url.expose()).into_iter().for_each(|doubt| section.doubt("url", doubt));
                forward_url(url.expose(), places)
            }
            Err(what) => Err(what),
        });
        let url = match url {
            Some(Ok(url)) => Some(url),
            Some(Err(what)) => {
                section.problem("url", what);
                None
            }
            None => {
                section.problem("url", "is missing: say where to forward");
                None
            }
        };
        let timeout = section.duration("timeout", Duration::from_secs(10));
        let timeout_is_given = section.was_given("timeout");
        let mut headers = Vec::new();
        for (name, text) in section.text_table("headers") {
            match forward_header(&name, &text, environment) {
                Ok(header) => headers.push(header),
                Err(what) => section.problem(&format!("headers.{name}"), what),
            }
        }
        let ca = section.text("ca").and_then(|path| match authorities(&path, environment) {
            Ok(pem) => Some(pem),
            Err(what) => {
                section.problem("ca", what);
                None
            }
        });
        let is_plain = url.as_ref().is_some_and(|url| url.scheme_str() == Some("http") && *url != UNREAD);
        if is_plain && section.was_given("ca") {
            section.doubt("ca", "needs an https:// URL: http:// uses no TLS");
        }
        section.finish();
        Some(ForwardConfig { url: url?, timeout, timeout_is_given, headers, ca: ca.filter(|pem| !pem.is_empty()) })
    }
}

fn forward_header(name: &str, text: &str, environment: &Environment) -> Result<(HeaderName, Secret), String> {
    let name: HeaderName = name.parse().map_err(|_| "is not a valid header name".to_owned())?;
    if OWN_HEADERS.contains(&name.as_str()) || name.as_str().starts_with("x-streamgate-") {
        return Err("is set by Streamgate itself".to_owned());
    }
    let value = environment.route_secret(text)?;
    let shown = value.expose();
    if shown.split_whitespace().skip(usize::from(!shown.starts_with(char::is_whitespace))).any(is_reference) {
        return Err("has a reference within a text, which would be sent literally: put the whole value into the variable or file".into());
    }
    if shown.trim() != shown {
        return Err("has white space around it".to_owned());
    }
    HeaderValue::from_str(value.expose()).map_err(|_| "has a value that is not valid in a header".to_owned())?;
    Ok((name, value))
}

/// Placeholder for a URL that is not read because this process forwards nothing.
const UNREAD: &str = "http://unread.invalid/";

/// Reads a file of authorities; empty if it is left unread, on a gateway.
fn authorities(path: &str, environment: &Environment) -> Result<String, String> {
    let pem = environment.route_secret(&format!("file:{path}"))?.expose().to_owned();
    if !pem.is_empty() {
        http_client::authorities(pem.as_bytes()).map_err(|error| format!("names the file {path}, which {error}"))?;
    }
    Ok(pem)
}

/// The text of a placeholder, if it is one: an unclosed brace may be followed by anything, even a secret.
fn shown(place: &str) -> &str {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let name = place.strip_prefix('{').and_then(|place| place.strip_suffix('}'));
    if name.is_some_and(|name| name.len() <= 32 && name.bytes().all(is_name)) { place } else { "a brace" }
}

/// Warns about a URL that is probably sent differently from what was meant.
fn url_doubt(text: &str) -> Option<&'static str> {
    let is_escape = |rest: &str| rest.bytes().take(2).filter(u8::is_ascii_hexdigit).count() == 2;
    if text.contains('#') {
        return Some("has a fragment, #…, which is never sent: write a literal # as %23");
    }
    let are_escapes = text.split('%').skip(1).all(is_escape);
    (!are_escapes).then_some("has a % without two hex digits after it: write a literal % as %25")
}

fn forward_url(text: &str, places: &[&str]) -> Result<Uri, String> {
    if !text.is_ascii() {
        return Err("takes ASCII only: write other characters as %XX in a path, as xn--… in a host".to_owned());
    }
    let url: Uri = text
        .parse()
        .map_err(|_| "is not a valid URL: expected one like http://127.0.0.1:3000/webhooks/stream".to_owned())?;
    for place in
        text.split('{').skip(1).map(|rest| format!("{{{}", rest.split_inclusive('}').next().unwrap_or_default()))
    {
        if !places.contains(&&*place) {
            let known = match places {
                [] => "nothing is filled in here".to_owned(),
                places => format!("only {} is filled in here", places.join(", ")),
            };
            return Err(format!("has {}, but {known}; write a literal brace as %7B or %7D", shown(&place)));
        }
    }
    let scheme = url.scheme_str();
    if !matches!(scheme, Some("http" | "https")) || url.host().is_none_or(str::is_empty) {
        return Err("takes an http:// or https:// URL with a host".to_owned());
    }
    if url.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err("takes no user and password; send them in headers = { Authorization = \"env:…\" }".to_owned());
    }
    url.authority().map_or(Ok(()), |authority| super::url_port(authority.as_str()))?;
    Ok(url)
}
