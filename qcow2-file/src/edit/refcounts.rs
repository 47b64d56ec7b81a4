//! The refcount table, whole, and a bounded cache of refcount blocks. qcow2 spec, "Host cluster
//! management".
//!
//! What this module does not do: decide what is free, order writes, or sync. See
//! [`Allocator`](super::Allocator) for that.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use format_spec::{Malformed, Problem};

use crate::error::Result;
use crate::in_memory;
use crate::layout::geometry::Geometry;
use crate::layout::header::Header;
use crate::layout::refcount::{refcount_at, set_refcount};
use crate::layout::units::HostOffset;
use crate::limits;
use crate::storage::{Storage, StorageExt};

/// Bits 9 to 63 of a refcount table entry: the block's host offset.
const BLOCK_OFFSET_MASK: u64 = !511;

#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    is_dirty: bool,
    is_used: bool,
}

/// The refcount table and the blocks that were looked at lately.
#[derive(Debug)]
pub(crate) struct Refcounts {
    file: Arc<dyn Storage>,
    geometry: Geometry,
    table: Vec<u64>,
    table_at: HostOffset,
    blocks: HashMap<u64, Block>,
    /// Cached block indexes, next to be looked at for eviction first.
    clock: VecDeque<u64>,
}

impl Refcounts {
    /// Reads the table. Blocks are read when they are asked for.
    pub(crate) fn open(file: Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let geometry = header.geometry();
        let bytes = u64::from(header.refcount_table_clusters) << geometry.cluster_bits();
        let mut raw = vec![0; in_memory(bytes.min(limits::MAX_REFCOUNT_TABLE_BYTES))];
        file.read(&mut raw, header.refcount_table_offset)?;
        let (entries, _) = raw.as_chunks::<8>();
        let table = entries.iter().map(|e| u64::from_be_bytes(*e)).collect();
        let table_at = HostOffset(header.refcount_table_offset);
        Ok(Self { file, geometry, table, table_at, blocks: HashMap::new(), clock: VecDeque::new() })
    }

    /// Where the table stands, or will stand once it is written.
    pub(crate) fn table_at(&self) -> HostOffset {
        self.table_at
    }

    /// Entries of the table.
    pub(crate) fn table_len(&self) -> u64 {
        self.table.len() as u64
    }

    /// Bytes `first..end` of entries as they stand in the table.
    pub(crate) fn table_bytes(&self, first: u64, end: u64) -> Vec<u8> {
        let entries = self.table.get(in_memory(first)..in_memory(end)).unwrap_or_default();
        entries.iter().flat_map(|e| e.to_be_bytes()).collect()
    }

    /// Lengthens the table in memory and gives it another place.
    pub(crate) fn move_table(&mut self, at: HostOffset) {
        self.table_at = at;
    }

    /// Lengthens the table in memory.
    pub(crate) fn lengthen_table(&mut self, entries: u64) {
        self.table.resize(self.table.len().max(in_memory(entries)), 0);
    }

    /// Where block `index` stands; `None` where there is none.
    pub(crate) fn block_at(&self, index: u64) -> Result<Option<HostOffset>, Malformed> {
        let raw = self.table.get(in_memory(index)).copied().unwrap_or(0);
        let at = self.table_at.0.saturating_add(index * 8);
        if raw & !BLOCK_OFFSET_MASK != 0 {
            let problem = Problem::Reserved { value: raw & !BLOCK_OFFSET_MASK };
            return Err(Malformed::new(at, "refcount_table_entry", problem));
        }
        if !self.geometry.is_cluster_aligned(HostOffset(raw)) {
            let problem = Problem::Misaligned { value: raw, align: self.geometry.cluster_size() };
            return Err(Malformed::new(at, "refcount_table_entry", problem));
        }
        Ok((raw != 0).then_some(HostOffset(raw)))
    }

    /// Like [`block_at`](Self::block_at), naming the file.
    pub(crate) fn block_in_file(&self, index: u64) -> Result<Option<HostOffset>> {
        self.block_at(index).map_err(|what| self.file.malformed(what))
    }

    /// Treats block `index` as absent from now on, without changing the file. For a walk over an
    /// image whose table entry is wrong.
    pub(crate) fn forget_block(&mut self, index: u64) {
        if let Some(entry) = self.table.get_mut(in_memory(index)) {
            *entry = 0;
        }
    }

    /// Enters a new block, all zero, at `at`. It is dirty; the table entry is changed in memory.
    pub(crate) fn insert_block(&mut self, index: u64, at: HostOffset) -> Result<()> {
        self.make_room()?;
        if let Some(entry) = self.table.get_mut(in_memory(index)) {
            *entry = at.0;
        }
        let bytes = vec![0; in_memory(self.geometry.cluster_size())];
        self.blocks.insert(index, Block { bytes, is_dirty: true, is_used: true });
        self.clock.push_back(index);
        Ok(())
    }

    /// The refcount of a cluster. Zero where no block covers it.
    pub(crate) fn count(&mut self, cluster: u64) -> Result<u64> {
        let (index, within) = self.position(cluster);
        let order = self.geometry.refcount_order();
        let block = self.block(index)?;
        Ok(block.and_then(|b| refcount_at(&b.bytes, within, order)).unwrap_or(0))
    }

    /// Sets the refcount of a cluster whose block exists. `false` where it has none or the value
    /// does not fit.
    pub(crate) fn set(&mut self, cluster: u64, value: u64) -> Result<bool> {
        let (index, within) = self.position(cluster);
        let order = self.geometry.refcount_order();
        let Some(block) = self.block(index)? else { return Ok(false) };
        block.is_dirty = true;
        Ok(set_refcount(&mut block.bytes, within, order, value).is_some())
    }

    /// Bytes of block `index`, for a walk over all of them; `None` where there is none.
    pub(crate) fn block_bytes(&mut self, index: u64) -> Result<Option<&[u8]>> {
        Ok(self.block(index)?.map(|b| b.bytes.as_slice()))
    }

    /// How many clusters from `start` on have refcount zero, at most `max`.
    pub(crate) fn free_run(&mut self, start: u64, max: u64) -> Result<u64> {
        let mut run = 0;
        while run < max && self.count(start.saturating_add(run))? == 0 {
            run += 1;
        }
        Ok(run)
    }

    /// The first cluster at or after `from` with refcount zero.
    pub(crate) fn next_free(&mut self, from: u64) -> Result<u64> {
        let per_block = self.geometry.refcounts_per_block();
        let order = self.geometry.refcount_order();
        let (first, mut within) = self.position(from);
        for index in first..self.table_len() {
            let base = index * per_block;
            let Some(block) = self.block(index)? else { return Ok(base + within) };
            let free =
                (within..per_block).find(|i| refcount_at(&block.bytes, *i, order) == Some(0));
            if let Some(found) = free {
                return Ok(base + found);
            }
            within = 0;
        }
        Ok(from.max(self.table_len() * per_block))
    }

    /// Block index and position in the block.
    pub(crate) fn position(&self, cluster: u64) -> (u64, u64) {
        let per_block = self.geometry.refcounts_per_block().max(1);
        (cluster / per_block, cluster % per_block)
    }

    /// Whether any block is newer than the file.
    pub(crate) fn is_dirty(&self) -> bool {
        self.blocks.values().any(|b| b.is_dirty)
    }

    /// Writes every dirty block to its place. Answers whether there was any.
    pub(crate) fn write_blocks(&mut self) -> Result<bool> {
        let mut dirty: Vec<u64> =
            self.blocks.iter().filter(|(_, b)| b.is_dirty).map(|(index, _)| *index).collect();
        dirty.sort_unstable();
        for index in &dirty {
            self.write_block(*index)?;
        }
        Ok(!dirty.is_empty())
    }

    fn write_block(&mut self, index: u64) -> Result<()> {
        let at = self.block_in_file(index)?;
        if let (Some(at), Some(block)) = (at, self.blocks.get_mut(&index)) {
            self.file.write(&block.bytes, at.0)?;
            block.is_dirty = false;
        }
        Ok(())
    }

    fn block(&mut self, index: u64) -> Result<Option<&mut Block>> {
        if !self.blocks.contains_key(&index) {
            let Some(at) = self.block_in_file(index)? else { return Ok(None) };
            self.make_room()?;
            let mut bytes = vec![0; in_memory(self.geometry.cluster_size())];
            self.file.read(&mut bytes, at.0)?;
            self.blocks.insert(index, Block { bytes, is_dirty: false, is_used: false });
            self.clock.push_back(index);
        }
        let mut block = self.blocks.get_mut(&index);
        if let Some(block) = &mut block {
            block.is_used = true;
        }
        Ok(block)
    }

    /// Evicts until one more block fits. A dirty block is written first: increments may become
    /// durable at any time, and decrements enter the cache only when what they free is gone.
    fn make_room(&mut self) -> Result<()> {
        let capacity = limits::REFCOUNT_CACHE_BYTES >> self.geometry.cluster_bits();
        while self.blocks.len() as u64 >= capacity.max(2) {
            let Some(index) = self.clock.pop_front() else { return Ok(()) };
            let Some(block) = self.blocks.get_mut(&index) else { continue };
            if std::mem::take(&mut block.is_used) {
                self.clock.push_back(index);
                continue;
            }
            if block.is_dirty {
                self.write_block(index)?;
            }
            self.blocks.remove(&index);
        }
        Ok(())
    }
}
