//! Checks that the open files are still the ones at their paths.
//!
//! An open file outlives its name: after `rm -rf`, `mv` or a lazy unmount, commits succeed, and are lost when the
//! process ends.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Device and inode: constant for the same file.
type Identity = (u64, u64);

#[derive(Debug)]
pub(super) struct FileWatch {
    directory: Watched,
    database: Watched,
    log: Watched,
    /// When the files were last found to be the right ones.
    seen: Option<Instant>,
}

/// Between commits in quick succession, the look after one is recent enough for the next. Chosen so that a busy store
/// looks once per commit, and far below the time that moving a directory takes.
const RECENT: Duration = Duration::from_millis(20);

#[derive(Debug)]
struct Watched {
    path: PathBuf,
    /// `None` until it was seen for the first time.
    known: Option<Identity>,
}

impl FileWatch {
    /// For an open database; the first look records its files.
    pub(super) fn of(database: &Path) -> FileWatch {
        let watched = |path: PathBuf| Watched { path, known: None };
        let parent = database.parent().filter(|parent| !parent.as_os_str().is_empty());
        let mut log = database.as_os_str().to_owned();
        log.push("-wal");
        FileWatch {
            directory: watched(parent.unwrap_or(Path::new(".")).to_owned()),
            database: watched(database.to_owned()),
            log: watched(log.into()),
            seen: None,
        }
    }

    /// Like `look`, unless the last look was a moment ago.
    pub(super) fn look_unless_recent(&mut self) -> Result<(), String> {
        if self.seen.is_some_and(|seen| seen.elapsed() < RECENT) {
            return Ok(());
        }
        self.look().map(drop)
    }

    /// Returns the length of the write-ahead log. The error says which path no longer leads to the open file.
    pub(super) fn look(&mut self) -> Result<u64, String> {
        if self.directory.known.is_none() {
            self.directory.look()?;
        }
        // The files' paths lead through the directory, so it is checked only to name what is wrong.
        let found = self.database.look().and_then(|_| self.log.look());
        self.seen = found.is_ok().then(Instant::now);
        if found.is_err() {
            self.directory.look()?;
        }
        found
    }
}

impl Watched {
    fn look(&mut self) -> Result<u64, String> {
        let path = self.path.display();
        match self.path.metadata() {
            Ok(found) => {
                let identity = (found.dev(), found.ino());
                if *self.known.get_or_insert(identity) == identity {
                    Ok(found.len())
                } else {
                    Err(format!("{path} is not what this process has open"))
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Err(format!("{path} is not there any more")),
            Err(error) => Err(format!("{path}: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A watched directory with a database and its log.
    fn watched() -> (tempfile::TempDir, PathBuf, FileWatch) {
        let home = tempfile::tempdir().unwrap();
        let data = home.path().join("data");
        std::fs::create_dir(&data).unwrap();
        std::fs::write(data.join("streamgate.db"), "").unwrap();
        std::fs::write(data.join("streamgate.db-wal"), "12345").unwrap();
        let mut file_watch = FileWatch::of(&data.join("streamgate.db"));
        assert_eq!(file_watch.look(), Ok(5));
        (home, data, file_watch)
    }

    #[test]
    fn a_missing_or_replaced_file_is_named() {
        for name in ["streamgate.db", "streamgate.db-wal"] {
            let (_home, data, mut file_watch) = watched();
            std::fs::rename(data.join(name), data.join("moved")).unwrap();
            let gone = file_watch.look().unwrap_err();
            assert!(gone.ends_with(&format!("{name} is not there any more")), "{gone}");
            std::fs::write(data.join(name), "").unwrap();
            let other = file_watch.look().unwrap_err();
            assert!(other.ends_with(&format!("{name} is not what this process has open")), "{other}");
            std::fs::rename(data.join("moved"), data.join(name)).unwrap();
            assert!(file_watch.look().is_ok(), "it is back");
        }
        let (home, data, mut file_watch) = watched();
        std::fs::rename(&data, home.path().join("moved")).unwrap();
        assert!(file_watch.look().unwrap_err().ends_with("data is not there any more"));
    }
}
