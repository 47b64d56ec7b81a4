//! Refcounts of a finished map: computed by walking it, never kept.
//!
//! Host clusters are counted in *windows*, stretches of the file whose refcount blocks fit a buffer
//! of fixed size, so that memory does not grow with the disk. Each window costs a walk over the
//! map, but the first walk notes which host clusters each part of it points to, and later ones pass
//! over the parts that point elsewhere. An image written in guest order is walked little more than
//! once.

use std::ops::Range;

use super::in_memory;
use super::map::Map;
use super::write::write_sparse;
use crate::error::{Error, Result};
use crate::layout::entry::{COMPRESSED, L2Entry, OFFSET_MASK};
use crate::layout::geometry::Geometry;
use crate::layout::refcount::{refcount_at, set_refcount};
use crate::limits;
use crate::storage::{Storage, StorageExt};
use crate::zeroes::is_zero;

/// Refcount blocks that are filled at a time. At 64 KiB clusters and 16-bit refcounts this counts
/// 512 GiB of file.
const WINDOW_BYTES: u64 = 16 << 20;
/// Largest piece of a table that is read or written at once.
const TABLE_PIECE_BYTES: u64 = 256 << 10;
/// Parts of the map whose reach is noted.
const PARTS: u64 = 4096;

/// Where the refcount structures stand: the table first, then all blocks, at the end of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placement {
    /// First cluster of the refcount table.
    pub(super) table: u64,
    /// Clusters of the refcount table.
    pub(super) table_clusters: u64,
    /// First refcount block.
    pub(super) blocks: u64,
    /// Clusters of the whole file.
    pub(super) end: u64,
}

impl Placement {
    /// Behind `used` clusters. The blocks count themselves and the table, so their number is a
    /// fixed point.
    pub(super) fn behind(used: u64, geometry: Geometry) -> Self {
        let mut end = used;
        loop {
            let count = end.div_ceil(geometry.refcounts_per_block());
            let table_clusters = geometry.clusters_for(count.saturating_mul(8)).max(1);
            let needed = used + table_clusters + count;
            if needed == end {
                let blocks = used + table_clusters;
                return Self { table: used, table_clusters, blocks, end };
            }
            end = needed;
        }
    }

    fn block_count(self) -> u64 {
        self.end - self.blocks
    }
}

/// Writes refcounts.
#[derive(Debug)]
pub(super) struct Refcounts<'a> {
    file: &'a dyn Storage,
    geometry: Geometry,
    map: &'a Map,
    /// Whether the map points into another file, which is not counted here.
    has_data_file: bool,
    /// Clusters that are in use besides the map and what it points to.
    taken: Vec<Range<u64>>,
    /// Host clusters that each part of the map points to, as far as is known.
    reach: Vec<Reach>,
    piece: Vec<u8>,
    window_bytes: u64,
    /// Whether sharing is looked for.
    verifies: bool,
}

impl<'a> Refcounts<'a> {
    /// Counts what `map` refers to in `file`, and `taken`.
    pub(super) fn new(
        file: &'a dyn Storage,
        (geometry, has_data_file): (Geometry, bool),
        map: &'a Map,
        taken: Vec<Range<u64>>,
    ) -> Self {
        let parts = map.l1_len().div_ceil(part_len(map));
        let reach = vec![Reach::ANYWHERE; in_memory(parts)];
        let piece = vec![0; in_memory(geometry.cluster_size().min(TABLE_PIECE_BYTES))];
        let window_bytes = WINDOW_BYTES;
        Self {
            file,
            geometry,
            map,
            has_data_file,
            taken,
            reach,
            piece,
            window_bytes,
            verifies: false,
        }
    }

    /// Writes all refcount blocks and the refcount table.
    pub(super) fn write(&mut self, at: Placement) -> Result<()> {
        self.taken.push(at.table..at.end);
        let bits = self.geometry.cluster_bits();
        let per_window = (self.window_bytes >> bits).max(1);
        let mut blocks = vec![0; in_memory(per_window.min(at.block_count()) << bits)];
        let mut first = 0;
        while first < at.block_count() {
            let count = per_window.min(at.block_count() - first);
            let window = blocks.get_mut(..in_memory(count << bits)).unwrap_or_default();
            window.fill(0);
            self.count(first * self.geometry.refcounts_per_block(), window)?;
            let window_at = (at.blocks + first) << bits;
            if self.map.is_fresh() {
                write_sparse(self.file, window, window_at)?;
            } else {
                self.file.write(window, window_at)?;
            }
            first += count;
        }
        self.write_table(at)
    }

    /// Counts the first `clusters` of the file without writing anything: an error where a cluster
    /// that nobody may share is pointed to twice.
    pub(super) fn verify(&mut self, clusters: u64) -> Result<()> {
        self.verifies = true;
        let bits = self.geometry.cluster_bits();
        let count = clusters.div_ceil(self.geometry.refcounts_per_block());
        let per_window = (self.window_bytes >> bits).max(1);
        let mut blocks = vec![0; in_memory(per_window.min(count) << bits)];
        let mut first = 0;
        while first < count {
            blocks.fill(0);
            self.count(first * self.geometry.refcounts_per_block(), &mut blocks)?;
            first += per_window;
        }
        Ok(())
    }

    fn write_table(&self, at: Placement) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        if at.block_count() > limits::MAX_REFCOUNT_TABLE_BYTES / 8 {
            let reason = "the file is larger than its refcount table can describe";
            return Err(Error::Refused { file: self.file.name(), reason: reason.into() });
        }
        let room = (at.table_clusters << bits) / 8;
        let beyond = if self.map.is_fresh() { 0 } else { room - at.block_count() };
        let padding = std::iter::repeat_n(0, in_memory(beyond));
        let entries = (at.blocks..at.end).map(|block| block << bits);
        write_words(self.file, at.table << bits, entries.chain(padding))
    }

    /// Fills the refcounts of the host clusters from `first` on.
    fn count(&mut self, first: u64, blocks: &mut [u8]) -> Result<()> {
        let len = ((blocks.len() as u64) << 3) >> self.geometry.refcount_order();
        let alone = self.verifies.then(|| vec![0; in_memory(len.div_ceil(64))]);
        let order = self.geometry.refcount_order();
        let mut window = Window { first, len, order, blocks, alone };
        for range in &self.taken {
            let range = range.start.max(first)..range.end.min(first.saturating_add(len));
            range.for_each(|cluster| window.add(cluster));
        }
        let bits = self.geometry.cluster_bits();
        self.map.tables().filter(|t| *t != 0).for_each(|table| window.add(table >> bits));
        if self.has_data_file {
            return Ok(());
        }
        for part in 0..self.reach.len() {
            let known = self.reach.get(part).copied().unwrap_or_default();
            if known.low < first.saturating_add(len) && known.high >= first {
                let reach = self.walk(part as u64, &mut window)?;
                self.reach.get_mut(part).into_iter().for_each(|known| *known = reach);
            }
        }
        Ok(())
    }

    /// Counts what one part of the map points to, and answers with its reach.
    fn walk(&mut self, part: u64, window: &mut Window<'_>) -> Result<Reach> {
        let mut reach = Reach::default();
        let tables = part * part_len(self.map)..((part + 1) * part_len(self.map));
        for table in tables.map(|l1_index| self.map.table(l1_index)).filter(|t| *t != 0) {
            let piece_len = self.piece.len() as u64;
            for start in (0..self.geometry.cluster_size() / piece_len).map(|i| i * piece_len) {
                self.file.read(&mut self.piece, table + start)?;
                self.walk_piece(table + start, window, &mut reach)?;
            }
        }
        Ok(reach)
    }

    /// This writer never lets two guest clusters have one, but for compressed ones: only a file
    /// that other hands wrote to can say so.
    fn shared(&self) -> Result<()> {
        let reason = "two guest clusters are mapped to one place".to_owned();
        Err(Error::Refused { file: self.file.name(), reason })
    }

    fn walk_piece(&self, at: u64, window: &mut Window<'_>, reach: &mut Reach) -> Result<()> {
        if is_zero(&self.piece) {
            return Ok(());
        }
        let g = self.geometry;
        let words = self.piece.chunks_exact(8).map(|b| b.try_into().map_or(0, u64::from_be_bytes));
        let step = in_memory(g.l2_entry_size() / 8);
        for (i, raw) in words.step_by(step).enumerate().filter(|(_, raw)| raw & OFFSET_MASK != 0) {
            // The subcluster bitmap says nothing about host clusters.
            let entry_at = at + i as u64 * g.l2_entry_size();
            let entry = L2Entry::decode(raw, 0, g, false, entry_at);
            let clusters = match entry.map_err(|what| self.file.malformed(what))? {
                L2Entry::Standard(s) => {
                    let cluster = s.cluster.map(|c| c.0 >> g.cluster_bits());
                    cluster.filter(|c| !window.take_alone(*c)).map_or(Ok(()), |_| self.shared())?;
                    cluster.map(|c| c..c + 1)
                }
                L2Entry::Compressed(c) => {
                    let last = c.offset.0 + c.max_bytes() - 1;
                    Some(c.offset.0 >> g.cluster_bits()..(last >> g.cluster_bits()) + 1)
                }
            };
            let is_compressed = raw & COMPRESSED != 0;
            for cluster in clusters.into_iter().flatten() {
                if is_compressed && window.is_alone(cluster) {
                    return self.shared();
                }
                reach.low = reach.low.min(cluster);
                reach.high = reach.high.max(cluster);
                window.add(cluster);
            }
        }
        Ok(())
    }
}

/// The lowest and the highest host cluster that a part of the map points to.
#[derive(Debug, Clone, Copy)]
struct Reach {
    low: u64,
    high: u64,
}

impl Reach {
    const ANYWHERE: Self = Self { low: 0, high: u64::MAX };
}

impl Default for Reach {
    /// Nowhere.
    fn default() -> Self {
        Self { low: u64::MAX, high: 0 }
    }
}

/// L1 entries in a part of the map.
fn part_len(map: &Map) -> u64 {
    map.l1_len().div_ceil(PARTS).max(1)
}

/// Refcounts of consecutive host clusters, packed as in their blocks.
#[derive(Debug)]
struct Window<'a> {
    first: u64,
    len: u64,
    order: u32,
    blocks: &'a mut [u8],
    /// Clusters that one guest cluster has to itself, where that is verified.
    alone: Option<Vec<u64>>,
}

impl Window<'_> {
    /// Notes that a cluster belongs to one guest cluster alone, where that is looked after. Whether
    /// it can.
    fn take_alone(&mut self, cluster: u64) -> bool {
        let Some(index) = cluster.checked_sub(self.first).filter(|i| *i < self.len) else {
            return true;
        };
        let Some(alone) = &mut self.alone else { return true };
        if let Some(word) = alone.get_mut(in_memory(index / 64)) {
            *word |= 1 << (index % 64);
        }
        refcount_at(self.blocks, index, self.order).is_none_or(|count| count == 0)
    }

    fn is_alone(&self, cluster: u64) -> bool {
        let index = cluster.checked_sub(self.first).filter(|i| *i < self.len);
        let word = |i: u64| self.alone.as_ref().and_then(|alone| alone.get(in_memory(i / 64)));
        index.is_some_and(|i| word(i).is_some_and(|word| word >> (i % 64) & 1 != 0))
    }

    /// One more reference to `cluster`, if it lies in the window. A refcount that is full stays:
    /// the allocator has seen to it that none gets there.
    fn add(&mut self, cluster: u64) {
        let Some(index) = cluster.checked_sub(self.first).filter(|i| *i < self.len) else {
            return;
        };
        // The width that nearly every image has.
        if self.order == 4 {
            let at = in_memory(index * 2);
            if let Some(bytes) = self.blocks.get_mut(at..at + 2).and_then(|b| b.as_mut_array()) {
                *bytes = u16::from_be_bytes(*bytes).saturating_add(1).to_be_bytes();
            }
            return;
        }
        let count = refcount_at(self.blocks, index, self.order).unwrap_or_default();
        set_refcount(self.blocks, index, self.order, count.saturating_add(1));
    }
}

/// Writes big-endian words from `at` on, in pieces.
pub(super) fn write_words(
    file: &dyn Storage,
    at: u64,
    words: impl Iterator<Item = u64>,
) -> Result<()> {
    let mut piece = Vec::with_capacity(in_memory(TABLE_PIECE_BYTES));
    let mut at = at;
    for word in words {
        piece.extend_from_slice(&word.to_be_bytes());
        if piece.len() as u64 >= TABLE_PIECE_BYTES {
            file.write(&piece, at)?;
            at += piece.len() as u64;
            piece.clear();
        }
    }
    if piece.is_empty() { Ok(()) } else { file.write(&piece, at) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::create::{CreateOptions, NewImage};
    use crate::{GuestOffset, Memory};

    #[test]
    fn blocks_count_themselves() {
        for (bits, order) in [(9, 6), (9, 4), (12, 0), (16, 4), (21, 6)] {
            let g = Geometry::new(bits, order, false);
            for used in [1, 2, 63, 64, 65, 4095, 100_000, 1 << 22] {
                let p = Placement::behind(used, g);
                assert_eq!(p.block_count(), p.end.div_ceil(g.refcounts_per_block()));
                assert!(p.table_clusters << bits >= p.block_count() * 8);
                assert_eq!(p.end, used + p.table_clusters + p.block_count());
            }
        }
    }

    /// Refcounts of an image written in random order, computed in windows of `window_bytes`.
    fn refcounts(window_bytes: u64) -> Vec<u8> {
        let file = Arc::new(Memory::new());
        let options = CreateOptions { cluster_bits: 9, ..CreateOptions::new(4 << 20) };
        let image = NewImage::create(Arc::clone(&file) as Arc<dyn Storage>, &options).unwrap();
        for i in 0..3000u64 {
            let at = GuestOffset((i * 2_654_435_761 % 8192) << 9);
            if i % 5 == 0 {
                let bytes = vec![1; in_memory(1 + i % 400)];
                image.write_compressed(at, options.compression_type, 512, &bytes).unwrap();
            } else {
                image.write_at(&[1; 512], at).unwrap();
            }
        }
        image.map.flush().unwrap();
        let at = Placement::behind(image.space.clusters(), image.geometry);
        let g = (image.geometry, false);
        let mut refcounts = Refcounts::new(file.as_ref(), g, &image.map, Vec::new());
        refcounts.taken.push(0..image.first_cluster());
        refcounts.window_bytes = window_bytes;
        refcounts.write(at).unwrap();
        let mut written = vec![0; in_memory((at.end - at.table) << 9)];
        file.read_at(&mut written, at.table << 9).unwrap();
        written
    }

    #[test]
    fn windows_do_not_change_what_is_counted() {
        let whole = refcounts(WINDOW_BYTES);
        assert!(whole.iter().filter(|b| **b > 1).count() > 100, "some clusters are shared");
        for window_bytes in [1, 512, 1024, 5 * 512] {
            assert!(refcounts(window_bytes) == whole, "{window_bytes}");
        }
    }
}
