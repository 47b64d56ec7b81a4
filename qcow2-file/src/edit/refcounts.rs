//! The refcount table, whole, and a bounded cache of refcount blocks. qcow2 spec, "Host cluster
//! management".
//!
//! What this module does not do: decide what is free, order writes, or sync. See
//! [`Allocator`](super::Allocator) for that.

use std::collections::VecDeque;
use std::ops::Range;
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

/// What a disk writes in one piece.
const SECTOR: usize = 512;
/// Bits 9 to 63 of a refcount table entry: the block's host offset.
const BLOCK_OFFSET_MASK: u64 = !511;

#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    /// Bytes that are newer than the file.
    dirty: Option<Range<usize>>,
    is_used: bool,
}

/// The refcount table and the blocks that were looked at lately.
#[derive(Debug)]
pub(crate) struct Refcounts {
    file: Arc<dyn Storage>,
    geometry: Geometry,
    table: Vec<u64>,
    table_at: HostOffset,
    /// By index, as long as the table: a look-up per reference of a whole image must be cheap.
    blocks: Vec<Option<Box<Block>>>,
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
        let table: Vec<u64> = entries.iter().map(|e| u64::from_be_bytes(*e)).collect();
        let mut blocks = Vec::new();
        blocks.resize_with(table.len(), || None);
        let table_at = HostOffset(header.refcount_table_offset);
        Ok(Self { file, geometry, table, table_at, blocks, clock: VecDeque::new() })
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
        let entries = self.table.len().max(in_memory(entries));
        self.table.resize(entries, 0);
        self.blocks.resize_with(entries, || None);
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
        let dirty = Some(0..bytes.len());
        self.keep(index, Block { bytes, dirty, is_used: true });
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
        let start = in_memory((within << order) >> 3);
        let end = start.saturating_add((1 << order >> 3).max(1));
        block.dirty = Some(match block.dirty.take() {
            Some(dirty) => dirty.start.min(start)..dirty.end.max(end),
            None => start..end,
        });
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
        self.clock.iter().any(|index| self.is_dirty_at(*index))
    }

    /// Writes every dirty block to its place. Answers whether there was any.
    pub(crate) fn write_blocks(&mut self) -> Result<bool> {
        let mut dirty: Vec<u64> = self.clock.iter().copied().collect();
        dirty.retain(|index| self.is_dirty_at(*index));
        dirty.sort_unstable();
        for index in &dirty {
            self.write_block(*index)?;
        }
        Ok(!dirty.is_empty())
    }

    fn write_block(&mut self, index: u64) -> Result<()> {
        let at = self.block_in_file(index)?;
        let block = self.blocks.get_mut(in_memory(index)).and_then(Option::as_mut);
        let (Some(at), Some(block)) = (at, block) else { return Ok(()) };
        if let Some(dirty) = &block.dirty {
            let start = dirty.start - dirty.start % SECTOR;
            let end = dirty.end.next_multiple_of(SECTOR).min(block.bytes.len());
            let bytes = block.bytes.get(start..end).unwrap_or_default();
            self.file.write(bytes, at.0.saturating_add(start as u64))?;
            block.dirty = None;
        }
        Ok(())
    }

    fn is_dirty_at(&self, index: u64) -> bool {
        let block = self.blocks.get(in_memory(index)).and_then(Option::as_ref);
        block.is_some_and(|block| block.dirty.is_some())
    }

    fn block(&mut self, index: u64) -> Result<Option<&mut Block>> {
        if self.blocks.get(in_memory(index)).is_none_or(Option::is_none) {
            let Some(at) = self.block_in_file(index)? else { return Ok(None) };
            self.make_room()?;
            let mut bytes = vec![0; in_memory(self.geometry.cluster_size())];
            self.file.read(&mut bytes, at.0)?;
            self.keep(index, Block { bytes, dirty: None, is_used: false });
        }
        let mut block = self.blocks.get_mut(in_memory(index)).and_then(Option::as_deref_mut);
        if let Some(block) = &mut block {
            block.is_used = true;
        }
        Ok(block)
    }

    fn keep(&mut self, index: u64, block: Block) {
        if let Some(slot) = self.blocks.get_mut(in_memory(index)) {
            *slot = Some(Box::new(block));
            self.clock.push_back(index);
        }
    }

    /// Evicts until one more block fits. A dirty block is written first: increments may become
    /// durable at any time, and decrements enter the cache only when what they free is gone.
    fn make_room(&mut self) -> Result<()> {
        let capacity = limits::REFCOUNT_CACHE_BYTES >> self.geometry.cluster_bits();
        while self.clock.len() as u64 >= capacity.max(2) {
            let Some(index) = self.clock.front().copied() else { return Ok(()) };
            let slot = self.blocks.get_mut(in_memory(index));
            let block = slot.and_then(Option::as_mut);
            if block.is_some_and(|block| std::mem::take(&mut block.is_used)) {
                self.clock.rotate_left(1);
                continue;
            }
            self.write_block(index)?;
            if let Some(slot) = self.blocks.get_mut(in_memory(index)) {
                *slot = None;
            }
            self.clock.pop_front();
        }
        Ok(())
    }
}
