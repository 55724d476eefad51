//! TLS with certificate files that can be swapped while serving: validated first, a bad file keeps the old.

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject};
use std::path::PathBuf;
use std::sync::Arc;
use streamgate_service::config::TlsConfig;
use streamgate_service::metrics::Metrics;
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {} (gateway.tls.{key}): {error}", path.display())]
    Unreadable { key: &'static str, path: PathBuf, error: pem::Error },
    #[error("{} (gateway.tls.cert) holds no certificate", path.display())]
    Empty { path: PathBuf },
    #[error("the certificate in {} does not fit the key in {}: {error}", cert.display(), key.display())]
    Mismatch { cert: PathBuf, key: PathBuf, error: rustls::Error },
    #[error("the certificate in {} cannot be parsed: {error}", path.display())]
    Malformed { path: PathBuf, error: String },
    #[error("cannot set up TLS: {0}")]
    Setup(#[from] rustls::Error),
}

/// The gateway's TLS side.
#[derive(Clone, Debug)]
pub struct Tls {
    current: Arc<Current>,
    server: Arc<ServerConfig>,
}

#[derive(Debug)]
struct Current(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

impl Tls {
    /// TLS 1.2 and 1.3; HTTP/2 and HTTP/1.1 by ALPN.
    pub fn load(config: &TlsConfig, metrics: &Metrics) -> Result<Tls, TlsError> {
        let current = Arc::new(Current(ArcSwap::from_pointee(read(config, metrics)?)));
        let mut server = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(rustls::ALL_VERSIONS)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Tls { current, server: Arc::new(server) })
    }

    /// Reads the files again; on an error the old certificate stays.
    pub fn reload(&self, config: &TlsConfig, metrics: &Metrics) -> Result<(), TlsError> {
        self.current.0.store(Arc::new(read(config, metrics)?));
        Ok(())
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.server))
    }
}

fn read(config: &TlsConfig, metrics: &Metrics) -> Result<CertifiedKey, TlsError> {
    let TlsConfig { cert, key } = config;
    let unreadable = |error| TlsError::Unreadable { key: "cert", path: cert.clone(), error };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(cert).map_err(unreadable)?.collect();
    let chain = chain.map_err(unreadable)?;
    let Some(leaf) = chain.first() else { return Err(TlsError::Empty { path: cert.clone() }) };
    let expiry = expiry(leaf).map_err(|error| TlsError::Malformed { path: cert.clone(), error })?;
    let private = PrivateKeyDer::from_pem_file(key);
    let private = private.map_err(|error| TlsError::Unreadable { key: "key", path: key.clone(), error })?;
    let certified = CertifiedKey::from_der(chain, private, &ring::default_provider());
    let certified = certified.map_err(|error| TlsError::Mismatch { cert: cert.clone(), key: key.clone(), error })?;
    metrics.tls_certificate_expiry.set(expiry as f64);
    if expiry <= jiff::Timestamp::now().as_second() {
        tracing::error!(path = %cert.display(), "the TLS certificate has expired: clients will refuse it; renew the file");
    }
    Ok(certified)
}

/// Seconds since the Unix epoch.
fn expiry(leaf: &CertificateDer<'_>) -> Result<i64, String> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|error| error.to_string())?;
    Ok(parsed.validity().not_after.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_file_is_an_error_and_keeps_the_old_certificate() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let good =
            TlsConfig { cert: write("cert", &made.cert.pem()), key: write("key", &made.signing_key.serialize_pem()) };
        let metrics = Metrics::new();
        let tls = Tls::load(&good, &metrics).unwrap();
        assert!(metrics.tls_certificate_expiry.get() > 0.0);
        let served = tls.current.0.load_full().cert.clone();
        let bad = [
            TlsConfig { key: write("other", &other.signing_key.serialize_pem()), ..good.clone() },
            TlsConfig { cert: write("empty", ""), ..good.clone() },
            TlsConfig { cert: write("noise", "-----BEGIN CERTIFICATE-----\n????"), ..good.clone() },
            TlsConfig { key: directory.path().join("absent"), ..good.clone() },
        ];
        for config in bad {
            let error = tls.reload(&config, &metrics).unwrap_err().to_string();
            assert!(error.contains(&directory.path().display().to_string()), "{error}");
            assert_eq!(tls.current.0.load_full().cert, served);
        }
        let next =
            TlsConfig { cert: write("cert", &other.cert.pem()), key: write("key", &other.signing_key.serialize_pem()) };
        tls.reload(&next, &metrics).unwrap();
        assert_ne!(tls.current.0.load_full().cert, served);
    }
}
