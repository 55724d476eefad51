//! A damaged file is detected at the start and set aside under a new name. Nothing in it is deleted, and nothing of it
//! is trusted.

use super::{OpenError, now_ms, schema};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode};
use std::fs::File;
use std::path::{Path, PathBuf};
use streamgate_core::timestamp::rfc3339;

/// Part of the name of a file that was set aside, followed by the time.
const ASIDE: &str = ".damaged-";

/// Opens the owner's writing connection, on a new file if the old one is damaged.
pub(super) fn open_owner(path: &Path, max_bytes: u64) -> Result<Connection, OpenError> {
    let failed = |error| OpenError::Database { path: path.to_owned(), error };
    if let Some(what) = find(path).map_err(failed)? {
        let aside = set_aside(path).map_err(|error| OpenError::SetAside { path: path.to_owned(), error })?;
        tracing::error!(
            file = %path.display(), aside = %aside.display(), what,
            "the store is damaged: set aside as it is, going on with an empty one. Events that were in it are not handed on; \
             keep the file: what can still be read of it is there"
        );
    }
    schema::open_owner(path, max_bytes)
}

/// What is wrong with the file, if anything. Reads the whole file once: damage found later would stop the queue.
fn find(path: &Path) -> rusqlite::Result<Option<String>> {
    let look = || {
        let connection = Connection::open(path)?;
        // A damaged file is left exactly as it was found.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0))
    };
    match look() {
        Ok(report) if report == "ok" => Ok(None),
        Ok(report) => Ok(Some(report)),
        Err(error) => match error.sqlite_error_code() {
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => Ok(Some(error.to_string())),
            _ => Err(error),
        },
    }
}

/// The files that were set aside in a data directory, without their logs.
pub fn set_aside_in(data_dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let marked = |path: &PathBuf| {
        let name = path.to_string_lossy();
        name.contains(ASIDE) && name.ends_with('Z')
    };
    let entries = data_dir.read_dir()?.map(|entry| entry.map(|entry| entry.path()));
    let mut found: Vec<_> = entries.filter(|path| path.as_ref().map_or(true, marked)).collect::<Result<_, _>>()?;
    found.sort();
    Ok(found)
}

/// Renames the file together with its log, which may hold the last commits.
fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    let with = |path: &Path, suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let aside = with(path, &format!("{ASIDE}{}", rfc3339(now_ms())));
    // The log goes first: if the rename stops halfway, a database without its log would be taken for a complete one.
    for suffix in ["-wal", "-shm", ""] {
        let (from, to) = (with(path, suffix), with(&aside, suffix));
        match std::fs::rename(&from, &to) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
    }
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    fn files(directory: &Path) -> Vec<PathBuf> {
        set_aside_in(directory).unwrap()
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_an_intact_one_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.db");
        let fill = |connection: &Connection| {
            for n in 0..200 {
                let sql = "INSERT INTO dead (reason, died_at, attempt, app, kind, webhook_id, type, headers, body)
                           VALUES ('poison', 0, 1, '', '', '', '', '', zeroblob(4000 + ?1))";
                connection.execute(sql, [n]).unwrap();
            }
        };
        fill(&open_owner(&path, 1 << 20).unwrap());
        let connection = open_owner(&path, 1 << 20).unwrap();
        let rows = |connection: &Connection| {
            connection.query_row("SELECT count(*) FROM dead", [], |row| row.get::<_, i64>(0)).unwrap()
        };
        assert_eq!((rows(&connection), files(directory.path())), (200, vec![]));
        drop(connection);
        let mut file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.seek(SeekFrom::Start(10 * 8192)).unwrap();
        file.write_all(&[0xff; 3 * 8192]).unwrap();
        let damaged = std::fs::read(&path).unwrap();
        assert_eq!(rows(&open_owner(&path, 1 << 20).unwrap()), 0);
        let aside = files(directory.path());
        assert_eq!(aside.len(), 1, "{aside:?}");
        assert!(std::fs::read(&aside[0]).unwrap() == damaged, "as it was found");
        // Not a database at all.
        std::fs::write(&path, vec![7; 10_000]).unwrap();
        drop(open_owner(&path, 1 << 20).unwrap());
        assert_eq!(files(directory.path()).len(), 2);
    }
}
