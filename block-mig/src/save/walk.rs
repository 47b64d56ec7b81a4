//! What of a disk is sent: all of it first, then what changes.

use std::ops::Range;

use format_spec::content_hash::LEAF_BYTES;
use mig_core::block::BlockSource;
use mig_core::dirty::DirtySet;

use crate::error::{Error, Result};
use crate::ledger::UNIT_BYTES;

/// Leaves of a unit, one bit each.
pub(super) type Leaves = u16;
/// All leaves of a unit.
pub(super) const ALL_LEAVES: Leaves = Leaves::MAX;

/// A stretch of a disk that one worker sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Work {
    /// Whole units that read as zero, as the disk says.
    Zeroes(Range<u64>),
    /// One unit, as the walk over all of them finds it.
    Unit(Range<u64>),
    /// One unit that changed: it is hashed as a whole, and these of its leaves are sent.
    Changed(Range<u64>, Leaves),
}

impl Work {
    /// Bytes that are read for it.
    pub(super) fn cost(&self) -> u64 {
        match self {
            Self::Zeroes(_) => 0,
            Self::Unit(range) | Self::Changed(range, _) => range.end.saturating_sub(range.start),
        }
    }
}

/// Walks over a whole disk once, in order.
#[derive(Debug, Default, Clone)]
pub(super) struct Walk {
    at: u64,
}

impl Walk {
    /// What comes next; `None` at the end.
    pub(super) fn next(&mut self, source: &dyn BlockSource) -> Result<Option<Work>> {
        let size = source.size();
        if self.at >= size {
            return Ok(None);
        }
        let start = self.at;
        let zero_end = zero_until(source, start)?;
        let zero_units = if zero_end >= size { size } else { zero_end / UNIT_BYTES * UNIT_BYTES };
        if zero_units > start {
            self.at = zero_units;
            return Ok(Some(Work::Zeroes(start..zero_units)));
        }
        self.at = unit_end(start, size);
        Ok(Some(Work::Unit(start..self.at)))
    }

    /// Bytes that were not walked over yet.
    pub(super) fn left(&self, size: u64) -> u64 {
        size.saturating_sub(self.at)
    }
}

/// How far the disk says that it reads as zero, from `start` on.
fn zero_until(source: &dyn BlockSource, start: u64) -> Result<u64> {
    let mut at = start;
    while at < source.size() {
        let extent = source.extent(at, source.size() - at).map_err(Error::Source)?;
        if !extent.kind.reads_as_zero() {
            break;
        }
        at = at.saturating_add(extent.len);
    }
    Ok(at)
}

/// Where the unit that holds byte `at` ends.
pub(super) fn unit_end(at: u64, size: u64) -> u64 {
    (at / UNIT_BYTES).saturating_add(1).saturating_mul(UNIT_BYTES).min(size)
}

/// Takes what is dirty, unit by unit, in order.
#[derive(Debug, Default, Clone)]
pub(super) struct Sweep {
    at: u64,
    /// Taken, and of a later unit.
    carried: Option<Range<u64>>,
}

impl Sweep {
    /// The next unit with dirty leaves; `None` at the end.
    pub(super) fn next(&mut self, dirty: &DirtySet) -> Option<Work> {
        let size = dirty.size();
        let first = self.carried.take().or_else(|| self.take(dirty, UNIT_BYTES))?;
        let start = first.start / UNIT_BYTES * UNIT_BYTES;
        let end = unit_end(start, size);
        let mut leaves = 0;
        let mut run = Some(first);
        while let Some(found) = run.take() {
            if found.start >= end {
                self.carried = Some(found);
                break;
            }
            leaves |= mask(found.start - start, found.end.min(end) - start);
            if found.end > end {
                self.carried = Some(end..found.end);
            } else if found.end < end {
                run = self.take(dirty, end - found.end);
            }
        }
        Some(Work::Changed(start..end, leaves))
    }

    fn take(&mut self, dirty: &DirtySet, max_bytes: u64) -> Option<Range<u64>> {
        let run = dirty.take(self.at, max_bytes)?;
        self.at = run.end;
        Some(run)
    }
}

/// The leaves of a unit that lie in a range of it.
pub(super) fn mask(start: u64, end: u64) -> Leaves {
    let leaf = LEAF_BYTES as u64;
    let below = |leaves: u64| u32::MAX.checked_shl(u32::try_from(leaves).unwrap_or(32));
    let mask = below(start / leaf).unwrap_or(0) & !below(end.div_ceil(leaf)).unwrap_or(0);
    Leaves::try_from(mask & u32::from(ALL_LEAVES)).unwrap_or(ALL_LEAVES)
}

#[cfg(test)]
mod tests {
    use mig_core::block::ExtentKind;

    use super::*;
    use crate::memory::MemoryDisk;

    #[test]
    fn zero_units_are_joined_and_mixed_ones_are_read() {
        let mib = UNIT_BYTES;
        let mut disk = MemoryDisk::new(9 * mib + 512);
        disk.fill(3 * mib + 512, 512, 1, ExtentKind::Data);
        disk.fill(4 * mib, mib, 0, ExtentKind::Zero);
        disk.fill(9 * mib, 512, 1, ExtentKind::Data);
        let mut walk = Walk::default();
        let works: Vec<_> = std::iter::from_fn(|| walk.next(&disk).unwrap()).collect();
        let unit = |start: u64, end: u64| Work::Unit(start..end);
        let expected = [
            Work::Zeroes(0..3 * mib),
            unit(3 * mib, 4 * mib),
            Work::Zeroes(4 * mib..9 * mib),
            unit(9 * mib, 9 * mib + 512),
        ];
        assert_eq!(works, expected);
        assert_eq!(walk.left(disk.size()), 0);
    }

    #[test]
    fn dirty_leaves_are_gathered_by_unit() {
        let leaf = LEAF_BYTES as u64;
        let dirty = DirtySet::new(50 * leaf + 512, 16);
        for leaves in [0..1, 3..5, 15..18, 31..32, 50..51] {
            dirty.mark(leaves.start * leaf..(leaves.end * leaf).min(50 * leaf + 512));
        }
        let mut sweep = Sweep::default();
        let works: Vec<_> = std::iter::from_fn(|| sweep.next(&dirty)).collect();
        let at = |unit: u64| unit * UNIT_BYTES;
        let expected = [
            Work::Changed(at(0)..at(1), 0b1000_0000_0001_1001),
            Work::Changed(at(1)..at(2), 0b1000_0000_0000_0011),
            Work::Changed(at(3)..50 * leaf + 512, 0b100),
        ];
        assert_eq!(works, expected);
        assert_eq!(dirty.dirty_bytes(), 0);
    }
}
