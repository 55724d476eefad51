//! Why a call to a service had no reply: the class that metrics and people tell apart, and the innermost cause.

use rustls::CertificateError;
use std::error::Error;
use std::io;

/// A call without a reply. Its text holds the service's host and port, and never a path, a header or a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallFailure {
    pub class: FailureClass,
    /// `host:port` as the URL has them.
    at: String,
    cause: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureClass {
    /// The host has no address.
    Dns,
    /// Nobody listens there.
    Refused,
    /// No connection for another reason: no route, no answer, no socket left.
    Unreachable,
    Tls,
    /// The connection ended before the reply did.
    Closed,
    /// What came is not HTTP/1.1.
    Malformed,
}

impl FailureClass {
    pub fn as_str(self) -> &'static str {
        match self {
            FailureClass::Dns => "dns",
            FailureClass::Refused => "refused",
            FailureClass::Unreachable => "unreachable",
            FailureClass::Tls => "tls",
            FailureClass::Closed => "closed",
            FailureClass::Malformed => "malformed",
        }
    }
}

impl std::fmt::Display for CallFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let CallFailure { class, at, cause } = self;
        match class {
            FailureClass::Dns => {
                write!(f, "cannot connect to the service at {at}: its host name has no address: {cause}")
            }
            FailureClass::Refused | FailureClass::Unreachable => {
                write!(f, "cannot connect to the service at {at}: {cause}")
            }
            FailureClass::Tls => write!(f, "cannot connect to the service at {at} by TLS: {cause}"),
            FailureClass::Closed => write!(f, "the service at {at} closed the connection before its reply: {cause}"),
            FailureClass::Malformed => write!(f, "the reply of the service at {at} is not HTTP/1.1: {cause}"),
        }
    }
}

impl Error for CallFailure {}

impl CallFailure {
    /// Classifies an error of the client. `is_connect`: it came before the request was sent.
    pub(super) fn of(at: String, is_connect: bool, error: &(dyn Error + 'static)) -> CallFailure {
        let failure = |class, cause| CallFailure { class, at: at.clone(), cause };
        let chain = chain(error);
        if let Some(tls) = chain.iter().find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
            return failure(FailureClass::Tls, tls_cause(tls));
        }
        let http = chain.iter().find_map(|cause| cause.downcast_ref::<hyper::Error>());
        let io = chain.iter().rev().find_map(|cause| cause.downcast_ref::<io::Error>());
        let innermost = || chain.last().map(ToString::to_string).unwrap_or_default();
        // The client's own type of it is private.
        let is_dns = chain.iter().any(|cause| cause.to_string().starts_with("dns error"));
        match (http, io) {
            _ if is_dns => failure(FailureClass::Dns, innermost()),
            (Some(http), _) if http.is_parse() => failure(FailureClass::Malformed, innermost()),
            (_, Some(io)) if is_connect && io.kind() == io::ErrorKind::ConnectionRefused => {
                failure(FailureClass::Refused, io_cause(io))
            }
            (_, Some(io)) if is_connect => failure(FailureClass::Unreachable, io_cause(io)),
            (_, Some(io)) => failure(FailureClass::Closed, io_cause(io)),
            (_, None) if is_connect => failure(FailureClass::Unreachable, innermost()),
            (_, None) => failure(FailureClass::Closed, innermost()),
        }
    }
}

/// An error and everything under it, the innermost last.
fn chain<'e>(error: &'e (dyn Error + 'static)) -> Vec<&'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| under(*error)).collect()
}

/// What an `io::Error` wraps is not its source, but stands in its place.
fn under<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(wrapped) => Some(wrapped),
        None => error.source(),
    }
}

/// Without the number that the system gives the error.
fn io_cause(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(_) => error.kind().to_string(),
        None => error.to_string(),
    }
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
        rustls::Error::InvalidMessage(_) => {
            "what listens there does not speak TLS; should the URL say http?".to_owned()
        }
        other => other.to_string(),
    }
}
