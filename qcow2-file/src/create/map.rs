//! The two-level map of a new image: L1 in memory, L2 tables at home in the file with a bounded
//! write-back cache before them.
//!
//! The cache works in *slices* of L2 tables, so that a table of 2 MiB of which little is used costs
//! little memory and few bytes in the file.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::in_memory;
use super::refcounts::write_words;
use super::space::Space;
use super::zero_out;
use crate::error::Result;
use crate::layout::entry::{COPIED, L2Entry};
use crate::layout::geometry::Geometry;
use crate::storage::{Storage, StorageExt};
use crate::zeroes::is_zero;

/// Memory for slices. At 64 KiB clusters this maps 128 GiB at once.
const CACHE_BYTES: u64 = 16 << 20;
/// Bytes in a slice, or a whole table where that is smaller.
const SLICE_BYTES: u64 = 4096;
/// Independent parts of the cache, so that threads seldom meet.
const SHARDS: usize = 16;

/// The map. Entries may be published before their data is written: nobody can read the image
/// before it is finished.
#[derive(Debug)]
pub(super) struct Map {
    file: Arc<dyn Storage>,
    geometry: Geometry,
    is_fresh: bool,
    has_data_file: bool,
    /// Host offsets of L2 tables; 0 where there is none.
    l1: Vec<AtomicU64>,
    /// Held while a table gets its home.
    homes: Mutex<()>,
    shards: [Mutex<Shard>; SHARDS],
}

/// Slices by number, and the order in which they are looked at when one must go.
#[derive(Debug, Default)]
struct Shard {
    slots: HashMap<u64, Slot>,
    queue: VecDeque<u64>,
}

#[derive(Debug, Default)]
struct Slot {
    bytes: Box<[u8]>,
    is_dirty: bool,
    /// Used since it was last looked at.
    is_recent: bool,
}

impl Map {
    /// An empty map for a disk of `size` bytes, in a file that held nothing before if it is fresh.
    pub(super) fn new(
        file: Arc<dyn Storage>,
        (geometry, is_fresh): (Geometry, bool),
        size: u64,
        has_data_file: bool,
    ) -> Self {
        let l1 = (0..geometry.l1_entries(size)).map(|_| AtomicU64::new(0)).collect();
        let shards = std::array::from_fn(|_| Mutex::default());
        Self { file, geometry, is_fresh, has_data_file, l1, homes: Mutex::new(()), shards }
    }

    /// Whether the file held nothing before.
    pub(super) fn is_fresh(&self) -> bool {
        self.is_fresh
    }

    /// Entries of the L1 table.
    pub(super) fn l1_len(&self) -> u64 {
        self.l1.len() as u64
    }

    /// Home of the L2 table at `l1_index`; 0 where there is none.
    pub(super) fn table(&self, l1_index: u64) -> u64 {
        let index = in_memory(l1_index);
        self.l1.get(index).map_or(0, |home| home.load(Ordering::Acquire))
    }

    /// Homes of all L2 tables.
    pub(super) fn tables(&self) -> impl Iterator<Item = u64> + '_ {
        self.l1.iter().map(|home| home.load(Ordering::Acquire))
    }

    /// Puts all tables one behind the other from `at` on, before anything is mapped.
    pub(super) fn place_tables(&self, at: u64) {
        let places = (0u64..).map(|i| at + (i << self.geometry.cluster_bits()));
        self.l1.iter().zip(places).for_each(|(home, place)| home.store(place, Ordering::Release));
    }

    /// Whether no cluster of the table that maps `cluster` was ever touched.
    pub(super) fn is_untouched(&self, cluster: u64) -> bool {
        self.table(cluster / self.geometry.l2_entries()) == 0
    }

    /// First cluster behind the table that maps `cluster`.
    pub(super) fn table_end(&self, cluster: u64) -> u64 {
        let n = self.geometry.l2_entries();
        (cluster / n + 1) * n
    }

    /// First cluster behind the slice that maps `cluster`.
    pub(super) fn slice_end(&self, cluster: u64) -> u64 {
        let n = self.slice_entries();
        (cluster / n + 1) * n
    }

    /// The entry of `cluster`.
    pub(super) fn get(&self, cluster: u64) -> Result<L2Entry> {
        if self.is_untouched(cluster) {
            return Ok(L2Entry::UNALLOCATED);
        }
        self.locked(cluster, None, |entries| entries.get(cluster))
    }

    /// Runs `f` on the slice that maps `cluster`, under its lock. The table gets a home from
    /// `space` if it has none. `f` must not come back to the map.
    pub(super) fn with<R>(
        &self,
        cluster: u64,
        space: &Space,
        f: impl FnOnce(&mut Entries<'_>) -> Result<R>,
    ) -> Result<R> {
        self.locked(cluster, Some(space), f)
    }

    /// Replaces the entry of `cluster` if it still is `old`. Whether it was.
    pub(super) fn replace(
        &self,
        cluster: u64,
        space: &Space,
        (old, new): (L2Entry, L2Entry),
    ) -> Result<bool> {
        self.with(cluster, space, |entries| {
            let is_same = entries.get(cluster)? == old;
            if is_same {
                entries.set(cluster, new);
            }
            Ok(is_same)
        })
    }

    /// Writes what is dirty to its home.
    pub(super) fn flush(&self) -> Result<()> {
        self.shards.iter().try_for_each(|shard| {
            let mut shard = lock(shard);
            let mut dirty: Vec<(&u64, &mut Slot)> =
                shard.slots.iter_mut().filter(|(_, slot)| slot.is_dirty).collect();
            dirty.sort_unstable_by_key(|(slice, _)| **slice);
            dirty.into_iter().try_for_each(|(slice, slot)| self.write_back(*slice, slot))
        })
    }

    /// Gives the cache's memory back. Everything must have been flushed.
    pub(super) fn forget(&self) {
        self.shards.iter().for_each(|shard| *lock(shard) = Shard::default());
    }

    fn locked<R>(
        &self,
        cluster: u64,
        space: Option<&Space>,
        f: impl FnOnce(&mut Entries<'_>) -> Result<R>,
    ) -> Result<R> {
        let slice = cluster / self.slice_entries();
        if let Some(space) = space {
            self.settle(cluster / self.geometry.l2_entries(), space)?;
        }
        let mut shard = lock(self.shard(slice));
        if !shard.slots.contains_key(&slice) {
            let slot = self.load(&mut shard, slice)?;
            if space.is_some() && is_zero(&slot.bytes) {
                // It gets its room while there is some: what is in it by then can be saved.
                self.file.write(&slot.bytes, self.home(slice))?;
            }
            shard.slots.insert(slice, slot);
            shard.queue.push_back(slice);
        }
        let slot = shard.slots.entry(slice).or_default();
        slot.is_recent = true;
        f(&mut Entries { map: self, slot, at: self.home(slice) })
    }

    /// Gives the table a home if it has none.
    fn settle(&self, l1_index: u64, space: &Space) -> Result<()> {
        if self.table(l1_index) != 0 {
            return Ok(());
        }
        let _alone = lock(&self.homes);
        let index = in_memory(l1_index);
        if let Some(home) = self.l1.get(index).filter(|h| h.load(Ordering::Acquire) == 0) {
            let place = space.allocate(1)?.0;
            if !self.is_fresh {
                zero_out(self.file.as_ref(), place, self.geometry.cluster_size())?;
            }
            // At once: where the file system is full by then, a sync needs no room for it.
            let at = self.l1_at() + l1_index * 8;
            write_words(self.file.as_ref(), at, std::iter::once(l1_entry(place)))?;
            home.store(place, Ordering::Release);
        }
        Ok(())
    }

    /// Gives the table a home that it had before. Nobody else is at work yet.
    pub(super) fn set_home(&self, l1_index: u64, home: u64) {
        if let Some(entry) = self.l1.get(in_memory(l1_index)) {
            entry.store(home, Ordering::Release);
        }
    }

    /// Writes all of the L1 table.
    pub(super) fn write_homes(&self) -> Result<()> {
        let _alone = lock(&self.homes);
        write_words(self.file.as_ref(), self.l1_at(), self.tables().map(l1_entry))
    }

    /// File offset of the L1 table: behind the header.
    pub(super) fn l1_at(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// Brings a slice in, at the cost of another one where the shard is full. What never was
    /// written reads as zero, which is an empty table.
    fn load(&self, shard: &mut Shard, slice: u64) -> Result<Slot> {
        let capacity = in_memory(CACHE_BYTES / self.slice_bytes()) / SHARDS;
        let mut bytes = if shard.slots.len() < capacity {
            vec![0; in_memory(self.slice_bytes())].into_boxed_slice()
        } else {
            self.evict(shard)?
        };
        self.file.read(&mut bytes, self.home(slice))?;
        Ok(Slot { bytes, is_dirty: false, is_recent: true })
    }

    /// Second chance: the first slice in the queue that was not used since it was last there.
    fn evict(&self, shard: &mut Shard) -> Result<Box<[u8]>> {
        while let Some(slice) = shard.queue.pop_front() {
            let Some(slot) = shard.slots.get_mut(&slice) else {
                continue;
            };
            if std::mem::take(&mut slot.is_recent) {
                shard.queue.push_back(slice);
                continue;
            }
            if slot.is_dirty {
                self.write_back(slice, slot)?;
            }
            return Ok(shard.slots.remove(&slice).unwrap_or_default().bytes);
        }
        Ok(vec![0; in_memory(self.slice_bytes())].into_boxed_slice())
    }

    fn write_back(&self, slice: u64, slot: &mut Slot) -> Result<()> {
        self.file.write(&slot.bytes, self.home(slice))?;
        slot.is_dirty = false;
        Ok(())
    }

    /// File offset of a slice whose table has a home.
    fn home(&self, slice: u64) -> u64 {
        let in_tables = slice * self.slice_bytes();
        self.table(in_tables >> self.geometry.cluster_bits()) + self.geometry.in_cluster(in_tables)
    }

    fn slice_bytes(&self) -> u64 {
        self.geometry.cluster_size().min(SLICE_BYTES)
    }

    fn slice_entries(&self) -> u64 {
        self.slice_bytes() / self.geometry.l2_entry_size()
    }

    #[expect(clippy::indexing_slicing, reason = "taken modulo the length of the array")]
    fn shard(&self, slice: u64) -> &Mutex<Shard> {
        &self.shards[in_memory(slice % SHARDS as u64)]
    }
}

/// The L1 entry for a table.
fn l1_entry(table: u64) -> u64 {
    if table == 0 { 0 } else { table | COPIED }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic elsewhere cannot leave a slice half changed: every change is one store of an entry.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Entries of one slice, for as long as its lock is held.
#[derive(Debug)]
pub(super) struct Entries<'a> {
    map: &'a Map,
    slot: &'a mut Slot,
    /// File offset of the slice.
    at: u64,
}

impl Entries<'_> {
    /// The entry of `cluster`, which this slice maps.
    pub(super) fn get(&self, cluster: u64) -> Result<L2Entry> {
        let position = self.position(cluster);
        let word = |at: usize| {
            let bytes = self.slot.bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
            bytes.map_or(0, u64::from_be_bytes)
        };
        let raw = word(position);
        let g = self.map.geometry;
        let bitmap = if g.has_subclusters() { word(position + 8) } else { 0 };
        L2Entry::decode(raw, bitmap, g, self.map.has_data_file, self.at + position as u64)
            .map_err(|what| self.map.file.malformed(what))
    }

    /// Sets the entry of `cluster`, which this slice maps.
    pub(super) fn set(&mut self, cluster: u64, entry: L2Entry) {
        let position = self.position(cluster);
        let g = self.map.geometry;
        let (raw, bitmap) = entry.encode(g);
        let words = (u128::from(raw) << 64 | u128::from(bitmap)).to_be_bytes();
        let len = in_memory(g.l2_entry_size());
        if let (Some(to), Some(from)) =
            (self.slot.bytes.get_mut(position..position + len), words.get(..len))
        {
            to.copy_from_slice(from);
            self.slot.is_dirty = true;
        }
    }

    fn position(&self, cluster: u64) -> usize {
        in_memory((cluster % self.map.slice_entries()) * self.map.geometry.l2_entry_size())
    }
}
