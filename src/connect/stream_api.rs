//! Stream's REST API, as far as an app's settings need it. Neither the secret nor the token is ever shown.

use super::address::BaseUrl;
use super::hook::without_credentials;
use crate::output::visible;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, StatusCode, Uri};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::time::Duration;
use streamgate_core::fields::Fields;
use streamgate_core::signature::SigningKey;
use streamgate_service::http_client::{self, ClientError, ExchangeError, HttpClient};
use streamgate_service::secret::Secret;

/// Chosen: Stream's SDKs wait between 3 and 30 s.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Settings take some kilobytes; an app has a few dozen hooks at the most.
const MAX_ANSWER: usize = 8 << 20;
/// Most characters quoted in an error from an answer that is not Stream's.
const EXCERPT: usize = 200;
/// Most characters of Stream's own message.
const MAX_MESSAGE: usize = 1000;
/// Attempts at a read. Stream allows 10,000 a minute.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The parts of the token: a server token without expiry.
const TOKEN_HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;
const TOKEN_CLAIMS: &str = r#"{"server":true}"#;
/// Stream's codes for a key or secret that does not belong to the app.
const AUTH_CODES: [i64; 3] = [2, 5, 43];

#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("cannot reach Stream at {at}: {why}")]
    Unreachable { at: String, why: String },
    /// Whether the request arrived is not known.
    #[error("Stream at {at} gave no answer within {TIMEOUT:?}")]
    TooSlow { at: String },
    #[error("Stream refused {method} {path}: {status}, code {code}: {message}{hint}")]
    Refused { method: Method, path: String, status: u16, code: i64, message: String, hint: &'static str },
    #[error("{at} answered {status} to {method} {path}, and not as Stream does: {excerpt:?}; is --stream-url right?")]
    Foreign { at: String, method: Method, path: String, status: u16, excerpt: String },
    #[error(transparent)]
    Client(#[from] ClientError),
}

impl ApiError {
    /// Whether the key or its secret does not belong to the app.
    pub(super) fn is_auth(&self) -> bool {
        matches!(self, ApiError::Refused { status, code, .. } if *status == 401 || AUTH_CODES.contains(code))
    }

    pub(super) fn is_not_found(&self) -> bool {
        match self {
            ApiError::Refused { status, .. } | ApiError::Foreign { status, .. } => *status == 404,
            ApiError::Unreachable { .. } | ApiError::TooSlow { .. } | ApiError::Client(_) => false,
        }
    }
}

/// Stream's error body.
#[derive(Debug, Deserialize)]
struct ErrorAnswer {
    code: i64,
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
struct AppAnswer<'a> {
    #[serde(borrow)]
    app: &'a RawValue,
}

#[derive(Deserialize)]
struct EventsAnswer {
    events: Vec<HookEvent>,
}

#[derive(Deserialize)]
struct HookEvent {
    name: String,
}

/// Stream's API, called as a server of an app.
#[derive(Clone, Debug)]
pub(super) struct StreamApi {
    client: HttpClient,
    base: BaseUrl,
    api_key: String,
    token: Token,
}

/// A token signed with the app's secret; as sensitive as the secret, since it never expires.
#[derive(Clone)]
struct Token(HeaderValue);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Token {
    fn of(secret: &Secret) -> Option<Token> {
        let text = |part: &str| URL_SAFE_NO_PAD.encode(part);
        let signed = format!("{}.{}", text(TOKEN_HEADER), text(TOKEN_CLAIMS));
        let signature = SigningKey::new(secret.expose().as_bytes()).sign(signed.as_bytes());
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.bytes()));
        let mut header = HeaderValue::from_str(&token).ok()?;
        header.set_sensitive(true);
        Some(Token(header))
    }
}

impl StreamApi {
    /// `None` if the base URL would send the token unencrypted.
    pub(super) fn new(base: &BaseUrl, api_key: &str, secret: &Secret) -> Result<Option<StreamApi>, ApiError> {
        if !base.is_tls() && !base.is_loopback() {
            return Ok(None);
        }
        let client = http_client::client(None)?;
        let token = Token::of(secret);
        Ok(token.map(|token| StreamApi { client, base: base.clone(), api_key: api_key.to_owned(), token }))
    }

    /// The app's settings, as they were read.
    pub(super) async fn app(&self) -> Result<Fields, ApiError> {
        let (status, body) = self.call(Method::GET, "/api/v2/app", "", None).await?;
        let app = serde_json::from_slice::<AppAnswer<'_>>(&body).ok();
        let app = app.and_then(|answer| Fields::parse(answer.app.get().as_bytes()));
        app.ok_or_else(|| self.foreign(Method::GET, "/api/v2/app", status, &body))
    }

    /// Changes the settings in the body, and nothing else.
    pub(super) async fn update_app(&self, body: &str) -> Result<(), ApiError> {
        self.call(Method::PATCH, "/api/v2/app", "", Some(body)).await.map(drop)
    }

    /// The event types that a chat hook can have. Only the older family of paths lists them.
    pub(super) async fn event_types(&self) -> Result<Vec<String>, ApiError> {
        let (status, body) = self.call(Method::GET, "/hook/events", "&product=chat", None).await?;
        let answer: Option<EventsAnswer> = serde_json::from_slice(&body).ok();
        let answer = answer.ok_or_else(|| self.foreign(Method::GET, "/hook/events", status, &body))?;
        Ok(answer.events.into_iter().map(|event| event.name).collect())
    }

    /// Calls the API. Reads are retried.
    async fn call(
        &self,
        method: Method,
        path: &str,
        query: &str,
        body: Option<&str>,
    ) -> Result<(StatusCode, Bytes), ApiError> {
        let mut tries = 1;
        loop {
            let answer = self.once(&method, path, query, body).await;
            let is_read = method == Method::GET;
            let pause = match &answer {
                // An update is not retried: the settings that it was planned for may have changed.
                Ok((status, headers, _)) if *status == StatusCode::TOO_MANY_REQUESTS && is_read => {
                    Some(retry_after(headers))
                }
                Ok((status, _, _)) if status.is_server_error() && is_read => Some(PAUSE),
                Err(ApiError::Unreachable { .. } | ApiError::TooSlow { .. }) if is_read => Some(PAUSE),
                Ok(_) | Err(_) => None,
            };
            match pause.filter(|pause| tries < TRIES && *pause <= LONGEST_PAUSE) {
                Some(pause) => {
                    tracing::warn!(?pause, "Stream limits requests, or gave no answer; trying again");
                    tokio::time::sleep(pause).await;
                    tries += 1;
                }
                None => {
                    let (status, _, body) = answer?;
                    return self.judge(method, path, status, body);
                }
            }
        }
    }

    async fn once(
        &self,
        method: &Method,
        path: &str,
        query: &str,
        body: Option<&str>,
    ) -> Result<(StatusCode, HeaderMap, Bytes), ApiError> {
        let key = utf8_percent_encode(&self.api_key, NON_ALPHANUMERIC);
        let unreachable = |why: String| ApiError::Unreachable { at: self.base.as_str().to_owned(), why };
        let uri: Uri = format!("{}{path}?api_key={key}{query}", self.base.as_str())
            .parse()
            .map_err(|_| unreachable("this is not a URL".to_owned()))?;
        let host = uri.authority().map(ToString::to_string).unwrap_or_default();
        let mut request = Request::builder()
            .method(method)
            .uri(uri)
            .header(HOST, host)
            .header(AUTHORIZATION, &self.token.0)
            .header("stream-auth-type", "jwt")
            .header("x-stream-client", concat!("streamgate-", env!("CARGO_PKG_VERSION")));
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let body = Full::new(Bytes::from(body.unwrap_or_default().to_owned()));
        let request = request.body(body).map_err(|error| unreachable(error.to_string()))?;
        let response = http_client::exchange(&self.client, request, TIMEOUT, MAX_ANSWER).await;
        let response = response.map_err(|error| match error {
            ExchangeError::Failed(why) => unreachable(why),
            ExchangeError::TimedOut(_) => ApiError::TooSlow { at: self.base.as_str().to_owned() },
        })?;
        let (parts, body) = response.into_parts();
        Ok((parts.status, parts.headers, body.map_err(unreachable)?))
    }

    fn judge(
        &self,
        method: Method,
        path: &str,
        status: StatusCode,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), ApiError> {
        if status.is_success() {
            return Ok((status, body));
        }
        let Ok(ErrorAnswer { code, message }) = serde_json::from_slice(&body) else {
            return Err(self.foreign(method, path, status, &body));
        };
        let message = self.shown(&message, MAX_MESSAGE);
        let (path, status) = (path.to_owned(), status.as_u16());
        Err(ApiError::Refused { method, path, status, code, message, hint: hint(code) })
    }

    /// Text of an answer for the user. Masks credentials in URLs, and our own token, which a server may reflect.
    fn shown(&self, text: &str, longest: usize) -> String {
        let text = text.replace(self.token.0.to_str().unwrap_or_default(), "…");
        let ends = [' ', '\n', '"', '\'', ',', '<', '>', '(', ')', '\\'];
        let words = text.split_inclusive(ends).map(|word| match word.contains("://") {
            true => {
                let url = word.trim_end_matches(ends);
                without_credentials(url) + &word[url.len()..]
            }
            false => word.to_owned(),
        });
        let words: String = words.collect();
        visible(&words).chars().take(longest).collect()
    }

    /// The error for an answer that is not Stream's, but from a proxy or another server.
    fn foreign(&self, method: Method, path: &str, status: StatusCode, body: &[u8]) -> ApiError {
        // A successful answer may hold settings, with secrets.
        let excerpt = match status.is_success() {
            true => String::new(),
            false => self.shown(&String::from_utf8_lossy(body), EXCERPT),
        };
        let at = self.base.as_str().to_owned();
        ApiError::Foreign { at, method, path: path.to_owned(), status: status.as_u16(), excerpt }
    }
}

/// What to do about an error from Stream.
fn hint(code: i64) -> &'static str {
    match code {
        2 => "; Stream knows no such API key: compare api_key with the app's dashboard",
        5 | 43 => "; the secret is not this key's: compare it with the app's dashboard",
        9 => "; Stream limits requests: try again in a minute",
        16 => "; Stream has no such app or path: is --stream-url the app's region?",
        17 => "; this key may not do that: use a server-side key of the app",
        40 => "; is this machine's clock right?",
        _ => "",
    }
}

/// Stream sends seconds.
fn retry_after(headers: &HeaderMap) -> Duration {
    let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    seconds.map_or(PAUSE, Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_the_one_that_streams_sdks_make() {
        let token = Token::of(&Secret::new("secret".to_owned())).unwrap();
        let expected =
            "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzZXJ2ZXIiOnRydWV9.DHnfQolWsEGFcTR7ZwVBbIVUFAvxzDJXzB6UlyU-7JQ";
        assert_eq!(token.0.to_str().unwrap(), expected);
        assert!(!format!("{token:?} {:?}", token.0).contains("DHnf"));
    }
}
