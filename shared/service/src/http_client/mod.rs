//! HTTP clients: HTTP/1.1 with connection reuse, TLS with the system's roots, no redirects, no proxy.

mod exchange;
mod failure;
mod own;
mod services;
mod transport;

pub use exchange::{ExchangeError, exchange};
pub use failure::CallFailure;
pub use own::ProxyHeaderConnector;
pub use services::ServiceClient;

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use own::Known;
use rustls::client::{VerifierBuilderError, WebPkiServerVerifier};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Why a call had no reply.
pub type CallError = hyper_util::client::legacy::Error;
pub type HttpClient = Client<HttpsConnector<ProxyHeaderConnector>, Full<Bytes>>;

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
    #[error("cannot set up TLS: {0}")]
    Verifier(#[from] VerifierBuilderError),
}

/// Why a text contains no usable certificate authority.
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

/// The authorities that this machine trusts. A machine without any can still use plain HTTP; a call over TLS then
/// reports an unknown issuer.
pub fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// `extra_roots`: a PEM file of certificate authorities to trust in addition to the system's.
pub fn client(extra_roots: Option<&Path>) -> Result<HttpClient, ClientError> {
    let roots = match extra_roots {
        Some(file) => from_file(file, roots_with)?,
        None => system_roots(),
    };
    Ok(pooled(connector(trusting(roots)?, ProxyHeaderConnector { tcp: tcp(), with_header: false })))
}

/// A client for our own gateway.
#[derive(Debug, Default)]
pub struct OwnGatewayClient<'a> {
    /// A PEM file of certificates to trust in addition to the system's authorities: the gateway's own, for any name, or
    /// authorities.
    pub ca: Option<&'a Path>,
    /// The certificate that the gateway serves, if it is known.
    pub certificate: Option<CertificateDer<'static>>,
    /// The gateway is behind a balancer and expects a PROXY header from it.
    pub proxy_header: bool,
}

impl OwnGatewayClient<'_> {
    pub fn client(self) -> Result<HttpClient, ClientError> {
        let mut certificates: Vec<_> = self.certificate.into_iter().collect();
        let mut roots = system_roots();
        if let Some(file) = self.ca {
            let listed = from_file(file, certificates_of)?;
            // A certificate that is not an authority's can be trusted all the same.
            roots.add_parsable_certificates(listed.clone());
            certificates.extend(listed);
        }
        let tls = if certificates.is_empty() {
            trusting(roots)?
        } else {
            // A verifier needs at least one authority; if there are none, the known certificates serve.
            if roots.is_empty() {
                roots.add_parsable_certificates(certificates.clone());
            }
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let others = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
            let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
            let verifier = Arc::new(Known { certificates, others });
            versions.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()
        };
        Ok(pooled(connector(tls, ProxyHeaderConnector { tcp: tcp(), with_header: self.proxy_header })))
    }
}

/// Parses a PEM file.
fn from_file<T>(file: &Path, parse: impl FnOnce(&[u8]) -> Result<T, AuthorityError>) -> Result<T, ClientError> {
    let path = file.display().to_string();
    let pem = std::fs::read(file).map_err(|error| ClientError::Unreadable { path: path.clone(), error })?;
    parse(&pem).map_err(|error| ClientError::Roots { path, error })
}

fn pooled(connector: HttpsConnector<ProxyHeaderConnector>) -> HttpClient {
    Client::builder(TokioExecutor::new()).pool_idle_timeout(IDLE).pool_timer(TokioTimer::new()).build(connector)
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
    // A certificate that is not understood does not spoil the rest of the bundle.
    match roots.add_parsable_certificates(certificates_of(pem)?) {
        (0, ignored) => Err(AuthorityError::Unusable(ignored)),
        (_, _) => Ok(roots),
    }
}

/// The certificates of a PEM text; at least one.
fn certificates_of(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(crate::pem::unmarked(pem)).collect();
    let certificates = certificates.map_err(|error| AuthorityError::NoPem(crate::pem::problem(&error)))?;
    if certificates.is_empty() { Err(AuthorityError::Empty) } else { Ok(certificates) }
}

fn trusting(roots: RootCertStore) -> Result<ClientConfig, ClientError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(versions.with_root_certificates(roots).with_no_client_auth())
}

fn tcp() -> HttpConnector {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp
}

fn connector<C>(tls: ClientConfig, transport: C) -> HttpsConnector<C> {
    HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(transport)
}
