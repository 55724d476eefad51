//! X-Signature: hex HMAC-SHA256 of the uncompressed body under the app's API secret.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

type HmacSha256 = Hmac<Sha256>;

/// An API secret, ready to sign and verify: the key schedule is computed once, not for each request.
#[derive(Clone)]
pub struct SigningKey(HmacSha256);

impl SigningKey {
    #[expect(clippy::expect_used, reason = "HMAC takes a key of any length; the error type is the trait's")]
    pub fn new(secret: &[u8]) -> SigningKey {
        SigningKey(HmacSha256::new_from_slice(secret).expect("HMAC takes a key of any length"))
    }

    /// The signature that Stream puts into X-Signature for this body.
    pub fn sign(&self, body: &[u8]) -> Signature {
        let mut mac = self.0.clone();
        mac.update(body);
        Signature(mac.finalize().into_bytes().into())
    }
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SigningKey(…)")
    }
}

/// A well-formed X-Signature: 32 bytes, read from 64 hex digits of either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature([u8; 32]);

impl Signature {
    pub fn parse(header: &[u8]) -> Option<Signature> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(header, &mut bytes).ok()?;
        Some(Signature(bytes))
    }

    pub fn bytes(self) -> [u8; 32] {
        self.0
    }

    /// In lower case, as Stream's SDKs compare it.
    pub fn to_hex(self) -> String {
        hex::encode(self.0)
    }
}

/// Takes the body piece by piece, and at the end says whether any secret of the key signed it.
#[derive(Clone)]
pub struct Verifier {
    macs: Vec<HmacSha256>,
    expected: Signature,
}

impl Verifier {
    pub fn new(keys: &[SigningKey], expected: Signature) -> Verifier {
        Verifier { macs: keys.iter().map(|key| key.0.clone()).collect(), expected }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        for mac in &mut self.macs {
            mac.update(bytes);
        }
    }

    /// Each comparison takes constant time and every secret is compared, so that timing does not reveal which one matched.
    pub fn verify(self) -> bool {
        let expected = self.expected.0;
        self.macs.into_iter().fold(false, |found, mac| mac.verify_slice(&expected).is_ok() | found)
    }
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier").field("secrets", &self.macs.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &[u8] = b"test_secret_do_not_use_in_production";
    const BODY: &[u8] = br#"{"type":"message.new","created_at":1778198400000000000}"#;
    const SIGNATURE: &str = "408ab27d58b18a584d29f2801dde0d5ad20e5f5965039ac88d2ef49014a2c4a7";

    fn verify(secrets: &[&[u8]], body: &[u8], signature: &str) -> bool {
        let keys: Vec<_> = secrets.iter().map(|secret| SigningKey::new(secret)).collect();
        let mut verifier = Verifier::new(&keys, Signature::parse(signature.as_bytes()).unwrap());
        for piece in body.chunks(7) {
            verifier.update(piece);
        }
        verifier.verify()
    }

    #[test]
    fn the_sdk_vector() {
        assert_eq!(SigningKey::new(SECRET).sign(BODY).to_hex(), SIGNATURE);
        assert!(verify(&[SECRET], BODY, SIGNATURE));
        assert!(verify(&[SECRET], BODY, &SIGNATURE.to_uppercase()));
        assert!(!verify(&[SECRET], b"{}", SIGNATURE));
        assert!(!verify(&[b"another"], BODY, SIGNATURE));
        assert!(!verify(&[], BODY, SIGNATURE));
    }

    #[test]
    fn any_secret_of_the_key_may_verify() {
        assert!(verify(&[b"new", SECRET], BODY, SIGNATURE));
        assert!(verify(&[SECRET, b"old"], BODY, SIGNATURE));
    }

    #[test]
    fn malformed_signatures() {
        for bad in ["", "abc", &SIGNATURE[..63], &format!("{SIGNATURE}0"), &SIGNATURE.replace('4', "g")] {
            assert_eq!(Signature::parse(bad.as_bytes()), None, "{bad}");
        }
    }
}
