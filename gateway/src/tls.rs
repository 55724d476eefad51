//! TLS with a certificate that can be swapped while serving: from files, validated first, or from an ACME authority.

use crate::acme::{self, Acme, Challenges};
use crate::certificate::{Certificate, Validity};
use crate::certificate_files::{self, CertificateFileError, read};
use arc_swap::ArcSwapOption;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use std::path::Path;
use std::sync::Arc;
use streamgate_service::config::TlsConfig;
use streamgate_service::metrics::Metrics;
use tokio_rustls::TlsAcceptor;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error(transparent)]
    Files(#[from] CertificateFileError),
    #[error("gateway.tls: a change between certificate files and an ACME authority needs a restart")]
    Restart,
    #[error("cannot set up TLS: {0}")]
    Setup(#[from] rustls::Error),
}

/// The gateway's TLS.
#[derive(Clone, Debug)]
pub struct Tls {
    current: Arc<Current>,
    server: Arc<ServerConfig>,
    metrics: Arc<Metrics>,
    acme: Option<Arc<Acme>>,
}

/// The certificates with which handshakes are answered.
#[derive(Debug, Default)]
pub(crate) struct Current {
    certificate: ArcSwapOption<Certificate>,
    pub(crate) challenges: Challenges,
}

impl Current {
    pub(crate) fn serve(&self, certificate: Certificate, metrics: &Metrics) {
        metrics.tls_certificate_expiry.set(certificate.validity.not_after as f64);
        self.certificate.store(Some(Arc::new(certificate)));
    }

    /// Whether this certificate is the one served.
    fn is(&self, certificate: &Certificate) -> bool {
        self.certificate.load().as_ref().is_some_and(|served| served.key.cert == certificate.key.cert)
    }

    /// The validity of the served certificate.
    pub(crate) fn validity(&self) -> Option<Validity> {
        self.certificate.load().as_ref().map(|certificate| certificate.validity)
    }

    /// Whether the served certificate has all of these names.
    pub(crate) fn has_names(&self, names: &[String]) -> bool {
        let certificate = self.certificate.load();
        certificate.as_ref().is_some_and(|certificate| names.iter().all(|name| certificate.names.contains(name)))
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // An authority that checks a challenge offers no other protocol.
        let is_challenge = hello.alpn().is_some_and(|mut protocols| protocols.all(|one| one == acme::PROTOCOL));
        if is_challenge {
            return self.challenges.find(hello.server_name()?);
        }
        self.certificate.load().as_ref().map(|certificate| Arc::clone(&certificate.key))
    }
}

impl Tls {
    /// TLS 1.2 and 1.3, with HTTP/2 and HTTP/1.1 by ALPN. `data_dir` is this process's own and keeps what an authority issues.
    pub fn load(config: &TlsConfig, data_dir: &Path, metrics: &Arc<Metrics>) -> Result<Tls, TlsError> {
        let current = Arc::new(Current::default());
        let mut server = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(rustls::ALL_VERSIONS)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acme = match config {
            TlsConfig::Files(files) => {
                current.serve(read(files)?, metrics);
                None
            }
            TlsConfig::Acme(acme) => {
                server.alpn_protocols.push(acme::PROTOCOL.to_vec());
                Some(Arc::new(Acme::open(acme, data_dir, Arc::clone(&current), Arc::clone(metrics))))
            }
        };
        Ok(Tls { current, server: Arc::new(server), metrics: Arc::clone(metrics), acme })
    }

    /// Uses this configuration from now on, and returns whether another certificate is served; on an error the old one stays.
    /// `at_once` means that an operator asked, so an ACME authority that refused is asked again without waiting.
    pub fn reload(&self, config: &TlsConfig, at_once: bool) -> Result<bool, TlsError> {
        match (config, &self.acme) {
            (TlsConfig::Files(files), None) => {
                let certificate = read(files)?;
                let is_other = !self.current.is(&certificate);
                self.current.serve(certificate, &self.metrics);
                Ok(is_other)
            }
            (TlsConfig::Acme(config), Some(acme)) => {
                acme.reload(config, at_once);
                Ok(false)
            }
            (TlsConfig::Files(_), Some(_)) | (TlsConfig::Acme(_), None) => Err(TlsError::Restart),
        }
    }

    /// Gets certificates from the authority and renews them, until this is dropped. With files there is nothing to do.
    pub async fn run(self) {
        match self.acme {
            Some(acme) => acme.run().await,
            None => std::future::pending().await,
        }
    }

    /// An error if handshakes cannot succeed; else a warning if something is wrong with the certificate.
    pub fn ready(&self) -> Result<Option<String>, String> {
        let problem = || self.current.validity()?.problem(jiff::Timestamp::now().as_second());
        // An authority's certificate is renewed, and says itself what is wrong.
        self.acme
            .as_ref()
            .map_or_else(|| Ok(problem().map(|problem| format!("the certificate {problem}"))), |acme| acme.ready())
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.server))
    }
}

/// The certificate that a gateway with this configuration serves, for clients of our own to recognise.
pub fn leaf(config: &TlsConfig, data_dir: &Path) -> Result<CertificateDer<'static>, String> {
    match config {
        TlsConfig::Files(files) => certificate_files::leaf(&files.cert).map_err(|error| error.to_string()),
        TlsConfig::Acme(config) => acme::leaf(config, data_dir),
    }
}

/// The report of `check`. Fetches only the authority's directory.
pub async fn inspect(config: &TlsConfig, data_dir: &Path) -> Result<String, String> {
    match config {
        TlsConfig::Files(files) => {
            let certificate = read(files).map_err(|error| error.to_string())?;
            match certificate.validity.problem(jiff::Timestamp::now().as_second()) {
                Some(problem) => Err(format!("the certificate in {} {problem}", files.cert.display())),
                None => Ok("certificate and key match".to_owned()),
            }
        }
        TlsConfig::Acme(config) => acme::inspect(config, data_dir).await,
    }
}

/// Why Stream may refuse a certificate that can be served.
pub fn doubt(config: &TlsConfig) -> Option<String> {
    match config {
        TlsConfig::Files(files) => certificate_files::doubt(files),
        TlsConfig::Acme(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use streamgate_service::config::CertificateFiles;

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
        let good = CertificateFiles {
            cert: write("cert", &made.cert.pem()),
            key: write("key", &made.signing_key.serialize_pem()),
        };
        let metrics = Metrics::new();
        let tls = Tls::load(&TlsConfig::Files(good.clone()), directory.path(), &metrics).unwrap();
        assert!(metrics.tls_certificate_expiry.get() > 0.0);
        let served = || tls.current.certificate.load_full().unwrap().key.cert.clone();
        let first = served();
        let bad = [
            CertificateFiles { key: write("other", &other.signing_key.serialize_pem()), ..good.clone() },
            CertificateFiles { cert: write("empty", ""), ..good.clone() },
            CertificateFiles { cert: write("noise", "-----BEGIN CERTIFICATE-----\n????"), ..good.clone() },
            CertificateFiles { key: directory.path().join("absent"), ..good.clone() },
        ];
        for files in bad {
            let error = tls.reload(&TlsConfig::Files(files), false).unwrap_err().to_string();
            assert!(error.contains(&directory.path().display().to_string()), "{error}");
            assert_eq!(served(), first);
        }
        let next = CertificateFiles {
            cert: write("cert", &other.cert.pem()),
            key: write("key", &other.signing_key.serialize_pem()),
        };
        tls.reload(&TlsConfig::Files(next), false).unwrap();
        assert_ne!(served(), first);
    }

    #[tokio::test]
    async fn an_expired_certificate_fails_the_check_and_shows_in_the_readiness() {
        let directory = tempfile::tempdir().unwrap();
        let mut parameters = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        parameters.not_before = rcgen::date_time_ymd(2019, 1, 1);
        parameters.not_after = rcgen::date_time_ymd(2020, 1, 1);
        let pair = rcgen::KeyPair::generate().unwrap();
        let files = CertificateFiles { cert: directory.path().join("cert"), key: directory.path().join("key") };
        std::fs::write(&files.cert, parameters.self_signed(&pair).unwrap().pem()).unwrap();
        std::fs::write(&files.key, pair.serialize_pem()).unwrap();
        let config = TlsConfig::Files(files);
        let error = inspect(&config, directory.path()).await.unwrap_err();
        assert!(error.contains("has expired on 2020-01-01"), "{error}");
        let tls = Tls::load(&config, directory.path(), &Metrics::new()).unwrap();
        assert!(tls.ready().unwrap().unwrap().contains("the certificate has expired"));
    }
}
