//! What is kept in the data directory: the account, and the certificate with its key.

use instant_acme::AccountCredentials;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use streamgate_service::private;

/// Within the data directory.
const FOLDER: &str = "acme";
const ACCOUNT: &str = "account.json";
/// Key and chain in one file, so that no crash leaves a key beside another key's certificate.
const CERTIFICATE: &str = "certificate.pem";

#[derive(Debug, thiserror::Error)]
pub(super) enum KeptError {
    #[error("cannot use {}: {error}; check the data directory and its permissions", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{} is no account of this version: {error}", path.display())]
    Account { path: PathBuf, error: serde_json::Error },
}

/// An account at an authority.
#[derive(Serialize, Deserialize)]
pub(super) struct Account {
    /// The contact that the authority knows.
    pub(super) contact: Option<String>,
    pub(super) credentials: AccountCredentials,
}

/// The folder of one authority: another one has another account, and its certificates are not interchangeable.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    data_dir: PathBuf,
    folder: PathBuf,
}

impl Kept {
    /// `directory`: the authority's URL.
    pub(super) fn at(data_dir: &Path, directory: &str) -> Kept {
        let plain = |byte: u8| if byte.is_ascii_alphanumeric() || byte == b'.' { char::from(byte) } else { '-' };
        let name: String = directory.trim_start_matches("https://").bytes().map(plain).collect();
        Kept { data_dir: data_dir.to_owned(), folder: data_dir.join(FOLDER).join(name) }
    }

    pub(super) fn certificate_file(&self) -> PathBuf {
        self.folder.join(CERTIFICATE)
    }

    /// PEM: the key, then the chain.
    pub(super) fn certificate(&self) -> Result<Option<String>, KeptError> {
        read(&self.certificate_file())
    }

    pub(super) fn account(&self) -> Result<Option<Account>, KeptError> {
        let path = self.folder.join(ACCOUNT);
        let Some(text) = read(&path)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).map_err(|error| KeptError::Account { path, error })
    }

    pub(super) async fn keep_certificate(&self, pem: String) -> Result<(), KeptError> {
        self.keep(CERTIFICATE, pem).await
    }

    pub(super) async fn keep_account(&self, account: &Account) -> Result<(), KeptError> {
        let failed = |error| KeptError::Account { path: self.folder.join(ACCOUNT), error };
        self.keep(ACCOUNT, serde_json::to_string(account).map_err(failed)?).await
    }

    /// On a thread that may wait for the disk.
    async fn keep(&self, name: &str, text: String) -> Result<(), KeptError> {
        let (kept, path) = (self.clone(), self.folder.join(name));
        let failed = |error| KeptError::Io { path: path.clone(), error };
        let to = path.clone();
        let write = move || {
            private::directory(&kept.data_dir.join(FOLDER))?;
            private::directory(&kept.folder)?;
            private::replace(&to, &text)
        };
        tokio::task::spawn_blocking(write).await.map_err(io::Error::other).flatten().map_err(failed)
    }
}

fn read(path: &Path) -> Result<Option<String>, KeptError> {
    private::read(path).map_err(|error| KeptError::Io { path: path.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_have_folders_of_their_own() {
        let folder = |url| Kept::at(Path::new("data"), url).folder.display().to_string();
        assert_eq!(folder("https://acme.example:14000/dir"), "data/acme/acme.example-14000-dir");
        assert_eq!(folder("https://../../x"), "data/acme/..-..-x");
        assert_ne!(folder("https://staging.example/dir"), folder("https://example/dir"));
    }
}
