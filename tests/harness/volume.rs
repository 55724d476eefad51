//! A small disk of the test's own, which can be filled and made read-only: a tmpfs, for which the test must be allowed to mount.

use super::servers::{Guard, directory};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Mounted until it is dropped, or the test process ends in any way.
#[derive(Debug)]
pub struct Volume {
    root: PathBuf,
    _guard: Guard,
}

/// A command that runs as root, if this user may.
fn as_root(args: &[&str]) -> Command {
    let sudo: &[&str] = if rustix::process::getuid().is_root() { &[] } else { &["sudo", "-n"] };
    let words: Vec<_> = sudo.iter().chain(args).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
}

impl Volume {
    /// `None` where this user may not mount: in a container without CAP_SYS_ADMIN, or without sudo.
    pub fn mount(mebibytes: u32) -> Option<Volume> {
        let root = directory();
        let owner = format!("uid={},mode=700", rustix::process::getuid().as_raw());
        let options = format!("size={mebibytes}m,{owner}");
        let place = root.display().to_string();
        let mounted = as_root(&["mount", "-t", "tmpfs", "-o", &options, "streamgate-test", &place]).output();
        if !mounted.is_ok_and(|output| output.status.success()) {
            std::fs::remove_dir(&root).unwrap();
            return None;
        }
        let unmount = as_root(&["umount", "--lazy", &place]);
        Some(Volume { _guard: Guard::after(&unmount, &root), root })
    }

    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Writes until nothing more fits.
    pub fn fill(&self) {
        let mut filler = std::fs::File::create(self.root.join("filler")).unwrap();
        for size in [1 << 16, 1 << 10, 1] {
            while std::io::Write::write_all(&mut filler, &vec![0; size]).is_ok() {}
        }
    }

    pub fn empty(&self) {
        std::fs::remove_file(self.root.join("filler")).unwrap();
    }

    /// Unmounts it lazily: its directory is empty from now on, and open files stay usable.
    pub fn detach(&self) {
        let output = as_root(&["umount", "--lazy", &self.root.display().to_string()]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// Works only while no file on it is open for writing.
    pub fn read_only(&self, on: bool) {
        let how = if on { "remount,ro" } else { "remount,rw" };
        let output = as_root(&["mount", "-o", how, &self.root.display().to_string()]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}
