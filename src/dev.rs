//! The development app, which `up` uses when no app is configured.

use anyhow::Context;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use streamgate_service::{config::AppConfig, private, secret::Secret};
use streamgate_store::sqlite::{SECRET, create_private};

/// The app's name and API key.
pub const DEV: &str = "dev";

/// Path of the file with the app's secret.
pub fn secret_file(data_dir: &Path) -> PathBuf {
    data_dir.join(SECRET)
}

/// Loads the development app; its secret is created at the first start and kept.
pub fn app(data_dir: &Path) -> anyhow::Result<AppConfig> {
    create_private(data_dir)
        .with_context(|| format!("cannot create the data directory {} (store.data_dir)", data_dir.display()))?;
    let file = secret_file(data_dir);
    let mut random = [0; 32];
    getrandom::fill(&mut random).context("cannot get random bytes from the system")?;
    // Created only where nothing exists, not even a symlink.
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file) {
        Ok(mut created) => writeln!(created, "{}", hex::encode(random))
            .and_then(|()| created.sync_all())
            .with_context(|| format!("cannot write the development secret {}", file.display()))?,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(error).with_context(|| format!("cannot create the development secret {}", file.display()));
        }
    }
    existing(data_dir)?.with_context(|| format!("the development secret {} is empty; delete it", file.display()))
}

/// The development app of a data directory, if `up` has made one there.
pub fn existing(data_dir: &Path) -> anyhow::Result<Option<AppConfig>> {
    let file = secret_file(data_dir);
    let read =
        private::read(&file).with_context(|| format!("cannot read the development secret {}", file.display()))?;
    let secret = read.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
    Ok(secret.map(|secret| AppConfig::single(DEV, DEV.to_owned(), Secret::new(secret))))
}
