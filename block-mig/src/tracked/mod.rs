//! The disk through which a running guest reads and writes.

mod gate;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use format_spec::Blame;
use mig_core::block::{BlockSink, BlockSource, CompressedUnit, Extent, SECTOR_BYTES};
use mig_core::dirty::{DirtySet, Recorder};
use mig_core::{Error, Result};

use self::gate::Gate;
pub use self::gate::HandedOver;

/// log2 of the unit in which a migration tracks a disk: a leaf of the content hash.
pub const UNIT_BITS: u8 = 16;

/// A disk that a VMM, daemon or test puts between its guest and the storage, so that the disk can
/// be migrated while it is written to.
///
/// Every change marks, *after* it is done and *before* it is reported as complete, also when it
/// failed, what has to know of it: the backup bitmaps (the [`Recorder`]) and, while a migration
/// runs, the migration's [`DirtySet`]. Without a migration a write costs two atomic additions and
/// what the recorder costs.
///
/// All methods may be called from any thread at any time. Reads never wait. Writes wait while the
/// disk is paused, and fail with [`HandedOver`] as their cause once it is [retired](Self::retire).
pub struct TrackedDisk<D> {
    disk: D,
    recorder: Arc<dyn Recorder>,
    gate: Gate,
    /// The migration's, as long as that holds it.
    dirty: RwLock<Weak<DirtySet>>,
}

impl<D: BlockSource + BlockSink> TrackedDisk<D> {
    /// A tracked `disk` whose changes `recorder` is told of; `Arc::new(())` where nobody is.
    pub fn new(disk: D, recorder: Arc<dyn Recorder>) -> Self {
        Self { disk, recorder, gate: Gate::new(), dirty: RwLock::default() }
    }

    /// The disk below. Who writes to it directly is not seen by anybody.
    pub fn inner(&self) -> &D {
        &self.disk
    }

    /// The disk below, when nobody uses it any more.
    pub fn into_inner(self) -> D {
        self.disk
    }

    /// Guest-visible size in bytes.
    pub fn size(&self) -> u64 {
        BlockSource::size(&self.disk)
    }

    /// Fills `buf`.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check("read", offset, buf.len() as u64)?;
        self.disk.read_at(buf, offset)
    }

    /// Writes all of `buf`.
    pub fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.change("write", offset, buf.len() as u64, |disk| disk.write_at(buf, offset))
    }

    /// Makes the range read as zero.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.change("write zeroes", offset, len, |disk| disk.write_zeroes(offset, len))
    }

    /// Tells the disk that the content of the range is not needed. It may read as anything
    /// afterwards, and is sent again like any other change.
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.change("discard", offset, len, |disk| disk.discard(offset, len))
    }

    /// Makes everything written before durable: what a guest calls a flush.
    pub fn flush(&self) -> Result<()> {
        self.disk.sync()
    }

    /// Stops writes: when this returns, all that were in flight are complete and marked, and new
    /// ones wait. Whoever pauses resumes: a backup job and a migration may both hold the disk.
    pub fn pause(&self) {
        self.gate.shut();
    }

    /// Lets the writes go on that wait, once all who paused have resumed. Does nothing on a retired
    /// disk.
    pub fn resume(&self) {
        self.gate.open();
    }

    /// Stops writes for good: the destination has taken over. Those that wait fail.
    pub fn retire(&self) {
        self.gate.retire();
    }

    /// Whether writes wait or fail.
    pub fn is_paused(&self) -> bool {
        self.gate.is_shut()
    }

    /// Begins to mark changes for a migration, in a new set with nothing in it, until that is
    /// dropped. Every change that is not complete yet is in the set once it is; every earlier one
    /// is in the disk's content. Fails while another migration has its set: a second one would take
    /// the marks away from it.
    pub fn start_tracking(&self) -> Result<Arc<DirtySet>> {
        let mut dirty = self.dirty.write().unwrap_or_else(PoisonError::into_inner);
        if dirty.strong_count() > 0 {
            return Err(refused("migrate", 0, "the disk is being migrated already".into()));
        }
        let set = Arc::new(DirtySet::new(self.size(), UNIT_BITS));
        *dirty = Arc::downgrade(&set);
        Ok(set)
    }

    fn change(
        &self,
        operation: &'static str,
        offset: u64,
        len: u64,
        act: impl FnOnce(&D) -> Result<()>,
    ) -> Result<()> {
        self.check(operation, offset, len)?;
        self.gate.enter().map_err(|gone| refused(operation, offset, Box::new(gone)))?;
        let _change = Change { disk: self, range: offset..offset.saturating_add(len) };
        act(&self.disk)
    }

    fn check(&self, operation: &'static str, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size());
        if end.is_some() && offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES)
        {
            return Ok(());
        }
        let size = self.size();
        let reason = format!("{len} bytes are not whole sectors inside the disk's {size} bytes");
        Err(refused(operation, offset, reason.into()))
    }

    fn mark(&self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        self.recorder.record_write(range.clone());
        // Looked up only now: a migration that began meanwhile must learn of this change.
        if let Some(set) = self.dirty.read().unwrap_or_else(PoisonError::into_inner).upgrade() {
            set.mark(range);
        }
    }
}

/// A disk that can be migrated while a guest writes to it, whatever it keeps its bytes in.
pub trait LiveSource: BlockSource {
    /// See [`TrackedDisk::start_tracking`].
    fn start_tracking(&self) -> Result<Arc<DirtySet>>;
    /// See [`TrackedDisk::pause`].
    fn pause(&self);
    /// See [`TrackedDisk::resume`].
    fn resume(&self);
    /// See [`TrackedDisk::retire`].
    fn retire(&self);
}

impl<D: BlockSource + BlockSink> LiveSource for TrackedDisk<D> {
    fn start_tracking(&self) -> Result<Arc<DirtySet>> {
        TrackedDisk::start_tracking(self)
    }

    fn pause(&self) {
        TrackedDisk::pause(self);
    }

    fn resume(&self) {
        TrackedDisk::resume(self);
    }

    fn retire(&self) {
        TrackedDisk::retire(self);
    }
}

/// A change under way. However it ends, a panic of the disk included, it is marked and then leaves.
struct Change<'a, D: BlockSource + BlockSink> {
    disk: &'a TrackedDisk<D>,
    range: Range<u64>,
}

impl<D: BlockSource + BlockSink> Drop for Change<'_, D> {
    fn drop(&mut self) {
        self.disk.mark(self.range.clone());
        self.disk.gate.leave();
    }
}

fn refused(
    operation: &'static str,
    offset: u64,
    source: Box<dyn std::error::Error + Send + Sync>,
) -> Error {
    Error::Device { operation, offset, blame: Blame::Caller, source }
}

/// As a migration reads it.
impl<D: BlockSource + BlockSink> BlockSource for TrackedDisk<D> {
    fn size(&self) -> u64 {
        BlockSource::size(&self.disk)
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<Extent> {
        // A host offset is only worth something while nobody writes.
        self.disk.extent(offset, max_len).map(|extent| Extent { host: None, ..extent })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.disk.read_at(buf, offset)
    }

    fn has_base(&self) -> bool {
        self.disk.has_base()
    }

    fn held(&self, offset: u64, max_len: u64) -> Result<Extent> {
        self.disk.held(offset, max_len).map(|extent| Extent { host: None, ..extent })
    }

    fn read_compressed(&self, offset: u64, out: &mut Vec<u8>) -> Result<Option<CompressedUnit>> {
        self.disk.read_compressed(offset, out)
    }
}

/// As a guest writes it, for programs that hold their disk as a sink.
impl<D: BlockSource + BlockSink> BlockSink for TrackedDisk<D> {
    fn size(&self) -> u64 {
        BlockSource::size(&self.disk)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        TrackedDisk::write_zeroes(self, offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        TrackedDisk::discard(self, offset, len)
    }

    fn reads_as_zero(&self, offset: u64, len: u64) -> bool {
        self.disk.reads_as_zero(offset, len)
    }

    fn allocation_unit(&self) -> u64 {
        self.disk.allocation_unit()
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn sync(&self) -> Result<()> {
        self.disk.sync()
    }
}
