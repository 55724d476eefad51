//! A certificate with its key, ready to be served.

use rustls::crypto::ring;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject};
use std::sync::Arc;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

#[derive(Debug, thiserror::Error)]
pub(crate) enum CertificateError {
    #[error("it contains no certificate")]
    Empty,
    #[error("the certificate cannot be parsed: {0}")]
    Malformed(String),
    #[error("the certificate does not match the key: {0}")]
    Mismatch(rustls::Error),
    #[error("cannot read it as PEM: {}", streamgate_service::pem::problem(.0))]
    Pem(pem::Error),
}

#[derive(Debug)]
pub(crate) struct Certificate {
    pub(crate) key: Arc<CertifiedKey>,
    pub(crate) validity: Validity,
    /// The host names in the certificate.
    pub(crate) names: Vec<String>,
}

/// A certificate's period of validity, in seconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Validity {
    pub(crate) not_before: i64,
    pub(crate) not_after: i64,
}

/// How long before its end a certificate is a reason for a warning: the alert has the same bound.
const ENDS_SOON: i64 = 14 * 24 * 60 * 60;

impl Validity {
    /// Why clients refuse the certificate now, in seconds since the Unix epoch; the text follows "the certificate".
    pub(crate) fn problem(self, now: i64) -> Option<String> {
        let date = |second| jiff::Timestamp::from_second(second).unwrap_or_default();
        if now >= self.not_after {
            return Some(format!("has expired on {}: clients refuse it; replace it", date(self.not_after)));
        }
        (now < self.not_before).then(|| format!("is not valid before {}: clients refuse it", date(self.not_before)))
    }

    /// Whether it ends within two weeks, and when.
    pub(crate) fn ends_soon(self, now: i64) -> Option<String> {
        let is_soon = now < self.not_after && self.not_after - now < ENDS_SOON;
        is_soon.then(|| {
            format!("ends on {}: replace it before", jiff::Timestamp::from_second(self.not_after).unwrap_or_default())
        })
    }
}

impl Certificate {
    /// `chain` is the certificate, followed by its intermediates.
    pub(crate) fn new(
        chain: Vec<CertificateDer<'static>>,
        private: PrivateKeyDer<'static>,
    ) -> Result<Certificate, CertificateError> {
        let leaf = chain.first().ok_or(CertificateError::Empty)?.clone();
        let malformed = |error: String| CertificateError::Malformed(error);
        let (_, parsed) = X509Certificate::from_der(&leaf).map_err(|error| malformed(error.to_string()))?;
        let alternative = parsed.subject_alternative_name().map_err(|error| malformed(error.to_string()))?;
        let names = alternative.iter().flat_map(|extension| &extension.value.general_names);
        let names = names.filter_map(|name| {
            if let GeneralName::DNSName(name) = name { Some(name.to_ascii_lowercase()) } else { None }
        });
        let (names, valid) = (names.collect(), parsed.validity());
        let validity = Validity { not_before: valid.not_before.timestamp(), not_after: valid.not_after.timestamp() };
        let key = CertifiedKey::from_der(chain, private, &ring::default_provider());
        Ok(Certificate { key: Arc::new(key.map_err(CertificateError::Mismatch)?), validity, names })
    }

    /// Reads a key and a chain from one PEM text.
    pub(crate) fn from_pem(text: &str) -> Result<Certificate, CertificateError> {
        let chain: Result<_, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
        let private = PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(CertificateError::Pem)?;
        Certificate::new(chain.map_err(CertificateError::Pem)?, private)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_outside_its_validity_has_a_problem_and_one_near_its_end_a_warning() {
        let (day, validity) = (24 * 60 * 60, Validity { not_before: 1_000, not_after: 100_000_000 });
        let problem = |now| validity.problem(now).unwrap_or_default();
        assert!(problem(999).contains("is not valid before 1970-01-01T00:16:40Z"));
        assert_eq!((problem(1_000), problem(99_999_999)), (String::new(), String::new()));
        assert!(problem(100_000_000).contains("has expired on 1973-03-03T09:46:40Z"));
        assert!(validity.ends_soon(100_000_000 - 15 * day).is_none() && validity.ends_soon(100_000_000).is_none());
        assert!(validity.ends_soon(100_000_000 - 13 * day).unwrap().contains("1973-03-03"));
    }
}
