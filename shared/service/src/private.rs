//! Files that only this process's user can read: replaced as a whole, durable when written, symlinks not followed.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// A symlink in the place of such a file leads where somebody else wants it to.
#[expect(clippy::cast_possible_wrap, reason = "a flag of open(2), which fits")]
const NO_SYMLINK: i32 = rustix::fs::OFlags::NOFOLLOW.bits() as i32;

/// The file's text, or `None` if there is no file. A symlink is an error.
pub fn read(path: &Path) -> io::Result<Option<String>> {
    let mut text = String::new();
    match OpenOptions::new().read(true).custom_flags(NO_SYMLINK).open(path) {
        Ok(mut file) => file.read_to_string(&mut text).map(|_| Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Creates the directory, mode 0700, if it is absent. Its parent must exist. A symlink in its place is an error.
pub fn directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.symlink_metadata()?.is_dir() => Ok(()),
        created => created,
    }
}

/// Replaces the file, mode 0600. After a crash there is either the old file or the new one, complete.
pub fn replace(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_added_extension("new");
    // May be left over from a crash.
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_whole_and_private_and_a_link_is_not_followed() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("folder");
        directory(&folder).unwrap();
        directory(&folder).unwrap();
        let file = folder.join("file.pem");
        assert_eq!(read(&file).unwrap(), None);
        replace(&file, "one").unwrap();
        std::fs::write(folder.join("file.pem.new"), "left over").unwrap();
        replace(&file, "two").unwrap();
        assert_eq!(read(&file).unwrap().as_deref(), Some("two"));
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&file)), (0o700, 0o600));
        let (other, link) = (home.path().join("other"), folder.join("link"));
        std::fs::write(&other, "another's").unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        assert!(read(&link).is_err());
        let folder_link = home.path().join("folder-link");
        std::os::unix::fs::symlink(&folder, &folder_link).unwrap();
        assert!(directory(&folder_link).is_err());
        replace(&link, "ours").unwrap();
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "another's");
        assert_eq!(read(&link).unwrap().as_deref(), Some("ours"));
    }
}
