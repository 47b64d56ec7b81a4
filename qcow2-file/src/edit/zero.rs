//! Zeroes and discards.

use std::ops::Range;

use super::Editor;
use super::entries::{ZeroRules, after_zero, units_covered};
use super::ranges::Mode;
use crate::error::Result;
use crate::image::LayerKind;
use crate::in_memory;
use crate::layout::units::GuestOffset;
use crate::storage::StorageExt;

/// Zeroes that are written as data where nothing else can say so.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Whether zeroes may take their room away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZeroMode {
    /// Host clusters are freed.
    #[default]
    Free,
    /// Clusters that have room keep it, so that a later write needs none: a disk that was
    /// allocated in full stays so. What a snapshot shares or what is compressed cannot be kept.
    Keep,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Zero(ZeroMode),
    Discard,
}

impl Editor {
    /// Makes the range read as zero, any alignment; the range must lie inside the disk. Where the
    /// image can say "zero" nothing is written, and what already reads as zero stays as it is.
    pub fn write_zeroes(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Result<()> {
        let range = self.inside(at, len)?;
        self.change(range, |range| self.zero_range(range, Operation::Zero(mode)))
    }

    /// Tells that nobody needs the content of the range; it must lie inside the disk. Whole
    /// clusters then read as zero and take no room (in version 2 over a backing file they stay as
    /// they are); parts of clusters at the ends stay as they are. Never shows what a backing file
    /// holds, never touches what a snapshot holds.
    pub fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        let range = self.inside(at, len)?;
        self.change(range, |range| {
            let whole = self.inner_units(&range, self.geometry.cluster_size());
            self.zero_range(whole, Operation::Discard)
        })
    }

    fn zero_range(&self, range: Range<u64>, operation: Operation) -> Result<()> {
        let inner = self.inner_units(&range, self.geometry.subcluster_size());
        if inner.is_empty() {
            return self.zero_edge(range);
        }
        self.zero_edge(range.start..inner.start)?;
        let mut at = inner.start;
        while at < inner.end {
            let span = self.geometry.l2_span().max(1);
            let end = inner.end.min((at / span + 1).saturating_mul(span));
            self.flush_if_due()?;
            self.zero_step(at..end, operation)?;
            at = end;
        }
        self.zero_edge(inner.end..range.end)
    }

    /// The units of `unit` bytes that lie in the range. The last one of the disk ends with the
    /// disk.
    fn inner_units(&self, range: &Range<u64>, unit: u64) -> Range<u64> {
        let start = range.start.next_multiple_of(unit);
        let end = match range.end {
            end if end == self.virtual_size() => end,
            end => end - end % unit,
        };
        start.min(range.end)..end.max(start.min(range.end))
    }

    /// Zeroes a part of a unit by writing, unless it reads as zero already.
    fn zero_edge(&self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let found = self.extent(GuestOffset(at), range.end - at)?;
            let end = at.saturating_add(found.len).min(range.end);
            let reads_zero = match found.kind {
                LayerKind::Zero => true,
                LayerKind::Unallocated => !self.has_backing(),
                LayerKind::Data | LayerKind::Compressed => false,
            };
            if !reads_zero {
                self.write_zero_bytes(at..end)?;
            }
            at = end;
        }
        Ok(())
    }

    fn write_zero_bytes(&self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            // Up to a boundary, so that no sector is written in two pieces.
            let buffer = ZEROES.len() as u64;
            let len = (range.end - at).min(buffer - at % buffer);
            self.write_range(ZEROES.get(..in_memory(len)).unwrap_or_default(), at..at + len)?;
            at += len;
        }
        Ok(())
    }

    /// Zeroes whole units inside one L2 table.
    fn zero_step(&self, range: Range<u64>, operation: Operation) -> Result<()> {
        let rules = self.zero_rules(operation);
        if !self.has_backing() && self.tables.is_empty_at(GuestOffset(range.start)) {
            return self.zero_data_file(&range);
        }
        let table = self.table(GuestOffset(range.start))?;
        let lock = self.ranges.lock(self.clusters_around(&range), Mode::Exclusive);
        // Before the mapping says so: whatever a crash keeps of it, the range reads old or zero.
        self.zero_data_file(&range)?;
        let (first, entries) = self.entries_of(&table, &range)?;
        let count = entries.len() as u64;
        self.remap(&table, (first, count), |i, old| {
            after_zero(&old, self.mask_at(&range, i), rules).unwrap_or(old)
        })?;
        drop(lock);
        // What the entries cannot say is written.
        let base = self.geometry.cluster_start(range.start);
        for (i, old) in entries.iter().enumerate() {
            if after_zero(old, self.mask_at(&range, i as u64), rules).is_none() {
                let cluster = base + ((i as u64) << self.geometry.cluster_bits());
                let end = range.end.min(cluster + self.geometry.cluster_size());
                self.write_zero_bytes(range.start.max(cluster)..end)?;
            }
        }
        Ok(())
    }

    /// The units of the range in the `i`th cluster of it.
    fn mask_at(&self, range: &Range<u64>, i: u64) -> u32 {
        let g = self.geometry;
        let cluster = g.cluster_start(range.start) + (i << g.cluster_bits());
        let start = range.start.max(cluster) - cluster;
        let end = match range.end.min(cluster + g.cluster_size()) {
            // Beyond the end of the disk nothing is read.
            end if end == self.virtual_size() => g.cluster_size(),
            end => end - cluster,
        };
        units_covered(g, start, end)
    }

    fn zero_rules(&self, operation: Operation) -> ZeroRules {
        ZeroRules {
            has_backing: self.has_backing(),
            can_flag: self.header.version >= 3,
            has_data_file: self.has_data_file(),
            keeps_room: operation == Operation::Zero(ZeroMode::Keep),
            is_discard: operation == Operation::Discard,
        }
    }

    /// An external data file is zeroed itself: it may be read as a raw disk.
    fn zero_data_file(&self, range: &Range<u64>) -> Result<()> {
        if !self.has_data_file() {
            return Ok(());
        }
        let done = self.data.write_zeroes(range.start, range.end - range.start);
        done.map_err(|e| self.data.io_error("write zeroes", range.start, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::entry::L2Entry;
    use crate::layout::entry::{StandardEntry, Subclusters};
    use crate::layout::units::HostOffset;

    const RULES: ZeroRules = ZeroRules {
        has_backing: false,
        can_flag: true,
        has_data_file: false,
        keeps_room: false,
        is_discard: false,
    };

    fn entry(cluster: Option<u64>, is_copied: bool, subclusters: Subclusters) -> L2Entry {
        let cluster = cluster.map(HostOffset);
        L2Entry::Standard(StandardEntry { cluster, is_copied, subclusters })
    }

    #[test]
    fn whole_clusters() {
        let data = entry(Some(0x50000), true, Subclusters::DATA);
        let shared = entry(Some(0x50000), false, Subclusters::DATA);
        let zero = entry(None, false, Subclusters::ZERO);
        let kept = entry(Some(0x50000), true, Subclusters::ZERO);
        let none = L2Entry::UNALLOCATED;
        let all = |old, rules| after_zero(&old, u32::MAX, rules);
        let keep = ZeroRules { keeps_room: true, ..RULES };
        let over = ZeroRules { has_backing: true, ..RULES };
        let discard = ZeroRules { is_discard: true, ..RULES };
        let discard_over = ZeroRules { is_discard: true, ..over };
        assert_eq!(all(data, RULES), Some(zero));
        assert_eq!(all(data, keep), Some(kept));
        assert_eq!(all(shared, keep), Some(zero), "room that a snapshot shares");
        assert_eq!(all(kept, keep), Some(kept));
        assert_eq!(all(kept, RULES), Some(zero));
        assert_eq!(all(none, RULES), Some(none));
        assert_eq!(all(none, over), Some(zero));
        assert_eq!(all(data, discard), Some(none));
        assert_eq!(all(data, discard_over), Some(zero), "the backing must not come back");
        assert_eq!(all(none, discard_over), Some(zero));
        let v2 = |rules| ZeroRules { can_flag: false, ..rules };
        assert_eq!(all(data, v2(RULES)), Some(none));
        assert_eq!(all(data, v2(over)), None);
        assert_eq!(all(none, v2(over)), None);
        assert_eq!(all(data, v2(keep)), None);
        assert_eq!(all(data, v2(discard_over)), Some(data));
        let outside = ZeroRules { has_data_file: true, ..RULES };
        assert_eq!(all(data, outside), Some(data));
        assert_eq!(all(data, ZeroRules { is_discard: true, ..outside }), Some(data));
    }

    #[test]
    fn parts_of_clusters() {
        let half = Subclusters { allocated: 0xffff, zero: 0 };
        let old = entry(Some(0x50000), false, half);
        let over = ZeroRules { has_backing: true, ..RULES };
        let low = entry(Some(0x50000), false, Subclusters { allocated: 0xff00, zero: 0xff });
        assert_eq!(after_zero(&old, 0xff, over), Some(low));
        let dropped = entry(None, false, Subclusters { allocated: 0, zero: 0xffff });
        assert_eq!(after_zero(&old, 0xffff, over), Some(dropped));
        assert_eq!(after_zero(&old, 0xff00_0000, RULES), Some(old), "reads as zero already");
    }
}
