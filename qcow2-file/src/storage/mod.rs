//! The bytes below an image.

mod host_file;
mod memory;
mod watched;

use std::io;
use std::sync::Arc;

use crate::error::{Error, Result};

pub use host_file::{Access, FileId, HostFile};
pub use memory::{Fault, Memory, Operation, OperationKind};
pub use watched::{Watched, Writes};

/// The bytes of one file, block device or memory region, at absolute offsets, from any thread.
///
/// An implementation need not order anything by itself: what must be ordered is separated by
/// [`sync`](Storage::sync).
pub trait Storage: Send + Sync + std::fmt::Debug {
    /// Name for error messages.
    fn name(&self) -> Arc<str>;

    /// Length in bytes now.
    fn len(&self) -> io::Result<u64>;

    /// Whether the length is zero.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` from `offset`. Never short: bytes beyond the end read as zero. Whoever must tell
    /// a truncated file from zeroes compares with [`len`](Storage::len).
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` at `offset`, growing a file as needed.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes the range read as zero, by a hole where the storage can, else by writing zeroes. Never
    /// changes the length of a file by itself where the range lies inside it; grows it otherwise.
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Tells the storage that the range's content is not needed any more. Afterwards it reads as
    /// anything. May do nothing.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Takes room for a range that is to be written later. Neither content nor length change. May
    /// do nothing: only an error says that there is no room.
    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    /// Sets the length. New bytes read as zero. A device refuses.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// The run that starts at `offset`: whether it is data or a hole that reads as zero, and its
    /// length, at least 1 and at most `max_len` (which must not be zero). Storage that cannot tell
    /// answers data. Beyond the end everything is a hole.
    fn run_at(&self, offset: u64, max_len: u64) -> io::Result<Run>;

    /// Makes what was written durable, metadata of the file included.
    fn sync(&self) -> io::Result<()>;
}

/// A stretch of a [`Storage`] of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Length in bytes.
    pub len: u64,
    /// Whether it is a hole, which reads as zero.
    pub is_hole: bool,
}

/// [`Storage`] calls with this crate's error, for use inside the crate.
pub(crate) trait StorageExt: Storage {
    /// [`Storage::read_at`] naming the file.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read_at(buf, offset).map_err(|e| self.io_error("read", offset, e))
    }

    /// [`Storage::write_at`] naming the file.
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write_at(buf, offset).map_err(|e| self.io_error("write", offset, e))
    }

    /// Makes room for metadata in a range that nothing refers to yet, by writing zeroes: a file
    /// system that is full is found out while that is a failure like any other, and not in the
    /// middle of a flush.
    fn make_room(&self, offset: u64, len: u64) -> Result<()> {
        let zeroes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.write_at(&zeroes, offset).map_err(|e| self.io_error("make room in", offset, e))
    }

    /// [`Storage::sync`] naming the file.
    fn make_durable(&self) -> Result<()> {
        self.sync().map_err(|e| self.io_error("sync", 0, e))
    }

    /// [`Storage::len`] naming the file.
    fn length(&self) -> Result<u64> {
        self.len().map_err(|e| self.io_error("find the length of the file", 0, e))
    }

    /// [`Storage::run_at`] naming the file, cut on 512-byte borders: a run never ends inside a
    /// sector, except at `max_len`. Where a sector is partly data, it is data.
    fn run(&self, offset: u64, max_len: u64) -> Result<Run> {
        let max_len = max_len.max(1);
        let found = self.run_at(offset, max_len);
        let found = found.map_err(|e| self.io_error("find holes", offset, e))?;
        let end = offset.saturating_add(found.len.clamp(1, max_len));
        let (last, max_end) = (end & !511, offset.saturating_add(max_len));
        if found.is_hole && (last > offset || end >= max_end) {
            let end = if end >= max_end { end } else { last };
            return Ok(Run { len: end - offset, is_hole: true });
        }
        let first_end = end.checked_next_multiple_of(512).unwrap_or(end).min(max_end);
        Ok(Run { len: (first_end - offset).max(1), is_hole: false })
    }

    /// An error about this file.
    fn io_error(&self, action: &'static str, offset: u64, source: io::Error) -> Error {
        Error::Io { file: self.name(), action, offset, source }
    }

    /// An error about bytes of this file.
    fn malformed(&self, what: format_spec::Malformed) -> Error {
        Error::Malformed { file: self.name(), what }
    }
}

impl<S: Storage + ?Sized> StorageExt for S {}
