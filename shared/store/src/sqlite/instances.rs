//! The process that owns a data directory, as it describes itself: a small file next to the store, which a command reads while the
//! store is busy, or damaged. It is not synced: after a crash of the machine no process runs.

use super::directory::NO_SYMLINK;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use streamgate_core::instance::{GONE_AFTER, Instance};
use streamgate_core::ports::{Instances, StoreError};

/// The file's name in the data directory.
pub(super) const INSTANCE: &str = "instance.json";
/// It describes one process; what is larger is not ours.
const MAX_BYTES: u64 = 64 << 10;

/// The owner of a data directory.
#[derive(Debug)]
pub struct InstanceFile(Arc<PathBuf>);

impl InstanceFile {
    pub fn of(data_dir: &Path) -> InstanceFile {
        InstanceFile(Arc::new(data_dir.join(INSTANCE)))
    }

    /// On a thread that may block: the disk may hang.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let path = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || work(&path)).await.map_err(super::unavailable)?;
        done.map_err(|error| StoreError::Unavailable(format!("{}: {error}", self.0.display())))
    }
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_added_extension("new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(NO_SYMLINK);
    options.open(&new)?.write_all(text.as_bytes())?;
    std::fs::rename(&new, path)
}

/// The description, unless its last heartbeat is too old.
fn read(path: &Path) -> io::Result<Option<Instance>> {
    let file = match OpenOptions::new().read(true).custom_flags(NO_SYMLINK).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // A clock that was set back makes a heartbeat of the future: it is recent.
    let age = SystemTime::now().duration_since(file.metadata()?.modified()?).unwrap_or_default();
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(Instance::parse(&text).filter(|_| age <= GONE_AFTER))
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

impl Instances for InstanceFile {
    async fn beat(&self, instance: &Instance) -> Result<(), StoreError> {
        let text = instance.to_json();
        self.run(move |path| write(path, &text)).await
    }

    async fn leave(&self, _id: &str) -> Result<(), StoreError> {
        self.run(remove).await
    }

    async fn list(&self) -> Result<Vec<Instance>, StoreError> {
        self.run(read).await.map(|found| found.into_iter().collect())
    }
}
