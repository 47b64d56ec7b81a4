//! Changing the bitmaps of an image that nobody writes to.

use std::sync::Arc;

use super::PersistentBitmap;
use super::bits::Bits;
use super::change::{Change, Content, Slot};
use super::header::read_writable;
use super::load::{Bitmaps, Entry, State, image_facts, load_bits};
use super::store::{check_new, new_entry, refuse, unusable};
use super::table::Table;
use crate::allocate::Allocate;
use crate::edit::Allocator;
use crate::error::{Error, Result};
use crate::layout::bitmap_directory::{DirectoryEntry, ImageFacts, LocatedEntry, flags};
use crate::layout::header::Header;
use crate::limits;
use crate::storage::Storage;

/// Changes the bitmaps of an image. Nothing is written before [`commit`](Self::commit), which makes
/// all changes in one atomic step: after a kill at any moment the image has its old bitmaps or its
/// new ones.
///
/// An image whose header has the bitmaps extension across two sectors, as neither QEMU nor this
/// crate lays it out, is the exception: there a kill between two syncs may leave no bitmaps at all.
///
/// The caller holds the image's lock for writing, and nobody changes the image meanwhile. To change
/// bitmaps while guest data is written, use [`Guard`](crate::guard::Guard).
#[derive(Debug)]
pub struct BitmapEditor {
    file: Arc<dyn Storage>,
    header: Header,
    image: ImageFacts,
    change: Change,
    is_changed: bool,
}

/// Where bits to merge come from.
#[derive(Debug, Clone, Copy)]
pub enum MergeSource<'a> {
    /// A consistent bitmap of the same image.
    Named(&'a str),
    /// Bits of another image of the same virtual size, at `1 << granularity_bits` bytes each.
    Bits {
        /// The bits.
        bits: &'a Bits,
        /// log2 of their granularity.
        granularity_bits: u8,
    },
}

impl BitmapEditor {
    /// Reads the bitmaps of an image. Refuses what must not be written: a corrupt or dirty image,
    /// or one whose bitmap directory breaks the spec. Invalidated bitmaps
    /// ([`stale_extension`](super::stale_extension)) are not among those to change; a commit drops
    /// them, and their clusters are leaked, as QEMU does.
    pub fn open(file: Arc<dyn Storage>) -> Result<Self> {
        let header = read_writable(&*file)?;
        let image = image_facts(&*file, &header)?;
        let mut change = Change::default();
        if let Some(bitmaps) = Bitmaps::open(file.clone(), &header)? {
            change.replaced = Some(bitmaps.extension());
            let entries = bitmaps.list().iter().map(|e| e.located.entry.clone());
            change.slots = entries.map(Slot::kept).collect();
        }
        Ok(Self { file, header, image, change, is_changed: false })
    }

    /// The bitmaps as they will be.
    pub fn list(&self) -> Vec<Entry> {
        let entries = self.change.slots.iter().map(|s| s.entry.clone());
        let located = entries.map(|entry| LocatedEntry { at: 0, entry, has_stray_padding: false });
        located.map(Entry::new).collect()
    }

    /// Bits of a consistent bitmap, changes included.
    pub fn load(&self, name: &str) -> Result<Bits> {
        let slot = self.usable(name)?;
        match (&slot.content, &slot.stored) {
            (Content::Bits(bits), _) => Ok(bits.clone()),
            (_, stored) => {
                let entry = stored.as_ref().unwrap_or(&slot.entry);
                load_bits(&Table { file: &*self.file, image: self.image, entry })
            }
        }
    }

    /// Adds a bitmap. Its name must be new.
    pub fn add(&mut self, bitmap: PersistentBitmap) -> Result<()> {
        let file = &*self.file;
        if self.header.version < 3 {
            let reason = "is of version 2, which holds no bitmaps; qemu-img amend -o compat=1.1 \
                          makes it version 3";
            return Err(Error::Refused { file: file.name(), reason: reason.into() });
        }
        let (geometry, size) = (self.image.geometry, self.image.size);
        check_new(file, &bitmap.name, bitmap.granularity_bits, (geometry, size))?;
        if bitmap.bits.len() != super::granules(size, bitmap.granularity_bits) {
            let reason = "does not have one bit per granule of the disk";
            return Err(refuse(file, &bitmap.name, reason));
        }
        self.check_is_new(&bitmap.name)?;
        if self.change.slots.len() >= limits::MAX_BITMAPS as usize {
            let reason =
                format!("cannot be added: the image holds {} already", limits::MAX_BITMAPS);
            return Err(refuse(file, &bitmap.name, reason));
        }
        let entry = new_entry(&bitmap, Default::default());
        self.change.slots.push(Slot { entry, stored: None, content: Content::Bits(bitmap.bits) });
        self.is_changed = true;
        Ok(())
    }

    /// Adds an empty bitmap.
    pub fn add_empty(&mut self, name: &str, granularity_bits: u8, is_enabled: bool) -> Result<()> {
        let g = (self.image.geometry, self.image.size);
        check_new(&*self.file, name, granularity_bits, g)?;
        let bits = Bits::for_disk(self.image.size, granularity_bits);
        self.add(PersistentBitmap { name: name.into(), granularity_bits, is_enabled, bits })
    }

    /// Removes a bitmap in whatever state it is.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let index = self.position(name)?;
        let slot = self.change.slots.remove(index);
        self.change.removed.extend(slot.stored);
        self.is_changed = true;
        Ok(())
    }

    /// Clears all bits.
    pub fn clear(&mut self, name: &str) -> Result<()> {
        let granularity_bits = self.usable(name)?.entry.granularity_bits;
        self.replace(name, Bits::for_disk(self.image.size, granularity_bits))
    }

    /// Lets the bitmap record writes from now on, or stop doing so.
    pub fn set_enabled(&mut self, name: &str, is_enabled: bool) -> Result<()> {
        self.change_entry(name, |entry| {
            entry.flags &= !flags::AUTO;
            if is_enabled {
                entry.flags |= flags::AUTO;
            }
        })
    }

    /// Gives a bitmap another name, which must be new.
    pub fn rename(&mut self, name: &str, new_name: &str) -> Result<()> {
        let granularity_bits = self.usable(name)?.entry.granularity_bits;
        let g = (self.image.geometry, self.image.size);
        check_new(&*self.file, new_name, granularity_bits, g)?;
        self.check_is_new(new_name)?;
        self.change_entry(name, |entry| entry.name = new_name.into())
    }

    /// Sets in the bitmap `name` every granule that touches a set granule of a source.
    pub fn merge(&mut self, name: &str, sources: &[MergeSource<'_>]) -> Result<()> {
        let ours = self.usable(name)?.entry.granularity_bits;
        let mut bits = self.load(name)?;
        for source in sources {
            let merged = match source {
                MergeSource::Named(other) => {
                    let theirs = self.usable(other)?.entry.granularity_bits;
                    bits.merge_scaled(ours, &self.load(other)?, theirs, self.image.size)
                }
                MergeSource::Bits { bits: other, granularity_bits } => {
                    bits.merge_scaled(ours, other, *granularity_bits, self.image.size)
                }
            };
            if !merged {
                let reason = "cannot take in the bits of a disk of another size";
                return Err(refuse(&*self.file, name, reason));
            }
        }
        self.replace(name, bits)
    }

    /// Replaces the bits of a consistent bitmap.
    pub fn replace(&mut self, name: &str, bits: Bits) -> Result<()> {
        let slot = self.usable(name)?;
        if bits.len() != super::granules(self.image.size, slot.entry.granularity_bits) {
            let reason = "does not have one bit per granule of the disk";
            return Err(refuse(&*self.file, name, reason));
        }
        let index = self.position(name)?;
        if let Some(slot) = self.change.slots.get_mut(index) {
            slot.content = Content::Bits(bits);
            self.is_changed = true;
        }
        Ok(())
    }

    /// Makes the changes durable. Walks all metadata first and refuses a corrupt image. Without
    /// changes it does nothing.
    pub fn commit(self) -> Result<()> {
        if !self.is_changed {
            return Ok(());
        }
        let mut allocator = Allocator::open(self.file.clone(), &self.header)?;
        self.commit_with(&mut allocator)
    }

    /// [`commit`](Self::commit) with clusters from an allocator that is open already; its owner has
    /// made sure that the image is not corrupt.
    pub fn commit_with(self, allocator: &mut dyn Allocate) -> Result<()> {
        if !self.is_changed {
            return Ok(());
        }
        if !self.change.slots.is_empty() {
            super::header::check_room(&*self.file, &self.header)?;
        }
        super::header::clear_autoclear(&*self.file, &self.header, !super::header::KNOWN_AUTOCLEAR)?;
        self.change.apply(&*self.file, self.image, allocator)
    }

    fn change_entry(&mut self, name: &str, change: impl FnOnce(&mut DirectoryEntry)) -> Result<()> {
        self.usable(name)?;
        let index = self.position(name)?;
        if let Some(slot) = self.change.slots.get_mut(index) {
            let before = slot.entry.clone();
            change(&mut slot.entry);
            self.is_changed |= slot.entry != before;
        }
        Ok(())
    }

    fn check_is_new(&self, name: &str) -> Result<()> {
        match self.position(name) {
            Ok(_) => Err(refuse(&*self.file, name, "exists already")),
            Err(_) => Ok(()),
        }
    }

    fn position(&self, name: &str) -> Result<usize> {
        let found = self.change.slots.iter().position(|s| s.entry.name == name);
        found.ok_or_else(|| Error::NoBitmap { file: self.file.name(), name: name.into() })
    }

    fn usable(&self, name: &str) -> Result<&Slot> {
        let slot = self.change.slots.get(self.position(name)?);
        let slot =
            slot.ok_or_else(|| Error::NoBitmap { file: self.file.name(), name: name.into() })?;
        match State::of(&slot.entry) {
            State::Consistent => Ok(slot),
            state => Err(unusable(&*self.file, name, state)),
        }
    }
}
