//! Where new host clusters come from: the end of the file.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::allocate::Allocate;
use crate::error::{Error, Result};
use crate::layout::entry::OFFSET_MASK;
use crate::layout::geometry::Geometry;
use crate::layout::units::HostOffset;
use crate::limits;

/// Compressed clusters are packed into stretches of this size, or two clusters where that is more,
/// so that other writers' clusters interrupt the packing seldom.
const PACK_REGION_BYTES: u64 = 1 << 20;

/// Hands out host clusters in file order, from any thread. What was handed out is never taken back
/// while the image is being written: a writer that was overtaken may still be writing into it.
#[derive(Debug)]
pub(super) struct Space {
    file: Arc<str>,
    geometry: Geometry,
    next: AtomicU64,
    limit: u64,
    pack: Mutex<Pack>,
}

/// Where the next compressed cluster goes.
#[derive(Debug, Default)]
struct Pack {
    /// Host byte offset of the next byte.
    at: u64,
    /// End of the stretch.
    end: u64,
    /// Compressed clusters that touch the host cluster of `at` already.
    sharers: u64,
}

impl Space {
    /// Space from host cluster `first` on.
    pub(super) fn new(file: Arc<str>, geometry: Geometry, first: u64) -> Self {
        let pack = Mutex::new(Pack::default());
        Self { file, geometry, next: AtomicU64::new(first), limit: limit(geometry), pack }
    }

    /// Goes on from host cluster `next`. Nothing was handed out yet.
    pub(super) fn begin_at(&self, next: u64) {
        self.next.store(next, Ordering::Relaxed);
    }

    /// `clusters` contiguous new clusters. They read as zero.
    pub(super) fn allocate(&self, clusters: u64) -> Result<HostOffset> {
        let take = |next: u64| next.checked_add(clusters).filter(|end| *end <= self.limit);
        match self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(first) => Ok(HostOffset(first << self.geometry.cluster_bits())),
            Err(_) => Err(Error::Refused {
                file: Arc::clone(&self.file),
                reason: "the refcount table cannot describe a larger file; use larger clusters or \
                         narrower refcounts"
                    .into(),
            }),
        }
    }

    /// Clusters handed out so far, the ones before the first included.
    pub(super) fn clusters(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Room for `len` compressed bytes, at most a cluster, directly behind the last ones where the
    /// refcount of the host cluster allows it.
    pub(super) fn pack(&self, len: u64) -> Result<HostOffset> {
        let g = self.geometry;
        let mut pack = self.pack.lock().unwrap_or_else(PoisonError::into_inner);
        if pack.sharers >= g.max_refcount() {
            pack.at = pack.at.next_multiple_of(g.cluster_size());
        }
        if pack.at + len > pack.end {
            let region = g.clusters_for(PACK_REGION_BYTES).max(2);
            let start = self.allocate(region)?.0;
            if start != pack.end {
                pack.at = start;
            }
            pack.end = start + (region << g.cluster_bits());
        }
        let at = pack.at;
        let is_fresh = g.in_cluster(at) == 0;
        let end = at + len;
        let straddles = g.cluster_start(at) != g.cluster_start(end - 1);
        pack.sharers = if is_fresh || straddles { 1 } else { pack.sharers + 1 };
        pack.at = end;
        if g.in_cluster(end) == 0 {
            pack.sharers = 0;
        }
        Ok(HostOffset(at))
    }

    /// Takes back the clusters at the end of the file that were set aside for compressed clusters
    /// and not used. Nobody may be writing.
    pub(super) fn trim(&self) {
        let mut pack = self.pack.lock().unwrap_or_else(PoisonError::into_inner);
        let bits = self.geometry.cluster_bits();
        let used = self.geometry.clusters_for(pack.at);
        if pack.end >> bits == self.clusters() {
            self.next.store(used, Ordering::Relaxed);
            pack.end = used << bits;
        }
    }
}

/// Most clusters that can be handed out so that the refcount structures behind them still fit.
fn limit(geometry: Geometry) -> u64 {
    let blocks = limits::MAX_REFCOUNT_TABLE_BYTES / 8;
    let tables = geometry.clusters_for(limits::MAX_REFCOUNT_TABLE_BYTES);
    let described = blocks.saturating_mul(geometry.refcounts_per_block());
    described.min(OFFSET_MASK >> geometry.cluster_bits()).saturating_sub(blocks + tables)
}

/// [`Space`] for structures that are stored once at the end; it remembers what it handed out.
#[derive(Debug)]
pub(super) struct Recorder<'a> {
    space: &'a Space,
    /// Host cluster numbers in use, ascending.
    taken: Vec<Range<u64>>,
}

impl<'a> Recorder<'a> {
    /// Takes from `space`.
    pub(super) fn new(space: &'a Space) -> Self {
        Self { space, taken: Vec::new() }
    }

    /// Host clusters in use, ascending.
    pub(super) fn into_taken(self) -> Vec<Range<u64>> {
        self.taken
    }
}

impl Allocate for Recorder<'_> {
    fn allocate(&mut self, clusters: u64) -> Result<HostOffset> {
        let at = self.space.allocate(clusters)?;
        let first = at.0 >> self.space.geometry.cluster_bits();
        match self.taken.last_mut() {
            Some(last) if last.end == first => last.end += clusters,
            _ => self.taken.push(first..first + clusters),
        }
        Ok(at)
    }

    fn free(&mut self, at: HostOffset, clusters: u64) -> Result<()> {
        let start = at.0 >> self.space.geometry.cluster_bits();
        let end = start + clusters;
        let keep = |r: &Range<u64>| [r.start..r.end.min(start), r.start.max(end)..r.end];
        self.taken = self.taken.iter().flat_map(keep).filter(|r| !r.is_empty()).collect();
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(cluster_bits: u32, refcount_order: u32) -> Space {
        Space::new("new".into(), Geometry::new(cluster_bits, refcount_order, false), 3)
    }

    #[test]
    fn packs_densely_and_straddles() {
        let s = space(16, 4);
        let first = s.pack(40000).unwrap().0;
        assert_eq!(first, 3 << 16);
        assert_eq!(s.pack(40000).unwrap().0, first + 40000);
        let mut at = first + 80000;
        for len in [1, 511, 65535, 3, 60000] {
            assert_eq!(s.pack(len).unwrap().0, at);
            at += len;
        }
        s.trim();
        assert_eq!(s.clusters(), at.div_ceil(65536));
        let next = s.allocate(1).unwrap().0;
        assert_eq!(next, at.next_multiple_of(65536));
        assert!(s.pack(60000).unwrap().0 > next, "what was taken back is not packed into");
    }

    #[test]
    fn never_more_sharers_than_the_refcount_holds() {
        for order in 0..=2 {
            let s = space(12, order);
            let max = (1u64 << (1 << order)) - 1;
            let mut touching = std::collections::BTreeMap::<u64, u64>::new();
            for i in 0..5000u64 {
                let len = i * 37 % 700 + 1;
                let at = s.pack(len).unwrap().0;
                for cluster in (at >> 12)..=((at + len - 1) >> 12) {
                    *touching.entry(cluster).or_default() += 1;
                }
                if i % 97 == 0 {
                    s.allocate(1).unwrap();
                }
            }
            assert!(touching.values().all(|n| *n <= max), "order {order}");
        }
    }

    #[test]
    fn the_end_is_an_error() {
        let s = space(9, 6);
        let all = limit(s.geometry);
        s.allocate(all - 3).unwrap();
        assert!(matches!(s.allocate(1), Err(Error::Refused { .. })));
        assert!(matches!(s.allocate(u64::MAX), Err(Error::Refused { .. })));
    }

    #[test]
    fn recorder_knows_what_is_taken() {
        let s = space(16, 4);
        let mut r = Recorder::new(&s);
        let a = r.allocate(4).unwrap();
        r.allocate(2).unwrap();
        r.free(HostOffset(a.0 + (1 << 16)), 2).unwrap();
        assert_eq!(r.into_taken(), vec![3..4, 6..9]);
    }
}
