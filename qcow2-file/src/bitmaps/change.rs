//! Changing the bitmaps of an image in one atomic step.
//!
//! Nothing that is valid in the file is overwritten. Data, tables and a whole new directory go to
//! new clusters; when they and their refcounts are durable, the header switches; when that is
//! durable, the old clusters are freed. A kill before the switch leaves the old bitmaps, a kill
//! after it the new ones, and leaked clusters at worst.

use std::sync::Arc;

use super::bits::Bits;
use super::header;
use super::store::Target;
use super::table::Table;
use super::tracker::Tracker;
use crate::allocate::Allocate;
use crate::error::Result;
use crate::layout::bitmap_directory::{BitmapShape, DirectoryEntry, ImageFacts, TableEntry};
use crate::layout::extension::BitmapsExtension;
use crate::layout::units::HostOffset;
use crate::storage::{Storage, StorageExt};

/// One bitmap of the new directory.
#[derive(Debug, Clone)]
pub(crate) struct Slot {
    /// The entry as it shall stand; its table counts only where the content stays as stored.
    pub(crate) entry: DirectoryEntry,
    /// The entry as it stands in the file; `None` for a new bitmap.
    pub(crate) stored: Option<DirectoryEntry>,
    /// What the bits shall be.
    pub(crate) content: Content,
}

/// The bits of a [`Slot`].
#[derive(Debug, Clone)]
pub(crate) enum Content {
    /// Those in the file.
    Stored,
    /// These.
    Bits(Bits),
    /// Those in the file and the marks.
    Marked(Arc<Tracker>),
}

/// A whole new directory.
#[derive(Debug, Default)]
pub(crate) struct Change {
    /// Its bitmaps, in order.
    pub(crate) slots: Vec<Slot>,
    /// Bitmaps that are in the file and not in it any more: their clusters are freed.
    pub(crate) removed: Vec<DirectoryEntry>,
    /// The directory in the file that is freed. `None` where there is none, or a stale one: what it
    /// names may belong to others by now.
    pub(crate) replaced: Option<BitmapsExtension>,
}

/// Runs of clusters that nothing points at once the header is switched.
#[derive(Default)]
struct Freed(Vec<(HostOffset, u64)>);

impl Freed {
    fn push(&mut self, at: HostOffset, clusters: u64) {
        self.0.push((at, clusters));
    }

    fn release(self, allocator: &mut dyn Allocate) -> Result<()> {
        self.0.into_iter().try_for_each(|(at, clusters)| allocator.free(at, clusters))?;
        allocator.release()
    }
}

impl Change {
    /// Makes the change. An error before the switch leaves the image as it was.
    pub(crate) fn apply(
        self,
        file: &dyn Storage,
        image: ImageFacts,
        allocator: &mut dyn Allocate,
    ) -> Result<()> {
        let geometry = image.geometry;
        let mut target = Target { file, geometry, allocator, taken: Vec::new() };
        let stored = self.store(&mut target, image);
        let (extension, freed) = stored.inspect_err(|_| target.give_back())?;
        allocator.flush()?;
        header::set_extension(file, extension)?;
        // The change is made. What cannot be freed now is leaked, as after a kill.
        if let Err(error) = freed.release(allocator) {
            tracing::warn!(%error, "the clusters of replaced bitmaps are leaked");
        }
        Ok(())
    }

    fn store(
        self,
        target: &mut Target<'_>,
        image: ImageFacts,
    ) -> Result<(Option<BitmapsExtension>, Freed)> {
        let mut freed = Freed::default();
        let table_of = |entry| Table { file: target.file, image, entry };
        for entry in &self.removed {
            free_stored(&table_of(entry), &mut freed)?;
        }
        if let Some(old) = self.replaced {
            let clusters = image.geometry.clusters_for(old.directory_size);
            freed.push(HostOffset(old.directory_offset), clusters);
        }
        let mut entries = Vec::with_capacity(self.slots.len());
        for slot in self.slots {
            entries.push(slot.store(target, image, &mut freed)?);
        }
        Ok((target.store_directory(&entries)?, freed))
    }
}

impl Slot {
    /// A bitmap that stays as it is.
    pub(crate) fn kept(entry: DirectoryEntry) -> Self {
        Self { stored: Some(entry.clone()), entry, content: Content::Stored }
    }

    /// Stores what changed and answers the entry for the new directory.
    fn store(
        self,
        target: &mut Target<'_>,
        image: ImageFacts,
        freed: &mut Freed,
    ) -> Result<DirectoryEntry> {
        let table_of = |entry| Table { file: target.file, image, entry };
        let (table, table_entries) = match (&self.content, &self.stored) {
            (Content::Stored, _) => return Ok(self.entry),
            (Content::Bits(bits), stored) => {
                if let Some(stored) = stored {
                    free_stored(&table_of(stored), freed)?;
                }
                target.store_bits(bits)?
            }
            (Content::Marked(tracker), Some(stored)) => {
                match store_marked(target, &table_of(stored), tracker, freed)? {
                    Some(table) => table,
                    None => return Ok(self.entry),
                }
            }
            (Content::Marked(tracker), None) => target.store_bits(&marks(tracker, image))?,
        };
        Ok(DirectoryEntry { table, table_entries, ..self.entry })
    }
}

/// All marks of a tracker as bits.
pub(crate) fn marks(tracker: &Tracker, image: ImageFacts) -> Bits {
    let shape = BitmapShape::new(image.size, tracker.granularity_bits(), image.geometry);
    let mut bits = Bits::new(shape.bits);
    let mut buf = vec![0; 64 << 10];
    let mut offset = 0;
    while offset < shape.bytes {
        buf.fill(0);
        if tracker.add_to(offset, &mut buf) {
            bits.write_bytes(offset, &buf);
        }
        offset += buf.len() as u64;
    }
    bits
}

/// Frees a stored bitmap's table and data.
fn free_stored(table: &Table<'_>, freed: &mut Freed) -> Result<()> {
    let entries = u64::from(table.entry.table_entries);
    table.entries(0..entries, |_, entry| {
        if let TableEntry::Data(at) = entry {
            freed.push(at, 1);
        }
        Ok(())
    })?;
    free_table(table, freed);
    Ok(())
}

fn free_table(table: &Table<'_>, freed: &mut Freed) {
    let bytes = u64::from(table.entry.table_entries) * 8;
    freed.push(table.entry.table, table.image.geometry.clusters_for(bytes));
}

/// Stores the clusters of a bitmap in which marks add something, and a new table. `None` when no
/// mark adds anything.
fn store_marked(
    target: &mut Target<'_>,
    table: &Table<'_>,
    tracker: &Tracker,
    freed: &mut Freed,
) -> Result<Option<(HostOffset, u32)>> {
    if tracker.is_clean() {
        return Ok(None);
    }
    let size = target.geometry.cluster_size();
    let len = usize::try_from(size).unwrap_or(0);
    let mut entries = table.all_entries()?;
    let (mut old, mut new) = (vec![0; len], vec![0; len]);
    let mut has_changed = false;
    for (index, entry) in (0u64..).zip(&mut entries) {
        new.fill(0);
        if *entry == TableEntry::Ones || !tracker.add_to(index * size, &mut new) {
            continue;
        }
        table.read_bits(index * size, &mut old)?;
        new.iter_mut().zip(&old).for_each(|(byte, before)| *byte |= before);
        if new == old {
            continue;
        }
        let at = target.allocate(1)?;
        target.file.write(&new, at.0)?;
        if let TableEntry::Data(before) = std::mem::replace(entry, TableEntry::Data(at)) {
            freed.push(before, 1);
        }
        has_changed = true;
    }
    if !has_changed {
        return Ok(None);
    }
    free_table(table, freed);
    target.store_table(&entries).map(Some)
}
