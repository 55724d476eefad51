//! Describes why a text is not PEM without quoting it: the library's own errors quote the file, which may be a private
//! key.

use rustls_pki_types::pem::Error;

/// Some editors write it before a text; PEM does not allow it.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The text without its byte order mark.
pub fn unmarked(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// What is wrong, without a byte of the text.
pub fn problem(error: &Error) -> String {
    match error {
        Error::MissingSectionEnd { .. } => "a BEGIN line has no END line: is the file cut off?".to_owned(),
        Error::IllegalSectionStart { .. } => {
            "a BEGIN line is not on a line of its own: are the line breaks written as \\n?".to_owned()
        }
        Error::Base64Decode(_) => "the text between BEGIN and END is not base64".to_owned(),
        Error::SectionTooLarge => "a section is too large".to_owned(),
        Error::Io(error) => error.to_string(),
        Error::NoItemsFound => "there is no section of the expected kind".to_owned(),
        _ => "it cannot be parsed".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls_pki_types::{PrivateKeyDer, pem::PemObject};

    #[test]
    fn pem_errors_quote_nothing_of_a_key() {
        for key in [
            "-----BEGIN PRIVATE KEY-----\\nc2VjcmV0\\n-----END PRIVATE KEY-----",
            "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n",
            "-----BEGIN PRIVATE KEY-----\nc2Vj cmV0*\n-----END PRIVATE KEY-----\n",
            "c2VjcmV0",
        ] {
            let error = problem(&PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap_err());
            let bytes = "99, 50, 86, 106";
            assert!(!error.contains("c2Vj") && !error.contains(bytes) && !error.contains('['), "{error}");
        }
    }
}
