//! The HTTP client for calls to services: HTTP/1.1 with connection reuse, TLS by the system's roots, no redirects, no proxy.

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
    #[error("cannot read the certificates in {path}: {error}")]
    Roots { path: String, error: rustls_pki_types::pem::Error },
    #[error("{path} holds no usable certificate: {error}")]
    Unusable { path: String, error: rustls::Error },
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
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
    let mut roots = system_roots();
    if let Some(file) = extra_roots {
        let path = file.display().to_string();
        let unreadable = |error| ClientError::Roots { path: path.clone(), error };
        for certificate in CertificateDer::pem_file_iter(file).map_err(unreadable)? {
            let added = roots.add(certificate.map_err(unreadable)?);
            added.map_err(|error| ClientError::Unusable { path: path.clone(), error })?;
        }
    }
    let tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    let https = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(http);
    Ok(Client::builder(TokioExecutor::new()).pool_idle_timeout(IDLE).pool_timer(TokioTimer::new()).build(https))
}
