//! Bringing the mapping to the file, in the order that a crash cannot hurt; and the end.

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::Editor;
use super::tables::{Table, lock};
use crate::error::Result;
use crate::layout::units::GuestOffset;
use crate::storage::StorageExt;

impl Editor {
    /// Hands everything to the system. Data goes there at once, so this is about the mapping;
    /// writing that takes syncs in between, and where anything is dirty a flush is a
    /// [`sync`](Self::sync).
    pub fn flush(&self) -> Result<()> {
        self.refuse_poisoned()?;
        if self.is_dirty() { self.sync() } else { Ok(()) }
    }

    /// Makes everything that was written before durable. May be called from any thread; writes
    /// that change the mapping wait for it, others and reads do not.
    pub fn sync(&self) -> Result<()> {
        self.refuse_poisoned()?;
        // Most of the data goes out here, while nobody waits.
        self.poison_on_error(self.sync_files())?;
        if !self.is_dirty() {
            return Ok(());
        }
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        self.poison_on_error(self.write_mapping_out())
    }

    /// Ends the editing: makes everything durable, stores the bitmaps that followed the writes,
    /// and at last, in one sector, clears the mark of an unfinished copy. An error leaves the
    /// image readable, with its bitmaps marked as in use and the mark set.
    pub fn close(mut self) -> Result<()> {
        self.sync()?;
        if let Some(guard) = self.guard.take() {
            guard.finish(&mut *lock(&self.allocator))?;
        }
        self.mark.clear(&*self.file)
    }

    /// Ends the editing for now, with the mark of an unfinished copy where it is: makes everything
    /// durable, and the bitmaps that were found valid again, with what they recorded
    /// ([`Guard::suspend`](crate::Guard::suspend)). Whoever goes on finds them as if there had been
    /// no interruption.
    pub fn suspend(mut self) -> Result<()> {
        self.sync()?;
        match self.guard.take() {
            Some(guard) => guard.suspend(&mut *lock(&self.allocator)),
            None => Ok(()),
        }
    }

    /// Whether the image is marked as holding an unfinished in-place copy: from the first write
    /// on, where that was asked for and the image is of version 3.
    pub fn is_marked(&self) -> bool {
        self.mark.is_set()
    }

    fn is_dirty(&self) -> bool {
        let has_counts = {
            let allocator = lock(&self.allocator);
            allocator.has_changes() || allocator.pending_frees() > 0
        };
        has_counts || self.tables.is_dirty()
    }

    fn sync_files(&self) -> Result<()> {
        if self.has_data_file() {
            self.data.make_durable()?;
        }
        self.file.make_durable()
    }

    /// The rules of the module's head, one after the other. The gate is held.
    fn write_mapping_out(&self) -> Result<()> {
        if self.has_data_file() {
            self.data.make_durable()?;
        }
        let mut allocator = lock(&self.allocator);
        allocator.flush()?;
        if self.tables.write_tables()? {
            self.file.make_durable()?;
        }
        if self.tables.write_l1()? {
            self.file.make_durable()?;
        }
        allocator.release()?;
        self.is_release_due.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Flushes when so much was freed that it must be. To be called without a lock.
    pub(super) fn flush_if_due(&self) -> Result<()> {
        if self.is_release_due.load(Ordering::Relaxed) { self.sync() } else { Ok(()) }
    }

    /// The table that maps `at`. To be called without the gate. A cache full of dirty tables is
    /// flushed; one full of tables in use grows by the few that threads hold.
    pub(super) fn table(&self, at: GuestOffset) -> Result<Arc<Table>> {
        let mut force = false;
        loop {
            if let Some(table) = self.tables.table(at, force) {
                return Ok(table);
            }
            self.sync()?;
            force = true;
        }
    }
}
