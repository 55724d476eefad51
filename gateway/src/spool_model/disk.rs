//! The gateway's own disk in the model.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Mutex;
use streamgate_core::envelope::Envelope;
use streamgate_core::ports::{Spool, StoreError, Usage};
use tokio::sync::watch;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disk {
    Works,
    /// No commit succeeds. After a crash, a failed commit may be found done all the same.
    Fails,
    /// No commit ends until the mode changes.
    Hangs,
}

/// What outlives a process.
#[derive(Clone, Debug, Default)]
pub(super) struct Platter {
    rows: BTreeMap<i64, Envelope>,
    seen: HashSet<String>,
    next: i64,
}

/// SQLite by its contract: a commit that returned is there, one that failed is not there, until a crash decides anew.
#[derive(Debug)]
pub(super) struct File {
    pub(super) mode: watch::Sender<Disk>,
    platter: Mutex<Platter>,
    /// Failed commits, which a crash may find done.
    open: Mutex<Vec<Write>>,
}

#[derive(Clone, Debug)]
pub(super) enum Write {
    Keep(Box<Envelope>),
    Release(Vec<i64>),
}

impl Platter {
    pub(super) fn write(&mut self, write: Write) -> Option<i64> {
        match write {
            Write::Keep(envelope) => {
                if !self.seen.insert(envelope.key.clone()) {
                    return None;
                }
                self.next += 1;
                self.rows.insert(self.next, *envelope);
                Some(self.next)
            }
            Write::Release(rows) => {
                rows.iter().for_each(|row| drop(self.rows.remove(row)));
                None
            }
        }
    }
}

impl File {
    pub(super) fn new(platter: Platter) -> File {
        File { mode: watch::channel(Disk::Works).0, platter: Mutex::new(platter), open: Mutex::default() }
    }

    /// A crash at any moment.
    pub(super) fn crash(&self, coin: bool) -> Platter {
        let mut platter = self.platter.lock().unwrap().clone();
        if coin {
            let open = std::mem::take(&mut *self.open.lock().unwrap());
            for write in open {
                platter.write(write);
            }
        }
        platter
    }

    async fn commit(&self, write: Write) -> Result<Option<i64>, StoreError> {
        tokio::task::yield_now().await;
        let mut mode = self.mode.subscribe();
        let place = self.open.lock().unwrap().len();
        let now = *mode.wait_for(|mode| *mode != Disk::Hangs).await.unwrap();
        match now {
            Disk::Works => Ok(self.platter.lock().unwrap().write(write)),
            Disk::Fails | Disk::Hangs => {
                self.open.lock().unwrap().push(write);
                Err(StoreError::Unavailable(format!("write {place} failed")))
            }
        }
    }
}

impl Spool for File {
    async fn keep(&self, envelope: Envelope) -> Result<Option<i64>, StoreError> {
        self.commit(Write::Keep(Box::new(envelope))).await
    }

    async fn read(&self, after: i64, most: usize, skip: BTreeSet<i64>) -> Result<Vec<(i64, Envelope)>, StoreError> {
        tokio::task::yield_now().await;
        if *self.mode.borrow() == Disk::Fails {
            return Err(StoreError::Unavailable("cannot be read".into()));
        }
        let platter = self.platter.lock().unwrap();
        // Small pages, so that a pass has several.
        let rows = platter.rows.range(after + 1..).filter(|(row, _)| !skip.contains(row));
        Ok(rows.take(most.min(3)).map(|(row, event)| (*row, event.clone())).collect())
    }

    async fn release(&self, numbers: Vec<i64>) -> Result<(), StoreError> {
        self.commit(Write::Release(numbers)).await.map(drop)
    }

    fn ready(&self) -> Result<(), StoreError> {
        match *self.mode.borrow() {
            Disk::Works => Ok(()),
            Disk::Fails | Disk::Hangs => Err(StoreError::Unavailable("no disk".into())),
        }
    }

    fn usage(&self) -> Usage {
        Usage { events: self.platter.lock().unwrap().rows.len() as u64, bytes: 0 }
    }
}
