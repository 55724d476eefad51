//! Why a call to a service had no reply: its class and the innermost cause.

use hyper::Uri;
use rustls::CertificateError;
use std::error::Error;
use std::io;
use std::time::Duration;
use streamgate_core::duration::rounded;

/// A call without a reply. Its text names the service's host and port, and never a path, a header or a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallFailure {
    class: FailureClass,
    /// Some bytes of a reply were read.
    was_heard: bool,
    /// `host:port`.
    at: String,
    cause: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FailureClass {
    /// The host has no address.
    Dns,
    /// Nothing listens there.
    Refused,
    /// No connection for another reason: no route, no reply, no socket left.
    Unreachable,
    Tls,
    /// The connection ended before anything of the request was written.
    Unsent,
    /// The connection ended before the reply did.
    Closed,
    /// The reply is not readable as HTTP/1.1.
    Malformed,
    /// No reply in time.
    Timeout,
}

impl FailureClass {
    fn as_str(self) -> &'static str {
        match self {
            FailureClass::Dns => "dns",
            FailureClass::Refused => "refused",
            FailureClass::Unreachable => "unreachable",
            FailureClass::Tls => "tls",
            FailureClass::Unsent => "unsent",
            FailureClass::Closed => "closed",
            FailureClass::Malformed => "malformed",
            FailureClass::Timeout => "timeout",
        }
    }
}

impl std::fmt::Display for CallFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let CallFailure { class, at, cause, .. } = self;
        write!(f, "{}: ", class.as_str())?;
        match class {
            FailureClass::Dns => write!(f, "cannot find the address of the service at {at}: {cause}"),
            FailureClass::Refused | FailureClass::Unreachable => {
                write!(f, "cannot connect to the service at {at}: {cause}")
            }
            FailureClass::Tls => write!(f, "cannot connect to the service at {at} by TLS: {cause}"),
            FailureClass::Unsent => write!(f, "the service at {at} closed the connection before the request"),
            FailureClass::Closed => {
                write!(f, "the connection with the service at {at} broke before its reply: {cause}")
            }
            FailureClass::Malformed => write!(f, "cannot read the reply of the service at {at}: {cause}"),
            FailureClass::Timeout => write!(f, "the service at {at} {cause}"),
        }
    }
}

impl Error for CallFailure {}

impl CallFailure {
    /// Classifies an error of the client. `is_unsent`: nothing of the request was written; `is_connect`: there was no connection.
    pub(super) fn of(
        url: &Uri,
        is_unsent: bool,
        is_connect: bool,
        was_heard: bool,
        error: &(dyn Error + 'static),
    ) -> CallFailure {
        let failure = |class, cause| CallFailure { class, was_heard, at: address(url), cause };
        let chain = chain(error);
        if let Some(tls) = chain.iter().find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
            return failure(FailureClass::Tls, tls_cause(tls));
        }
        let http = chain.iter().find_map(|cause| cause.downcast_ref::<hyper::Error>());
        let io = chain.iter().rev().find_map(|cause| cause.downcast_ref::<io::Error>());
        let innermost = || chain.last().map(ToString::to_string).unwrap_or_default();
        // The client's own error types for these are private.
        let says = |text: &str| chain.iter().any(|cause| cause.to_string().starts_with(text));
        let is_tls = url.scheme_str() == Some("https");
        match (http, io) {
            _ if says("dns error") => failure(FailureClass::Dns, innermost()),
            _ if is_unsent => failure(FailureClass::Unsent, innermost()),
            (Some(http), _) if http.is_parse_too_large() => failure(FailureClass::Malformed, innermost()),
            (Some(http), _) if http.is_parse() || says("received unexpected message") => {
                failure(FailureClass::Malformed, format!("it is not HTTP/1.1: {}", innermost()))
            }
            (_, Some(io)) if is_connect && io.kind() == io::ErrorKind::ConnectionRefused => {
                failure(FailureClass::Refused, io_cause(io))
            }
            // The connection ended in the middle of the handshake.
            (_, Some(io)) if is_connect && is_tls && is_broken(io.kind()) => failure(FailureClass::Tls, io_cause(io)),
            (_, Some(io)) if is_connect => failure(FailureClass::Unreachable, io_cause(io)),
            (_, Some(io)) => failure(FailureClass::Closed, io_cause(io)),
            (_, None) if is_connect => failure(FailureClass::Unreachable, innermost()),
            (_, None) => failure(FailureClass::Closed, innermost()),
        }
    }

    /// Whether the service has not replied at all, so that the call may be repeated: it may just be restarting.
    pub fn is_silence(&self) -> bool {
        match self.class {
            FailureClass::Refused | FailureClass::Unreachable | FailureClass::Unsent => true,
            FailureClass::Closed => !self.was_heard,
            FailureClass::Dns | FailureClass::Tls | FailureClass::Malformed | FailureClass::Timeout => false,
        }
    }

    pub(super) fn timeout(url: &Uri, within: Duration, is_connected: bool) -> CallFailure {
        let what = if is_connected { "did not answer" } else { "took no connection" };
        let cause = format!("{what} within {:?}", rounded(within));
        CallFailure { class: FailureClass::Timeout, was_heard: false, at: address(url), cause }
    }
}

fn is_broken(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

fn address(url: &Uri) -> String {
    let port = url.port_u16().unwrap_or(if url.scheme_str() == Some("https") { 443 } else { 80 });
    format!("{}:{port}", url.host().unwrap_or_default())
}

/// An error and everything under it, the innermost last.
fn chain<'e>(error: &'e (dyn Error + 'static)) -> Vec<&'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| under(*error)).collect()
}

/// The wrapped error of an `io::Error` is not its source, but takes its place.
fn under<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(wrapped) => Some(wrapped),
        None => error.source(),
    }
}

/// The text without the system's error number.
fn io_cause(error: &io::Error) -> String {
    let text = error.to_string();
    let end = text.find(" (os error ").unwrap_or(text.len());
    text[..end].to_lowercase()
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the library's own text serves for what needs no advice")]
fn tls_cause(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            CertificateError::UnknownIssuer => {
                "its certificate is of an unknown issuer; name the authority in `ca`, if it is a private one".to_owned()
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "its certificate is for another name".to_owned()
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "its certificate has expired".to_owned()
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "its certificate is not valid yet".to_owned()
            }
            other => other.to_string(),
        },
        rustls::Error::InvalidMessage(_) => "the server there does not speak TLS; should the URL say http?".to_owned(),
        other => other.to_string(),
    }
}
