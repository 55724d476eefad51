//! Files in the data directory for one authority: the account's key, the certificate with its key, the last failure.

use super::schedule::Failures;
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use streamgate_service::private;

/// Within the data directory.
const FOLDER: &str = "acme";
const ACCOUNT: &str = "account.pem";
/// Key and chain in one file, so that no crash leaves a key with another key's certificate.
const CERTIFICATE: &str = "certificate.pem";
/// Exists while an attempt runs, and after a failed one.
const ATTEMPT: &str = "attempt.json";

#[derive(Debug, thiserror::Error)]
#[error("cannot use {}: {error}; check the data directory and its permissions", path.display())]
pub(super) struct AuthorityFolderError {
    path: PathBuf,
    error: io::Error,
}

/// An attempt that failed, or during which the process ended.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Attempt {
    pub(super) domains: Vec<String>,
    pub(super) failures: Failures,
    pub(super) why: String,
    /// The earliest time of the next attempt, in seconds since the Unix epoch.
    pub(super) retry_at: i64,
}

/// The folder of one authority: each authority has its own account, and certificates are not interchangeable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AuthorityFolder {
    data_dir: PathBuf,
    folder: PathBuf,
}

impl AuthorityFolder {
    /// `directory` is the authority's URL.
    pub(super) fn at(data_dir: &Path, directory: &str) -> AuthorityFolder {
        let plain = |byte: u8| if byte.is_ascii_alphanumeric() || byte == b'.' { char::from(byte) } else { '-' };
        let name: String = directory.trim_start_matches("https://").bytes().map(plain).collect();
        AuthorityFolder { data_dir: data_dir.to_owned(), folder: data_dir.join(FOLDER).join(name) }
    }

    /// The key, then the chain, in PEM.
    pub(super) fn certificate(&self) -> Result<Option<String>, AuthorityFolderError> {
        self.read(CERTIFICATE)
    }

    /// The account's key, in PEM.
    pub(super) fn account(&self) -> Result<Option<String>, AuthorityFolderError> {
        self.read(ACCOUNT)
    }

    /// The last attempt, if it failed. An unreadable record counts as none.
    pub(super) fn attempt(&self) -> Option<Attempt> {
        serde_json::from_str(&self.read(ATTEMPT).ok()??).ok()
    }

    pub(super) async fn keep_certificate(&self, pem: String) -> Result<(), AuthorityFolderError> {
        self.keep(CERTIFICATE, pem).await
    }

    pub(super) async fn keep_account(&self, pem: String) -> Result<(), AuthorityFolderError> {
        self.keep(ACCOUNT, pem).await
    }

    pub(super) async fn keep_attempt(&self, attempt: &Attempt) -> Result<(), AuthorityFolderError> {
        let failed = |error: serde_json::Error| self.error(ATTEMPT, error.into());
        self.keep(ATTEMPT, serde_json::to_string(attempt).map_err(failed)?).await
    }

    pub(super) fn forget_attempt(&self) {
        // A record that stays only delays an attempt after a restart.
        drop(std::fs::remove_file(self.folder.join(ATTEMPT)));
    }

    /// Reads a file. A file that is not valid text is damaged and counts as missing, so it is replaced.
    fn read(&self, name: &str) -> Result<Option<String>, AuthorityFolderError> {
        let path = self.folder.join(name);
        match private::read(&path) {
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                tracing::warn!(path = %path.display(), "a damaged file is ignored and will be replaced");
                Ok(None)
            }
            read => read.map_err(|error| AuthorityFolderError { path, error }),
        }
    }

    /// Writes a file on a thread that may wait for the disk.
    async fn keep(&self, name: &str, text: String) -> Result<(), AuthorityFolderError> {
        let (kept, path) = (self.clone(), self.folder.join(name));
        let write = move || {
            private::directory(&kept.data_dir.join(FOLDER))?;
            private::directory(&kept.folder)?;
            private::replace(&path, &text)
        };
        let written = tokio::task::spawn_blocking(write).await.map_err(io::Error::other).flatten();
        written.map_err(|error| self.error(name, error))
    }

    fn error(&self, name: &str, error: io::Error) -> AuthorityFolderError {
        AuthorityFolderError { path: self.folder.join(name), error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_have_folders_of_their_own() {
        let folder = |url| AuthorityFolder::at(Path::new("data"), url).folder.display().to_string();
        assert_eq!(folder("https://acme.example:14000/dir"), "data/acme/acme.example-14000-dir");
        assert_eq!(folder("https://../../x"), "data/acme/..-..-x");
        assert_ne!(folder("https://staging.example/dir"), folder("https://example/dir"));
    }
}
