//! HTTP clients: HTTP/1.1 with connection reuse, TLS by the system's roots, no redirects, no proxy.

mod failure;
mod services;
mod transport;

pub use failure::CallFailure;
pub use services::ServiceClient;

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Why a call had no answer.
pub type CallError = hyper_util::client::legacy::Error;
pub type HttpClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Shorter than the keep-alive of common servers, so that a request rarely meets a connection that is just being closed.
const IDLE: Duration = Duration::from_secs(15);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot read the authorities in {path}: {error}")]
    Unreadable { path: String, error: std::io::Error },
    #[error("{path}: {error}")]
    Roots { path: String, error: AuthorityError },
    #[error(transparent)]
    Authorities(#[from] AuthorityError),
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// Why a text names no certificate authority.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("is not PEM: {0}")]
    NoPem(String),
    #[error("holds no certificate: it takes the authority's, as PEM")]
    Empty,
    #[error("holds no certificate that can be used: {0} were not understood")]
    Unusable(usize),
}

/// An error with everything that caused it: hyper's own text stops at "client error (Connect)".
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// The authorities that this machine trusts. A machine without any is served too, for plain HTTP; a call over TLS then says that the
/// issuer is unknown.
pub fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// `extra_roots`: a PEM file of certificate authorities to trust beside the system's.
pub fn client(extra_roots: Option<&Path>) -> Result<HttpClient, ClientError> {
    let roots = match extra_roots {
        Some(file) => {
            let path = file.display().to_string();
            let pem = std::fs::read(file).map_err(|error| ClientError::Unreadable { path: path.clone(), error })?;
            roots_with(&pem).map_err(|error| ClientError::Roots { path, error })?
        }
        None => system_roots(),
    };
    let connector = connector(roots)?;
    Ok(Client::builder(TokioExecutor::new()).pool_idle_timeout(IDLE).pool_timer(TokioTimer::new()).build(connector))
}

/// The system's authorities and those of a PEM text.
fn roots_with(pem: &[u8]) -> Result<RootCertStore, AuthorityError> {
    let mut roots = authorities(pem)?;
    roots.extend(system_roots().roots);
    Ok(roots)
}

/// The authorities of a PEM text.
pub fn authorities(pem: &[u8]) -> Result<RootCertStore, AuthorityError> {
    let mut roots = RootCertStore::empty();
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(crate::pem::unmarked(pem)).collect();
    let certificates = certificates.map_err(|error| AuthorityError::NoPem(crate::pem::problem(&error)))?;
    if certificates.is_empty() {
        return Err(AuthorityError::Empty);
    }
    // One of a bundle that is not understood keeps no other from being trusted.
    match roots.add_parsable_certificates(certificates) {
        (0, ignored) => Err(AuthorityError::Unusable(ignored)),
        (_, _) => Ok(roots),
    }
}

fn connector(roots: RootCertStore) -> Result<HttpsConnector<HttpConnector>, ClientError> {
    let tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    Ok(HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(http))
}
