//! Locks on image files that QEMU respects, and that respect QEMU's.
//!
//! QEMU says with open-file-description locks on single bytes of the image what it does with it:
//!
//! | byte | a read lock on it says |
//! |---|---|
//! | 100 + i | I use permission i |
//! | 200 + i | I do not share permission i with others |
//!
//! with i = 0 consistent read, 1 write, 2 write unchanged data, 3 resize. Read locks never conflict
//! with each other, so each side takes its own and then tests whether the other's byte is locked.
//! Locks live as long as the open file; a killed process leaves none behind.

mod holders;
mod ofd;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use self::ofd::{Bytes, Kind};
use crate::error::{Error, Result};

const USED_AT: u32 = 100;
const UNSHARED_AT: u32 = 200;
const CONSISTENT_READ: u32 = 0;
const WRITE: u32 = 1;
const RESIZE: u32 = 3;
/// Where writers of temporary files keep out each other. Apart from QEMU's bytes, so that one file
/// can carry both.
const TEMPORARY: Bytes = Bytes { start: 0, len: 1 };

/// What the image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Reading: nobody may write or resize meanwhile; others may read.
    Read,
    /// Writing: nobody else may write, resize, or read what must not change meanwhile. Readers that
    /// share everything (`qemu-img info -U`) still may.
    Write,
}

impl Mode {
    /// Permissions used and permissions not shared.
    fn permissions(self) -> (&'static [u32], &'static [u32]) {
        match self {
            Self::Read => (&[CONSISTENT_READ], &[WRITE, RESIZE]),
            Self::Write => (&[CONSISTENT_READ, WRITE, RESIZE], &[WRITE, RESIZE]),
        }
    }
}

/// A lock, held until it is dropped. It belongs to the *open file*: duplicates of the descriptor
/// share it, and it also ends when the last of them is closed.
#[derive(Debug)]
pub struct Lock {
    file: File,
    held: Vec<Bytes>,
}

impl Drop for Lock {
    fn drop(&mut self) {
        for bytes in self.held.drain(..) {
            if let Err(error) = ofd::unlock(&self.file, bytes) {
                tracing::warn!(%error, ?bytes, "a lock could not be given back");
            }
        }
    }
}

/// Takes the image `file`, whose name for messages is `name`, for reading or writing without
/// waiting. [`Error::InUse`] says who is in the way, where that can be known. A file opened for
/// reading only can be locked for writing.
pub fn acquire(file: &File, name: &Arc<str>, mode: Mode) -> Result<Lock> {
    let failed = |source| Error::Io { file: name.clone(), action: "lock", offset: 0, source };
    let mut lock = Lock { file: file.try_clone().map_err(failed)?, held: Vec::new() };
    let (used, unshared) = mode.permissions();
    let byte = |start| Bytes { start, len: 1 };
    let own = used.iter().map(|i| USED_AT + i).chain(unshared.iter().map(|i| UNSHARED_AT + i));
    for bytes in own.map(byte) {
        if !ofd::try_lock(file, Kind::Shared, bytes).map_err(failed)? {
            // Our own half-taken lock must not be named among those in the way.
            drop(lock);
            return Err(in_use(file, name, bytes));
        }
        lock.held.push(bytes);
    }
    let theirs = used.iter().map(|i| UNSHARED_AT + i).chain(unshared.iter().map(|i| USED_AT + i));
    for bytes in theirs.map(byte) {
        if !ofd::is_free(file, Kind::Exclusive, bytes).map_err(failed)? {
            drop(lock);
            return Err(in_use(file, name, bytes));
        }
    }
    Ok(lock)
}

/// Who has the image `file` open for writing now, as "name (pid N)" where that can be known: `None`
/// where nobody has, of those who take locks. Takes no lock itself, and keeps nobody off. What the
/// caller holds through another open file counts, too.
pub fn writers(file: &File, name: &Arc<str>) -> Result<Option<Vec<String>>> {
    let bytes = Bytes { start: USED_AT + WRITE, len: 1 };
    let is_free = ofd::is_free(file, Kind::Exclusive, bytes).map_err(|source| Error::Io {
        file: name.clone(),
        action: "look for locks",
        offset: 0,
        source,
    })?;
    Ok((!is_free).then(|| holders::of(file, bytes)))
}

/// Takes a temporary file (SPEC 3.1) for its writer alone. `None` when `path` does not name `file`
/// any more: another writer has published or removed it meanwhile, and the caller starts again.
pub fn acquire_temporary(file: &File, path: &Path) -> Result<Option<Lock>> {
    let name: Arc<str> = path.to_string_lossy().into();
    let failed = |source| Error::Io { file: name.clone(), action: "lock", offset: 0, source };
    let mut lock = Lock { file: file.try_clone().map_err(failed)?, held: Vec::new() };
    if !ofd::try_lock(file, Kind::Exclusive, TEMPORARY).map_err(failed)? {
        return Err(in_use(file, &name, TEMPORARY));
    }
    lock.held.push(TEMPORARY);
    let locked = file.metadata().map_err(failed)?;
    match path.symlink_metadata() {
        Ok(named) if (named.dev(), named.ino()) == (locked.dev(), locked.ino()) => Ok(Some(lock)),
        Ok(_) => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed(e)),
    }
}

fn in_use(file: &File, name: &Arc<str>, bytes: Bytes) -> Error {
    Error::InUse { file: name.clone(), holders: holders::of(file, bytes) }
}
