//! The active L1 table, whole, and a bounded cache of L2 tables, with what in them is newer than
//! the file.
//!
//! An L2 table changes in memory only; [`write_tables`](Tables::write_tables) and then
//! [`write_l1`](Tables::write_l1) bring it to the file when a flush has made durable what it
//! points at. A table that has no place of its own yet, since there was none or a snapshot shares
//! it, gets one with its first change.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::entries::dropped;
use crate::allocate::Allocate;
use crate::error::Result;
use crate::in_memory;
use crate::layout::entry::{L1Entry, L2Entry};
use crate::layout::geometry::Geometry;
use crate::layout::header::Header;
use crate::layout::units::{GuestOffset, HostOffset};
use crate::limits;
use crate::preflight;
use crate::storage::{Storage, StorageExt};

/// What a disk writes in one piece.
const SECTOR: usize = 512;

/// Both levels of the map.
#[derive(Debug)]
pub(super) struct Tables {
    file: Arc<dyn Storage>,
    geometry: Geometry,
    has_data_file: bool,
    l1_at: HostOffset,
    l1: Mutex<L1>,
    cache: Mutex<Cache>,
}

#[derive(Debug)]
struct L1 {
    entries: Vec<u64>,
    /// Entries that are newer than the file.
    dirty: BTreeSet<usize>,
}

#[derive(Debug, Default)]
struct Cache {
    tables: HashMap<u64, Cached>,
    /// L1 indexes, next to be looked at for eviction first.
    clock: VecDeque<u64>,
}

#[derive(Debug)]
struct Cached {
    table: Arc<Table>,
    is_used: AtomicBool,
}

/// One L2 table: what maps one L1 slot, whether it exists in the file or not.
#[derive(Debug)]
pub(super) struct Table {
    l1_index: u64,
    /// Whether it is newer than the file.
    is_dirty: AtomicBool,
    /// `None` until somebody looks.
    state: RwLock<Option<TableState>>,
}

#[derive(Debug)]
struct TableState {
    /// Where it stands, or will stand.
    host: Option<HostOffset>,
    /// Whether it may be written there.
    is_owned: bool,
    bytes: Vec<u8>,
    /// Bytes that are newer than the file.
    dirty: Option<Range<usize>>,
}

impl Tables {
    /// Reads the L1 table.
    pub(super) fn open(file: Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let entries = preflight::read_l1(&*file, header)?;
        Ok(Self {
            geometry: header.geometry(),
            has_data_file: header.has_data_file(),
            l1_at: HostOffset(header.l1_table_offset),
            l1: Mutex::new(L1 { entries, dirty: BTreeSet::new() }),
            cache: Mutex::default(),
            file,
        })
    }

    /// The table that maps `at`. `None` where the cache is full of tables that must be written
    /// first; `force` goes beyond the capacity rather than that.
    pub(super) fn table(&self, at: GuestOffset, force: bool) -> Option<Arc<Table>> {
        let l1_index = self.geometry.l1_index(at);
        let mut cache = lock(&self.cache);
        if let Some(cached) = cache.tables.get(&l1_index) {
            cached.is_used.store(true, Ordering::Relaxed);
            return Some(cached.table.clone());
        }
        let capacity = limits::EDITOR_TABLES_BYTES >> self.geometry.cluster_bits();
        let is_full = cache.tables.len() as u64 >= capacity.clamp(4, limits::MAX_EDITOR_TABLES);
        if is_full && !cache.evict() && !force {
            return None;
        }
        let state = RwLock::new(None);
        let table = Arc::new(Table { l1_index, is_dirty: AtomicBool::new(false), state });
        let is_used = AtomicBool::new(false);
        cache.tables.insert(l1_index, Cached { table: table.clone(), is_used });
        cache.clock.push_back(l1_index);
        Some(table)
    }

    /// Whether no table maps `at`, in the file or in memory: all of its span is unallocated.
    pub(super) fn is_empty_at(&self, at: GuestOffset) -> bool {
        let index = in_memory(self.geometry.l1_index(at));
        lock(&self.l1).entries.get(index).is_none_or(|raw| *raw == 0)
    }

    /// `count` entries of a table from `first` on.
    pub(super) fn entries(&self, table: &Table, first: u64, count: u64) -> Result<Vec<L2Entry>> {
        self.with(table, |state| {
            (first..first.saturating_add(count)).map(|i| self.entry(state, i)).collect()
        })
    }

    /// Changes `count` entries from `first` on: `change` gets the position among them and the
    /// entry. Host clusters that they do not refer to any more are given back to `allocator`, and
    /// a table without a place of its own gets one from it. Nothing happens where every entry
    /// stays as it was, nor where this fails, but for leaked clusters. To be called by whoever
    /// holds the guest range and the gate.
    pub(super) fn update(
        &self,
        table: &Table,
        (first, count): (u64, u64),
        allocator: &Mutex<impl Allocate>,
        change: impl Fn(u64, L2Entry) -> L2Entry,
    ) -> Result<()> {
        self.load(table)?;
        let mut guard = table.state.write().unwrap_or_else(PoisonError::into_inner);
        let Some(state) = guard.as_mut() else { return Ok(()) };
        let mut changed = Vec::new();
        for i in 0..count {
            let old = self.entry(state, first + i)?;
            let new = change(i, old);
            if new != old {
                changed.push((first + i, old, new));
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        let mut allocator = lock(allocator);
        if !state.is_owned {
            self.give_place(table, state, &mut *allocator)?;
        }
        for (index, _, new) in &changed {
            self.put_entry(state, *index, *new);
        }
        table.is_dirty.store(true, Ordering::Release);
        for (_, old, new) in changed.iter().filter(|_| !self.has_data_file) {
            if let Some((at, clusters)) = dropped(old, new, self.geometry) {
                allocator.free(at, clusters)?;
            }
        }
        Ok(())
    }

    fn give_place(
        &self,
        table: &Table,
        state: &mut TableState,
        allocator: &mut dyn Allocate,
    ) -> Result<()> {
        let at = allocator.allocate(1)?;
        if let Err(error) = self.file.make_room(at.0, self.geometry.cluster_size()) {
            // Nothing else has changed.
            allocator.free(at, 1)?;
            return Err(error);
        }
        if let Some(shared) = state.host {
            allocator.free(shared, 1)?;
        }
        state.host = Some(at);
        state.is_owned = true;
        state.dirty = Some(0..state.bytes.len());
        let mut l1 = lock(&self.l1);
        let index = in_memory(table.l1_index);
        if let Some(entry) = l1.entries.get_mut(index) {
            *entry = L1Entry { table: Some(at), is_copied: true }.encode();
            l1.dirty.insert(index);
        }
        Ok(())
    }

    fn entry(&self, state: &TableState, index: u64) -> Result<L2Entry> {
        let width = self.geometry.l2_entry_size();
        let start = index.saturating_mul(width);
        let word = |at: u64| {
            let bytes = state.bytes.get(in_memory(at)..).and_then(|b| b.first_chunk());
            bytes.map_or(0, |b| u64::from_be_bytes(*b))
        };
        let bitmap = if self.geometry.has_subclusters() { word(start + 8) } else { 0 };
        let at = state.host.map_or(0, |h| h.0).saturating_add(start);
        L2Entry::decode(word(start), bitmap, self.geometry, self.has_data_file, at)
            .map_err(|what| self.file.malformed(what))
    }

    fn put_entry(&self, state: &mut TableState, index: u64, entry: L2Entry) {
        let (raw, bitmap) = entry.encode(self.geometry);
        let width = in_memory(self.geometry.l2_entry_size());
        let start = in_memory(index).saturating_mul(width);
        let mut bytes = [0; 16];
        let (first, second) = bytes.split_at_mut(8);
        first.copy_from_slice(&raw.to_be_bytes());
        second.copy_from_slice(&bitmap.to_be_bytes());
        let end = start.saturating_add(width);
        if let (Some(slot), Some(new)) = (state.bytes.get_mut(start..end), bytes.get(..width)) {
            slot.copy_from_slice(new);
            state.dirty = Some(match state.dirty.take() {
                Some(d) => d.start.min(start)..d.end.max(end),
                None => start..end,
            });
        }
    }

    fn with<T>(&self, table: &Table, look: impl FnOnce(&TableState) -> Result<T>) -> Result<T> {
        self.load(table)?;
        let guard = table.state.read().unwrap_or_else(PoisonError::into_inner);
        // A table is never unloaded while somebody holds it.
        let nothing = TableState { host: None, is_owned: false, bytes: Vec::new(), dirty: None };
        look(guard.as_ref().unwrap_or(&nothing))
    }

    fn load(&self, table: &Table) -> Result<()> {
        if table.state.read().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Ok(());
        }
        let mut state = table.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.is_some() {
            return Ok(());
        }
        let index = in_memory(table.l1_index);
        let raw = lock(&self.l1).entries.get(index).copied().unwrap_or(0);
        let at = self.l1_at.0.saturating_add(table.l1_index.saturating_mul(8));
        let entry = L1Entry::decode(raw, self.geometry, at);
        let entry = entry.map_err(|what| self.file.malformed(what))?;
        let mut bytes = vec![0; in_memory(self.geometry.cluster_size())];
        if let Some(host) = entry.table {
            self.file.read(&mut bytes, host.0)?;
        }
        let is_owned = entry.table.is_some() && entry.is_copied;
        *state = Some(TableState { host: entry.table, is_owned, bytes, dirty: None });
        Ok(())
    }

    /// Whether anything is newer than the file.
    pub(super) fn is_dirty(&self) -> bool {
        !lock(&self.l1).dirty.is_empty()
            || lock(&self.cache).tables.values().any(|c| c.table.is_dirty())
    }

    /// Writes every dirty L2 table. What they point at must be durable. Answers whether there was
    /// any. Nobody changes tables meanwhile.
    pub(super) fn write_tables(&self) -> Result<bool> {
        let tables: Vec<Arc<Table>> = {
            let cache = lock(&self.cache);
            cache.tables.values().map(|c| c.table.clone()).filter(|t| t.is_dirty()).collect()
        };
        for table in &tables {
            {
                let guard = table.state.read().unwrap_or_else(PoisonError::into_inner);
                let Some(state) = guard.as_ref() else { continue };
                let (Some(dirty), Some(host)) = (state.dirty.clone(), state.host) else { continue };
                let start = dirty.start - dirty.start % SECTOR;
                let end = dirty.end.next_multiple_of(SECTOR).min(state.bytes.len());
                let bytes = state.bytes.get(start..end).unwrap_or_default();
                self.file.write(bytes, host.0.saturating_add(start as u64))?;
            }
            let mut guard = table.state.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(state) = guard.as_mut() {
                state.dirty = None;
            }
            table.is_dirty.store(false, Ordering::Release);
        }
        Ok(!tables.is_empty())
    }

    /// Writes the L1 entries of tables that got a place. The tables must be durable. Answers
    /// whether there was any.
    pub(super) fn write_l1(&self) -> Result<bool> {
        let mut l1 = lock(&self.l1);
        let mut runs: Vec<Range<usize>> = Vec::new();
        for index in &l1.dirty {
            match runs.last_mut() {
                Some(run) if run.end == *index => run.end += 1,
                _ => runs.push(*index..*index + 1),
            }
        }
        for run in &runs {
            let entries = l1.entries.get(run.clone()).unwrap_or_default();
            let bytes: Vec<u8> = entries.iter().flat_map(|raw| raw.to_be_bytes()).collect();
            self.file.write(&bytes, self.l1_at.0.saturating_add(run.start as u64 * 8))?;
        }
        l1.dirty.clear();
        Ok(!runs.is_empty())
    }
}

impl Table {
    fn is_dirty(&self) -> bool {
        self.is_dirty.load(Ordering::Acquire)
    }
}

impl Cache {
    /// Drops one table that nobody uses and that is not newer than the file.
    fn evict(&mut self) -> bool {
        // Twice round: the first time takes the marks of recent use away.
        for _ in 0..self.clock.len().saturating_mul(2) {
            let Some(index) = self.clock.pop_front() else { return false };
            let Some(cached) = self.tables.get_mut(&index) else { continue };
            let is_used = std::mem::take(cached.is_used.get_mut());
            if is_used || Arc::strong_count(&cached.table) > 1 || cached.table.is_dirty() {
                self.clock.push_back(index);
                continue;
            }
            self.tables.remove(&index);
            return true;
        }
        false
    }
}

pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
