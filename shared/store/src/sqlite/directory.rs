//! The data directory: accessible to its owner alone, and used by one process at a time.

use super::instances::INSTANCE;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

const DATABASE: &str = "streamgate.db";
const LOCK: &str = "owner.lock";
/// Flag for opening files in the directory: a symlink in their place leads where somebody else wants it to.
#[expect(clippy::cast_possible_wrap, reason = "a flag of open(2), which fits")]
pub(super) const NO_SYMLINK: i32 = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
/// The file of the development app's secret, which the command line keeps next to the store.
pub const SECRET: &str = "dev-secret";
/// The folder in which a gateway keeps its account with a certificate authority, and the certificate.
const ACME: &str = "acme";

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot use the data directory {}: {error}; check store.data_dir and its permissions", path.display())]
    Directory { path: PathBuf, error: io::Error },
    #[error("another streamgate process uses the data directory {}; stop it, or set store.data_dir to another", path.display())]
    Owned { path: PathBuf },
    #[error("there is no store in {}; name the directory that `streamgate up` or a gateway uses as store.data_dir", path.display())]
    Absent { path: PathBuf },
    #[error("{} was written by a newer streamgate (format {found}, this one knows {known}); upgrade this one", path.display())]
    Newer { path: PathBuf, found: i64, known: i64 },
    #[error("{} has format {found}, which `streamgate up` of this version migrates to {known} at its next start", path.display())]
    Older { path: PathBuf, found: i64, known: i64 },
    #[error("cannot open the store {}: {error}", path.display())]
    Database { path: PathBuf, error: rusqlite::Error },
    #[error("the store {} is damaged and cannot be set aside: {error}; move it away by hand, with its -wal file", path.display())]
    SetAside { path: PathBuf, error: io::Error },
    #[error("cannot start a thread for the store: {0}")]
    Thread(io::Error),
}

/// A data directory that this process owns until the value is dropped or the process dies; then the kernel releases the
/// lock.
#[derive(Debug)]
pub(super) struct Owned {
    path: PathBuf,
    _lock: File,
}

impl Owned {
    pub(super) fn take(path: &Path) -> Result<Owned, OpenError> {
        let failed = |error| OpenError::Directory { path: path.to_owned(), error };
        create_private(path).map_err(failed)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(NO_SYMLINK)
            .open(path.join(LOCK))
            .map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {
                let owned = Owned { path: path.to_owned(), _lock: lock };
                owned.private_database().map_err(failed)?;
                Ok(owned)
            }
            Err(TryLockError::WouldBlock) => Err(OpenError::Owned { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => Err(failed(error)),
        }
    }

    /// Creates the database's file, if it is absent, readable by its owner alone: SQLite would use the umask, and would
    /// follow a symlink in its place.
    fn private_database(&self) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600).custom_flags(NO_SYMLINK);
        options.open(self.database()).map(drop)
    }

    pub(super) fn database(&self) -> PathBuf {
        database(&self.path)
    }
}

pub(super) fn database(data_dir: &Path) -> PathBuf {
    data_dir.join(DATABASE)
}

/// Whether the directory holds nothing but a store, or nothing at all.
fn holds_only_ours(path: &Path) -> io::Result<bool> {
    for entry in path.read_dir()? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let is_ours =
            name.starts_with(DATABASE) || name.starts_with(INSTANCE) || [LOCK, SECRET, ACME].contains(&&*name);
        if !is_ours {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the owner of a data directory can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    Ours,
    /// Used all the same: root handles a spool that a service left behind, whichever user that service had.
    OfAnother,
    No,
}

/// `us`: this process's user. Volumes often belong to root and are writable for a service through their group.
fn trust(owner: u32, us: u32) -> Trust {
    match (owner == us || owner == 0, us == 0) {
        (true, _) => Trust::Ours,
        (false, true) => Trust::OfAnother,
        (false, false) => Trust::No,
    }
}

/// Creates the directory with access for its owner alone, and makes its name durable. An existing directory is closed
/// to others if it holds nothing but a store; otherwise open permissions are only logged, because other files in it are
/// not ours to lock away.
pub fn create_private(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        let metadata = path.metadata()?;
        let (mode, owner) = (metadata.permissions().mode() & 0o777, metadata.uid());
        let us = rustix::process::geteuid().as_raw();
        let is_ours = owner == us;
        match trust(owner, us) {
            Trust::Ours => {}
            Trust::OfAnother => {
                tracing::warn!(path = %path.display(), owner, "another user owns the data directory, and can replace what is kept there");
            }
            Trust::No => {
                let what = format!(
                    "it belongs to another user (uid {owner}), who could read and replace what is kept there; chown it to uid {us}, \
                     or run as uid {owner}"
                );
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
            }
        }
        let others = mode & 0o077 != 0;
        if others && is_ours && holds_only_ours(path)? {
            return std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700));
        }
        if others {
            tracing::warn!(path = %path.display(), mode = format!("{mode:o}"), "others can read the data directory; chmod 700 it");
        }
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !parent.exists() {
        create_private(parent)?;
    }
    DirBuilder::new().mode(0o700).create(path)?;
    // The name is an entry of the parent: without this a power loss could take the whole directory.
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_owners() {
        let cases = [
            ((1000, 1000), Trust::Ours),
            ((0, 1000), Trust::Ours),
            ((0, 0), Trust::Ours),
            ((1000, 0), Trust::OfAnother),
            ((1000, 1001), Trust::No),
        ];
        for ((owner, us), expected) in cases {
            assert_eq!(trust(owner, us), expected, "a directory of {owner}, for {us}");
        }
    }
}
