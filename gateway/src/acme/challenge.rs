//! The certificates that prove our names to the authority (RFC 8737).

use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::crypto::ring;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The ALPN protocol of a connection that only checks a challenge.
pub(crate) const PROTOCOL: &[u8] = b"acme-tls/1";
/// Length of the SHA-256 digest that the certificate carries.
const DIGEST: usize = 32;

#[derive(Debug, thiserror::Error)]
pub(super) enum ChallengeError {
    #[error("the challenge's digest has {0} bytes instead of {DIGEST}")]
    Digest(usize),
    #[error("cannot make the challenge's certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("cannot use the challenge's certificate: {0}")]
    Key(#[from] rustls::Error),
}

/// The challenges that can be checked now, by name.
#[derive(Debug, Default)]
pub(crate) struct Challenges(Mutex<HashMap<String, Arc<CertifiedKey>>>);

impl Challenges {
    pub(crate) fn find(&self, name: &str) -> Option<Arc<CertifiedKey>> {
        self.names().get(&name.to_ascii_lowercase()).cloned()
    }

    pub(super) fn proofs(&self) -> Proofs<'_> {
        Proofs { of: self, names: Vec::new() }
    }

    fn names(&self) -> MutexGuard<'_, HashMap<String, Arc<CertifiedKey>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The challenges of one order, withdrawn on drop.
#[derive(Debug)]
pub(super) struct Proofs<'c> {
    of: &'c Challenges,
    names: Vec<String>,
}

impl Proofs<'_> {
    pub(super) fn give(&mut self, name: &str, digest: &[u8]) -> Result<(), ChallengeError> {
        let certified = certificate(name, digest)?;
        self.of.names().insert(name.to_owned(), Arc::new(certified));
        self.names.push(name.to_owned());
        Ok(())
    }
}

impl Drop for Proofs<'_> {
    fn drop(&mut self) {
        let mut names = self.of.names();
        for name in &self.names {
            names.remove(name);
        }
    }
}

/// A self-signed certificate with the digest of the key authorization in its extension.
fn certificate(name: &str, digest: &[u8]) -> Result<CertifiedKey, ChallengeError> {
    if digest.len() != DIGEST {
        return Err(ChallengeError::Digest(digest.len()));
    }
    let mut params = CertificateParams::new([name.to_owned()])?;
    params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest)];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signing = ring::default_provider().key_provider.load_private_key(private)?;
    // Not checked against each other as `CertifiedKey::from_der` would: that rejects the extension, which is critical and
    // unknown to it.
    Ok(CertifiedKey::new(vec![certificate.der().clone()], signing))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proofs_are_found_by_name_until_their_order_ends() {
        let challenges = Challenges::default();
        let mut proofs = challenges.proofs();
        proofs.give("hooks.example.com", &[7; 32]).unwrap();
        assert!(challenges.find("Hooks.Example.com").is_some());
        assert!(challenges.find("example.com").is_none());
        assert!(proofs.give("short", &[7; 31]).is_err());
        drop(proofs);
        assert!(challenges.find("hooks.example.com").is_none());
    }
}
