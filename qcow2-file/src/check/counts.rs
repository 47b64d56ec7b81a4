//! How often each host cluster is referred to, in bounded memory: a window of the file per pass.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crate::in_memory;
use crate::limits;

/// Clusters that are counted in one piece of memory.
pub(super) const CHUNK_CLUSTERS: u64 = CHUNK as u64;
const CHUNK: usize = 4096;
/// A count that stands in the overflow map.
const OVERFLOWED: u16 = u16::MAX;

/// Who refers to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Guest data, which snapshots may share.
    Data,
    /// A structure that nothing else may touch.
    Metadata,
}

/// The field that holds a reference.
#[derive(Debug, Clone, Copy)]
pub(super) struct Referrer {
    /// File offset of the field.
    pub(super) at: u64,
    /// Its name.
    pub(super) field: &'static str,
}

struct Chunk {
    counts: [u16; CHUNK],
    metadata: [u64; CHUNK / 64],
}

const MAX_CHUNKS: usize = limits::CHECK_COUNTS_BYTES / size_of::<Chunk>();

/// Counts of the chunks in `from..end`. Where more chunks are referred to than memory allows,
/// `end` comes nearer: the rest needs another pass.
pub(super) struct Counts {
    from: u64,
    end: u64,
    chunks: BTreeMap<u64, Box<Chunk>>,
    /// The chunk in use, taken out of the map: references come in runs.
    current: Option<(u64, Box<Chunk>)>,
    overflow: HashMap<u64, u64>,
    overlaps: Vec<(u64, Referrer)>,
    /// References that could not be counted since too many clusters have too many of them.
    pub(super) is_full: bool,
}

impl Counts {
    /// Counts from chunk `from` on.
    pub(super) fn new(from: u64) -> Self {
        Self {
            from,
            end: u64::MAX,
            chunks: BTreeMap::new(),
            current: None,
            overflow: HashMap::new(),
            overlaps: Vec::new(),
            is_full: false,
        }
    }

    /// Counts `weight` references to each of the clusters.
    pub(super) fn claim(&mut self, clusters: Range<u64>, weight: u64, how: Use, by: Referrer) {
        for cluster in clusters {
            let within = in_memory(cluster % CHUNK_CLUSTERS);
            let Some(chunk) = self.chunk(cluster / CHUNK_CLUSTERS) else { continue };
            let (Some(count), Some(bits)) =
                (chunk.counts.get_mut(within), chunk.metadata.get_mut(within / 64))
            else {
                continue;
            };
            let bit = 1u64 << (within % 64);
            let overlaps = *bits & bit != 0 || (how == Use::Metadata && *count > 0);
            if how == Use::Metadata {
                *bits |= bit;
            }
            let sum = u64::from(*count).saturating_add(weight);
            let before = std::mem::replace(count, u16::try_from(sum).unwrap_or(OVERFLOWED));
            if before == OVERFLOWED || *count == OVERFLOWED {
                *count = OVERFLOWED;
                self.count_aside(cluster, before, weight);
            }
            if overlaps && self.overlaps.len() < limits::MAX_CHECK_FINDINGS {
                self.overlaps.push((cluster, by));
            }
        }
    }

    fn count_aside(&mut self, cluster: u64, before: u16, weight: u64) {
        if self.overflow.len() >= limits::MAX_CHECK_OVERFLOWS {
            self.is_full = true;
            return;
        }
        let start = if before == OVERFLOWED { 0 } else { u64::from(before) };
        let sum = self.overflow.entry(cluster).or_insert(start);
        *sum = sum.saturating_add(weight);
    }

    fn chunk(&mut self, index: u64) -> Option<&mut Chunk> {
        if !(self.from..self.end).contains(&index) {
            return None;
        }
        if self.current.as_ref().is_none_or(|(at, _)| *at != index) {
            self.put_back();
            if !self.chunks.contains_key(&index) && !self.make_room(index) {
                return None;
            }
            let empty = || Box::new(Chunk { counts: [0; CHUNK], metadata: [0; CHUNK / 64] });
            self.current = Some((index, self.chunks.remove(&index).unwrap_or_else(empty)));
        }
        self.current.as_mut().map(|(_, chunk)| &mut **chunk)
    }

    /// Makes room for one more chunk by giving up the last one. `false` where that is `index`.
    fn make_room(&mut self, index: u64) -> bool {
        if self.chunks.len() < MAX_CHUNKS {
            return true;
        }
        match self.chunks.last_key_value() {
            Some((last, _)) if *last > index => {
                self.end = *last;
                self.chunks.pop_last();
                let end = self.end * CHUNK_CLUSTERS;
                self.overflow.retain(|cluster, _| *cluster < end);
                true
            }
            _ => {
                self.end = index;
                false
            }
        }
    }

    fn put_back(&mut self) {
        if let Some((at, chunk)) = self.current.take() {
            self.chunks.insert(at, chunk);
        }
    }

    /// Ends counting. Answers what the finished window is.
    pub(super) fn finish(&mut self) -> Range<u64> {
        self.put_back();
        self.from..self.end
    }

    /// Clusters that hold metadata and something else, and who said so last.
    pub(super) fn overlaps(&self) -> impl Iterator<Item = (u64, Referrer)> {
        let end = self.end;
        self.overlaps.iter().copied().filter(move |(c, _)| c / CHUNK_CLUSTERS < end)
    }

    /// Chunks with references, after [`finish`](Self::finish).
    pub(super) fn touched(&self) -> impl Iterator<Item = u64> {
        self.chunks.keys().copied()
    }

    /// Whether anything in the chunk is referred to.
    pub(super) fn is_touched(&self, chunk: u64) -> bool {
        self.chunks.contains_key(&chunk)
    }

    /// The counts of a touched chunk.
    pub(super) fn of_chunk(&self, chunk: u64) -> Vec<u64> {
        let Some(found) = self.chunks.get(&chunk) else { return Vec::new() };
        let base = chunk * CHUNK_CLUSTERS;
        let exact = |(i, count): (usize, &u16)| match *count {
            OVERFLOWED => self.overflow.get(&(base + i as u64)).copied().unwrap_or(u64::MAX),
            count => u64::from(count),
        };
        found.counts.iter().enumerate().map(exact).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BY: Referrer = Referrer { at: 7, field: "test" };

    #[test]
    fn counts_are_exact_beyond_their_width() {
        let mut counts = Counts::new(0);
        counts.claim(5..7, 65534, Use::Data, BY);
        counts.claim(5..6, 1, Use::Data, BY);
        counts.claim(5..6, 70000, Use::Data, BY);
        counts.finish();
        let found = counts.of_chunk(0);
        assert_eq!((found[4], found[5], found[6]), (0, 65535 + 70000, 65534));
        assert_eq!(counts.overlaps().count(), 0);
    }

    #[test]
    fn metadata_is_alone() {
        for (first, second) in [(Use::Metadata, Use::Data), (Use::Data, Use::Metadata)] {
            let mut counts = Counts::new(0);
            counts.claim(3..5, 1, first, BY);
            counts.claim(4..6, 1, second, BY);
            let found: Vec<u64> = counts.overlaps().map(|(c, _)| c).collect();
            assert_eq!(found, [4]);
        }
    }

    #[test]
    fn memory_is_bounded_and_passes_meet() {
        let every = 3 * CHUNK_CLUSTERS;
        let total = MAX_CHUNKS as u64 * 2 + 10;
        let (mut from, mut passes, mut seen) = (0, 0, 0);
        while from != u64::MAX {
            let mut counts = Counts::new(from);
            // Downwards, so that every chunk pushes out the one before.
            for i in (0..total).rev() {
                counts.claim(i * every..i * every + 1, 1, Use::Data, BY);
            }
            from = counts.finish().end;
            assert!(counts.chunks.len() <= MAX_CHUNKS + 1);
            seen += counts.touched().count() as u64;
            passes += 1;
        }
        assert_eq!((passes, seen), (3, total));
    }
}
