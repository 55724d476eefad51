//! Reads a certificate and its key from two files, and names what is wrong with them.

use crate::certificate::{Certificate, CertificateError};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::ring;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem, pem::PemObject};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use streamgate_service::config::CertificateFiles;
use streamgate_service::http_client;
use streamgate_service::pem::{problem, unmarked};
use x509_parser::prelude::{FromDer, X509Certificate};

/// The object identifier of the curve P-521.
const P521: &str = "1.3.132.0.35";

#[derive(Debug, thiserror::Error)]
pub enum CertificateFileError {
    #[error("cannot read {} (gateway.tls.{key}): {error}", path.display())]
    Unreadable { key: &'static str, path: PathBuf, error: std::io::Error },
    #[error("{} (gateway.tls.{key}) is not PEM: {}", path.display(), problem(error))]
    NotPem { key: &'static str, path: PathBuf, error: pem::Error },
    #[error("{} (gateway.tls.cert) holds no certificate", path.display())]
    Empty { path: PathBuf },
    #[error("{} (gateway.tls.key) holds no private key", path.display())]
    NoKey { path: PathBuf },
    #[error(
        "the key in {} (gateway.tls.key) is encrypted, and nobody can enter its password: decrypt it with `openssl pkey -in {} \
         -out …`, and make the result readable by its owner only", path.display(), path.display()
    )]
    Encrypted { path: PathBuf },
    #[error(
        "{} (gateway.tls.cert) begins with an authority's certificate: put the server's own first, then its intermediates", path.display()
    )]
    Reversed { path: PathBuf },
    #[error(
        "the key in {} (gateway.tls.key) is on the curve P-521, which is not supported: use P-256, P-384, RSA or Ed25519", path.display()
    )]
    UnsupportedCurve { path: PathBuf },
    #[error("the certificate in {} does not match the key in {}: {error}", cert.display(), key.display())]
    Mismatch { cert: PathBuf, key: PathBuf, error: rustls::Error },
    #[error("the certificate in {} cannot be parsed: {error}", path.display())]
    Malformed { path: PathBuf, error: String },
}

pub(crate) fn read(files: &CertificateFiles) -> Result<Certificate, CertificateFileError> {
    let CertificateFiles { cert, key } = files;
    let chain = chain(cert)?;
    let private = private(key)?;
    let certificate = Certificate::new(chain.clone(), private.clone_key()).map_err(|error| match error {
        CertificateError::Empty => CertificateFileError::Empty { path: cert.clone() },
        CertificateError::Malformed(error) => CertificateFileError::Malformed { path: cert.clone(), error },
        CertificateError::Pem(error) => CertificateFileError::NotPem { key: "cert", path: cert.clone(), error },
        CertificateError::Mismatch(_) if is_p521(&chain) => {
            CertificateFileError::UnsupportedCurve { path: key.clone() }
        }
        CertificateError::Mismatch(_) if Certificate::new(reversed(&chain), private.clone_key()).is_ok() => {
            CertificateFileError::Reversed { path: cert.clone() }
        }
        CertificateError::Mismatch(error) => {
            CertificateFileError::Mismatch { cert: cert.clone(), key: key.clone(), error }
        }
    })?;
    if let Some(problem) = certificate.validity.problem(jiff::Timestamp::now().as_second()) {
        tracing::error!(path = %cert.display(), "the TLS certificate {problem}");
    }
    Ok(certificate)
}

/// Why Stream may refuse a certificate that can be served: it is not signed by an authority that this machine trusts, or its
/// chain is incomplete.
pub(crate) fn doubt(files: &CertificateFiles) -> Option<String> {
    let chain = chain(&files.cert).ok()?;
    let certificate = Certificate::new(chain.clone(), private(&files.key).ok()?).ok()?;
    if let Some(ends) = certificate.validity.ends_soon(jiff::Timestamp::now().as_second()) {
        return Some(format!("{}: the certificate {ends}", files.cert.display()));
    }
    let (leaf, intermediates) = chain.split_first()?;
    let name = certificate.names.first()?.replace('*', "any");
    let roots = Arc::new(http_client::system_roots());
    let path = files.cert.display();
    if roots.is_empty() {
        return Some(format!(
            "{path}: this machine trusts no authority, so `check` cannot say whether Stream will trust this one"
        ));
    }
    let verifier =
        WebPkiServerVerifier::builder_with_provider(roots, Arc::new(ring::default_provider())).build().ok()?;
    let verified =
        verifier.verify_server_cert(leaf, intermediates, &ServerName::try_from(name).ok()?, &[], UnixTime::now());
    let error = verified.err()?;
    Some(format!(
        "{path}: not signed by an authority that this machine trusts ({error}): Stream refuses certificates of private authorities, and \
         those without their intermediates"
    ))
}

/// The server's own certificate, which comes first.
pub(crate) fn leaf(path: &Path) -> Result<CertificateDer<'static>, CertificateFileError> {
    chain(path)?.into_iter().next().ok_or_else(|| CertificateFileError::Empty { path: path.to_owned() })
}

fn bytes(key: &'static str, path: &Path) -> Result<Vec<u8>, CertificateFileError> {
    let unreadable = |error| CertificateFileError::Unreadable { key, path: path.to_owned(), error };
    let bytes = std::fs::read(path).map_err(unreadable)?;
    Ok(unmarked(&bytes).to_vec())
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificateFileError> {
    let not_pem = |error| CertificateFileError::NotPem { key: "cert", path: path.to_owned(), error };
    CertificateDer::pem_slice_iter(&bytes("cert", path)?).collect::<Result<_, _>>().map_err(not_pem)
}

fn private(path: &Path) -> Result<PrivateKeyDer<'static>, CertificateFileError> {
    let text = bytes("key", path)?;
    let path = path.to_owned();
    // PKCS #8 marks encryption in the PEM label, the older form in a header.
    let is_encrypted = [&b"ENCRYPTED PRIVATE KEY"[..], b"Proc-Type: 4,ENCRYPTED"];
    if is_encrypted.into_iter().any(|mark| text.windows(mark.len()).any(|window| window == mark)) {
        return Err(CertificateFileError::Encrypted { path });
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| {
        if matches!(error, pem::Error::NoItemsFound) {
            CertificateFileError::NoKey { path }
        } else {
            CertificateFileError::NotPem { key: "key", path, error }
        }
    })
}

fn reversed(chain: &[CertificateDer<'static>]) -> Vec<CertificateDer<'static>> {
    chain.iter().rev().cloned().collect()
}

fn is_p521(chain: &[CertificateDer<'static>]) -> bool {
    let parsed = chain.first().and_then(|leaf| X509Certificate::from_der(leaf).ok());
    parsed.is_some_and(|(_, leaf)| {
        let parameters = leaf.public_key().algorithm.parameters.as_ref();
        parameters.and_then(|curve| curve.as_oid().ok()).is_some_and(|curve| curve.to_id_string() == P521)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

    /// Made with `openssl ecparam -name secp521r1`: rcgen's ring backend cannot make such keys.
    const P521_CERT: &str = include_str!("../testdata/p521.crt");
    const P521_KEY: &str = include_str!("../testdata/p521.key");

    #[test]
    fn a_table_of_odd_files() {
        let directory = tempfile::tempdir().unwrap();
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        let pair = KeyPair::generate().unwrap();
        let own =
            CertificateParams::new(vec!["hooks.example.com".to_owned()]).unwrap().signed_by(&pair, &authority).unwrap();
        let (own, above, key) = (own.pem(), authority.pem(), pair.serialize_pem());
        let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n".to_owned();
        let older = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n-----END RSA PRIVATE KEY-----\n";
        let cases = [
            (format!("{own}{above}"), key.clone(), ""),
            (format!("\u{feff}{own}{above}"), format!("\u{feff}{key}"), ""),
            (format!("{above}{own}"), key.clone(), "begins with an authority's"),
            (own.clone(), encrypted, "is encrypted"),
            (own.clone(), older.to_owned(), "is encrypted"),
            (own.clone(), own.clone(), "holds no private key"),
            (key.clone(), key.clone(), "holds no certificate"),
            (P521_CERT.to_owned(), P521_KEY.to_owned(), "P-521"),
            (own.clone(), KeyPair::generate().unwrap().serialize_pem(), "does not match"),
        ];
        for (cert, key, expected) in cases {
            let files = CertificateFiles { cert: directory.path().join("cert"), key: directory.path().join("key") };
            std::fs::write(&files.cert, &cert).unwrap();
            std::fs::write(&files.key, &key).unwrap();
            match read(&files) {
                Ok(_) => {
                    assert_eq!(expected, "", "{cert}");
                    // No machine trusts the test's authority.
                    assert!(doubt(&files).is_some());
                }
                Err(error) => {
                    let error = error.to_string();
                    assert!(!expected.is_empty() && error.contains(expected), "{expected}: {error}");
                    assert!(error.contains(&directory.path().display().to_string()), "{error}");
                }
            }
        }
    }
}
