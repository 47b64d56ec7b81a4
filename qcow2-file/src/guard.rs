//! What keeps bitmaps right while guest data is written.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::allocate::Allocate;
use crate::bitmaps::change::{Change, Content, Slot, marks};
use crate::bitmaps::header::{self, KNOWN_AUTOCLEAR, read_writable};
use crate::bitmaps::load::{image_facts, load_bits};
use crate::bitmaps::store::{check_new, new_entry, refuse, unusable};
use crate::bitmaps::table::Table;
use crate::bitmaps::tracker::Tracker;
use crate::bitmaps::{Bitmaps, Bits, Entry, PersistentBitmap, State};
use crate::edit::refcounts::Refcounts;
use crate::error::{Condition, Error, Result};
use crate::layout::bitmap_directory::{DirectoryEntry, ImageFacts, encode_directory, flags};
use crate::layout::extension::BitmapsExtension;
use crate::layout::header::{Header, autoclear};
use crate::storage::{Storage, StorageExt};

/// Keeps the bitmaps of an image from being present and stale while somebody, this crate's editor
/// or any other qcow2 writer, changes guest data.
///
/// An enabled bitmap must reflect every write. Once the first guest byte has changed, the copy on
/// disk does not, so it must not look valid until a newer one is stored, whatever happens: a kill,
/// a power cut, an error anywhere. That is why
///
/// * [`take`](Self::take) durably sets the `in_use` flag of each enabled bitmap *before* it
///   returns. One synced write in place suffices, since each flag is one aligned word: any torn mix
///   of old and new flags is a valid directory, and nothing depends on which flag comes first.
/// * [`record_write`](Self::record_write) marks what is written, in memory.
/// * [`finish`](Self::finish) stores bits and marks together in new clusters and, when they are
///   durable, makes a new directory with clear flags valid by one header write.
/// * Dropping a guard does nothing at all: the flags stay set, QEMU and this crate see inconsistent
///   bitmaps, and nobody copies from them.
///
/// A disabled bitmap does not follow the disk: it stays valid all the time, where QEMU would lose
/// it in a crash. A bitmap that records writes and uses what is not known here cannot be kept
/// right: it is marked `in_use` and stays so.
///
/// The guard holds no lock and no other claim to the image: whoever writes holds the image's lock.
#[derive(Debug)]
pub struct Guard {
    file: Arc<dyn Storage>,
    image: ImageFacts,
    is_version_3: bool,
    /// The directory found; `None` where there was no valid one.
    taken: Option<BitmapsExtension>,
    slots: RwLock<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    slots: Vec<Live>,
    /// Those that were found and are to go. They record until they are gone:
    /// [`Guard::suspend`] keeps them.
    removed: Vec<Live>,
    /// Whether the directory must be written anew, marks or not.
    has_changed: bool,
}

/// One bitmap while its image is being written.
#[derive(Debug, Clone)]
struct Live {
    /// As it shall be stored at the end.
    entry: DirectoryEntry,
    /// As it was found; `None` when it was added since.
    stored: Option<DirectoryEntry>,
    /// Bits that replace the stored ones.
    bits: Option<Bits>,
    /// Present while it records writes.
    tracker: Option<Arc<Tracker>>,
}

impl Guard {
    /// Marks every enabled bitmap of the image as being in use, durably. Afterwards guest data may
    /// be changed, if every change is reported to [`record_write`](Self::record_write).
    ///
    /// Refuses a corrupt or dirty image, and one whose bitmap directory breaks the spec or is not
    /// alone in its clusters by their refcounts; it does not walk the guest's data as
    /// [`check`](crate::check::check) does. A writer that must go on calls
    /// [`invalidate`](Self::invalidate) instead. Autoclear bits that are not known here are
    /// cleared, as the spec demands of whoever writes.
    pub fn take(file: Arc<dyn Storage>) -> Result<Self> {
        let header = read_writable(&*file)?;
        let image = image_facts(&*file, &header)?;
        let bitmaps = Bitmaps::open(file.clone(), &header)?;
        bitmaps.iter().try_for_each(|found| check_tables(&*file, image, found))?;
        header::clear_autoclear(&*file, &header, !KNOWN_AUTOCLEAR)?;
        let mut slots = Slots::default();
        if let Some(bitmaps) = &bitmaps {
            mark_in_use(&file, &header, bitmaps)?;
            let mut trackers = HashMap::new();
            for found in bitmaps.list() {
                let entry = &found.located.entry;
                let records = found.state == State::Consistent && entry.is_auto();
                let bits = entry.granularity_bits;
                let tracker = records.then(|| {
                    let new = || Arc::new(Tracker::new(image.size, bits));
                    trackers.entry(bits).or_insert_with(new).clone()
                });
                slots.slots.push(Live::found(entry, tracker));
            }
        }
        let taken = bitmaps.map(|b| b.extension());
        let is_version_3 = header.version >= 3;
        Ok(Self { file, image, is_version_3, taken, slots: RwLock::new(slots) })
    }

    /// Durably marks all bitmaps of the image as not to be trusted, in one sector and without
    /// reading them: for a writer that cannot report its writes. Other autoclear bits stay. Nothing
    /// brings the bitmaps back; QEMU drops them when it next writes to the image.
    pub fn invalidate(file: &dyn Storage) -> Result<()> {
        let header = crate::preflight::read_header(file)?;
        header::clear_autoclear(file, &header, autoclear::BITMAPS)
    }

    /// Whether no bitmap records writes, so that [`record_write`](Self::record_write) has nothing
    /// to do until one is added.
    pub fn is_idle(&self) -> bool {
        self.read().trackers().next().is_none()
    }

    /// Marks the granules of a change of guest data: a write, a write of zeroes, a discard. May
    /// come from any thread. To be called after the change and before it is reported as complete,
    /// and also when it failed, since part of it may have happened.
    pub fn record_write(&self, offset: u64, len: u64) {
        let range = offset..offset.saturating_add(len);
        let slots = self.read();
        let mut before: Option<&Arc<Tracker>> = None;
        for tracker in slots.trackers() {
            // Bitmaps that were found together share a tracker, and mostly stand side by side.
            if !before.is_some_and(|b| Arc::ptr_eq(b, tracker)) {
                tracker.mark(range.clone());
            }
            before = Some(tracker);
        }
    }

    /// The bitmaps as they would be stored now: name, log2 of the granularity, whether enabled,
    /// whether usable.
    pub fn list(&self) -> Vec<GuardedBitmap> {
        let slots = self.read();
        slots.slots.iter().map(Live::describe).collect()
    }

    /// The bits of a bitmap as they are now, writes recorded so far included.
    pub fn load(&self, name: &str) -> Result<Bits> {
        let live = self.usable(&self.read(), name)?.clone();
        self.load_live(&live)
    }

    /// Adds a bitmap, which is stored at [`finish`](Self::finish). An enabled one records writes
    /// from now on.
    pub fn add(&self, bitmap: PersistentBitmap) -> Result<()> {
        let file = &*self.file;
        if !self.is_version_3 {
            let reason = "is of version 2, which holds no bitmaps".into();
            return Err(Error::Refused { file: file.name(), reason });
        }
        let disk = (self.image.geometry, self.image.size);
        check_new(file, &bitmap.name, bitmap.granularity_bits, disk)?;
        self.check_len(&bitmap.name, &bitmap.bits, bitmap.granularity_bits)?;
        let mut slots = self.write();
        if slots.slots.iter().any(|s| s.entry.name == bitmap.name) {
            return Err(refuse(file, &bitmap.name, "exists already"));
        }
        let new = || Arc::new(Tracker::new(self.image.size, bitmap.granularity_bits));
        slots.slots.push(Live {
            entry: new_entry(&bitmap, Default::default()),
            stored: None,
            tracker: bitmap.is_enabled.then(new),
            bits: Some(bitmap.bits),
        });
        slots.has_changed = true;
        Ok(())
    }

    /// Sets bits of a bitmap that was added since the guard was taken: `bits` are little-endian
    /// bytes from byte `offset` on and replace what was there. Writes recorded since stay recorded.
    pub fn put_bits(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut slots = self.write();
        let found = slots.slots.iter_mut().find(|s| s.entry.name == name);
        let live = found.ok_or_else(|| self.no_bitmap(name))?;
        match &mut live.bits {
            Some(bits) => bits.write_bytes(offset, bytes),
            None => return Err(refuse(&*self.file, name, "was not added by this guard")),
        }
        Ok(())
    }

    /// Removes a bitmap, in whatever state it is; it is gone from the file at
    /// [`finish`](Self::finish).
    pub fn remove(&self, name: &str) -> Result<()> {
        let mut slots = self.write();
        let index = slots.slots.iter().position(|s| s.entry.name == name);
        let live = slots.slots.remove(index.ok_or_else(|| self.no_bitmap(name))?);
        slots.removed.extend(live.stored.is_some().then_some(live));
        slots.has_changed = true;
        Ok(())
    }

    /// Stores what was recorded and makes the bitmaps valid again, durably. All writers have
    /// stopped, and their metadata is written. An error leaves the bitmaps as [`take`](Self::take)
    /// left them.
    ///
    /// `allocator` hands out clusters of this image and is trusted; the image's header is read
    /// anew. A writer that cleared the autoclear bit meanwhile, as the spec asks of those who do
    /// not know it, does no harm: the bit is set again. One that replaced the bitmaps themselves is
    /// an error.
    pub fn finish(self, allocator: &mut dyn Allocate) -> Result<()> {
        let slots = std::mem::take(&mut *self.write());
        let records = slots.slots.iter().any(|s| s.tracker.is_some());
        if !slots.has_changed && !records {
            return Ok(());
        }
        let header = read_writable(&*self.file)?;
        self.check_unchanged(&header)?;
        let is_valid = header.autoclear_features & autoclear::BITMAPS != 0;
        let is_clean = slots.slots.iter().filter_map(|s| s.tracker.as_ref()).all(|t| t.is_clean());
        if !slots.has_changed && is_clean && is_valid {
            return self.clear_in_use(&slots.slots);
        }
        let image = image_facts(&*self.file, &header)?;
        let slots_now = slots.slots.into_iter().map(|s| s.into_slot(image)).collect();
        let removed = slots.removed.into_iter().filter_map(|s| s.stored).collect();
        let change = Change { slots: slots_now, removed, replaced: self.taken };
        change.apply(&*self.file, image, allocator)
    }

    /// Stops for now: stores the bitmaps that were found, with what they recorded, and makes them
    /// valid again, durably. Those that were added are left out, those that were removed are still
    /// there. For a writer that has not done what it was to do, so that whoever goes on finds the
    /// bitmaps that it found. Otherwise like [`finish`](Self::finish).
    pub fn suspend(self, allocator: &mut dyn Allocate) -> Result<()> {
        {
            let mut slots = self.write();
            slots.slots.retain(|live| live.stored.is_some());
            let removed = std::mem::take(&mut slots.removed);
            // Their order in the directory may be another one then.
            slots.has_changed = !removed.is_empty();
            slots.slots.extend(removed);
        }
        self.finish(allocator)
    }

    /// Nothing was written: the bits on disk are right, only the flags are not.
    fn clear_in_use(&self, slots: &[Live]) -> Result<()> {
        let Some(taken) = self.taken else { return Ok(()) };
        let bytes = encode_directory(slots.iter().map(|s| &s.entry));
        self.file.make_durable()?;
        self.file.write(&bytes, taken.directory_offset)?;
        self.file.make_durable()
    }

    fn check_unchanged(&self, header: &Header) -> Result<()> {
        let is_same = match self.taken {
            Some(taken) => header.bitmaps() == Some(taken),
            None => {
                header.autoclear_features & autoclear::BITMAPS == 0 || header.bitmaps().is_none()
            }
        };
        if is_same {
            return Ok(());
        }
        let reason = "got another bitmap directory while it was being written".into();
        Err(Error::Refused { file: self.file.name(), reason })
    }

    fn load_live(&self, live: &Live) -> Result<Bits> {
        let mut bits = match (&live.bits, &live.stored) {
            (Some(bits), _) => bits.clone(),
            (None, Some(entry)) => {
                load_bits(&Table { file: &*self.file, image: self.image, entry })?
            }
            (None, None) => Bits::for_disk(self.image.size, live.entry.granularity_bits),
        };
        if let Some(tracker) = &live.tracker {
            let is_same_length = bits.merge(&marks(tracker, self.image));
            debug_assert!(is_same_length, "both count granules of the same disk");
        }
        Ok(bits)
    }

    fn check_len(&self, name: &str, bits: &Bits, granularity_bits: u8) -> Result<()> {
        if bits.len() == crate::bitmaps::granules(self.image.size, granularity_bits) {
            return Ok(());
        }
        Err(refuse(&*self.file, name, "does not have one bit per granule of the disk"))
    }

    fn usable<'a>(&self, slots: &'a Slots, name: &str) -> Result<&'a Live> {
        let live = slots.slots.iter().find(|s| s.entry.name == name);
        let live = live.ok_or_else(|| self.no_bitmap(name))?;
        match State::of(&live.entry) {
            State::Consistent => Ok(live),
            state => Err(unusable(&*self.file, name, state)),
        }
    }

    fn no_bitmap(&self, name: &str) -> Error {
        Error::NoBitmap { file: self.file.name(), name: name.into() }
    }

    fn read(&self) -> RwLockReadGuard<'_, Slots> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Slots> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    /// What records writes, once for each bitmap.
    fn trackers(&self) -> impl Iterator<Item = &Arc<Tracker>> {
        self.slots.iter().chain(&self.removed).filter_map(|live| live.tracker.as_ref())
    }
}

/// A bitmap under a [`Guard`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardedBitmap {
    /// Its name.
    pub name: String,
    /// log2 of the guest bytes per bit.
    pub granularity_bits: u8,
    /// Whether it records writes.
    pub is_enabled: bool,
    /// Whether it may be used.
    pub state: State,
}

impl Live {
    fn found(entry: &DirectoryEntry, tracker: Option<Arc<Tracker>>) -> Self {
        let mut entry = entry.clone();
        let stored = Some(entry.clone());
        if entry.is_auto() && entry.unknown_to_us().is_some() {
            entry.flags |= flags::IN_USE;
        }
        Self { entry, stored, bits: None, tracker }
    }

    fn describe(&self) -> GuardedBitmap {
        GuardedBitmap {
            name: self.entry.name.clone(),
            granularity_bits: self.entry.granularity_bits,
            is_enabled: self.entry.is_auto(),
            state: State::of(&self.entry),
        }
    }

    fn into_slot(self, image: ImageFacts) -> Slot {
        let content = match (self.bits, self.tracker) {
            (None, None) => Content::Stored,
            (None, Some(tracker)) => Content::Marked(tracker),
            (Some(bits), None) => Content::Bits(bits),
            (Some(mut bits), Some(tracker)) => {
                let is_same_length = bits.merge(&marks(&tracker, image));
                debug_assert!(is_same_length, "both count granules of the same disk");
                Content::Bits(bits)
            }
        };
        Slot { entry: self.entry, stored: self.stored, content }
    }
}

/// Reads the tables of the bitmaps that can be used. One that is broken would only be found when
/// the bitmaps are stored, when guest data has long been changed.
fn check_tables(file: &dyn Storage, image: ImageFacts, bitmaps: &Bitmaps) -> Result<()> {
    for found in bitmaps.list().iter().filter(|e| e.state == State::Consistent) {
        let entry = &found.located.entry;
        let all = 0..u64::from(entry.table_entries);
        Table { file, image, entry }.entries(all, |_, _| Ok(()))?;
    }
    Ok(())
}

/// Durably sets the `in_use` flag of every bitmap that records writes.
fn mark_in_use(file: &Arc<dyn Storage>, header: &Header, bitmaps: &Bitmaps) -> Result<()> {
    let records = |e: &&Entry| e.is_enabled() && !e.is_in_use();
    if !bitmaps.list().iter().any(|e| records(&e)) {
        return Ok(());
    }
    refuse_shared_directory(file, header, bitmaps.extension())?;
    for found in bitmaps.list().iter().filter(records) {
        let word = found.flags() | flags::IN_USE;
        file.write(&word.to_be_bytes(), found.located.flags_at())?;
    }
    file.make_durable()
}

/// The flags are the one thing that is changed in place: what they stand in must be a directory and
/// nothing else.
fn refuse_shared_directory(
    file: &Arc<dyn Storage>,
    header: &Header,
    directory: BitmapsExtension,
) -> Result<()> {
    let g = header.geometry();
    let mut refcounts = Refcounts::open(file.clone(), header)?;
    let first = directory.directory_offset >> g.cluster_bits();
    for cluster in first..first + g.clusters_for(directory.directory_size) {
        let refcount = refcounts.count(cluster)?;
        if refcount != 1 {
            let at = cluster << g.cluster_bits();
            let reason = format!(
                ": the cluster of its bitmap directory at {at:#x} has refcount {refcount} instead \
                 of 1"
            );
            return Err(Error::condition(file.name(), Condition::Corrupt(reason)));
        }
    }
    Ok(())
}
