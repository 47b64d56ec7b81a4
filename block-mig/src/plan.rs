//! Cut a disk into units of work. Pure, but for [`Units`], which asks a source for its extents.
//!
//! Units that carry content start and end on leaf boundaries of the content hash (or at the end of
//! the disk), so that every leaf is hashed from one buffer by one worker. Runs without content are
//! one unit each, whatever their length: a sparse disk costs what its data costs.

use std::collections::VecDeque;

use format_spec::content_hash::LEAF_BYTES;
use mig_core::block::{BlockSource, Extent, ExtentKind, SECTOR_BYTES};

use crate::error::{Error, Result};
use crate::recorded::Runs;

/// What is in a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Reads as zero, known without looking.
    Zeroes,
    /// Nothing here that is to be moved; the destination keeps what it has. Only with
    /// [`Scope::Above`].
    Untouched,
    /// To be read. `compressed` says that some of it is stored compressed.
    Bytes {
        /// Whether some of it is stored compressed.
        compressed: bool,
    },
}

/// A stretch of a disk that one worker handles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit {
    /// Where it starts.
    pub offset: u64,
    /// Its length. At most the cutter's unit size, for content.
    pub len: u64,
    /// What is in it.
    pub content: Content,
}

impl Unit {
    /// Where it ends.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// What a source's holes mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scope {
    /// The whole disk: a hole reads as zero.
    #[default]
    Whole,
    /// Only what stands above a backing file: a hole is what the source does not have. Such units
    /// follow the extents exactly and cannot be hashed.
    Above,
}

impl Scope {
    /// What units are aligned to.
    fn grain(self) -> u64 {
        match self {
            Self::Whole => LEAF_BYTES as u64,
            Self::Above => SECTOR_BYTES,
        }
    }

    fn class(self, kind: ExtentKind) -> Content {
        match kind {
            ExtentKind::Data => Content::Bytes { compressed: false },
            ExtentKind::Compressed => Content::Bytes { compressed: true },
            ExtentKind::Zero => Content::Zeroes,
            ExtentKind::Hole if self == Self::Above => Content::Untouched,
            ExtentKind::Hole => Content::Zeroes,
        }
    }
}

/// Cuts extents, pushed in order without gaps, into units.
#[derive(Debug)]
pub struct Cutter {
    scope: Scope,
    unit_bytes: u64,
    size: u64,
    /// How far extents were pushed.
    at: u64,
    /// A grain that some extents covered in part.
    open: Option<Unit>,
    /// Runs of whole grains, neighbours of different content.
    runs: VecDeque<Unit>,
}

impl Cutter {
    /// For a disk of `size` bytes; content comes in units of at most `unit_bytes`, a power of two
    /// and at least a leaf.
    pub fn new(size: u64, scope: Scope, unit_bytes: u64) -> Self {
        let unit_bytes = unit_bytes.max(LEAF_BYTES as u64).next_power_of_two();
        Self { scope, unit_bytes, size, at: 0, open: None, runs: VecDeque::new() }
    }

    /// Where the next extent starts; `None` at the end of the disk.
    pub fn wants(&self) -> Option<u64> {
        (self.at < self.size).then_some(self.at)
    }

    /// Adds the extent that starts where [`wants`](Self::wants) says.
    pub fn push(&mut self, len: u64, kind: ExtentKind) {
        let grain = self.scope.grain();
        let content = self.scope.class(kind);
        let end = self.at.saturating_add(len).min(self.size);
        while self.at < end {
            let is_open = self.open.is_some() || !self.at.is_multiple_of(grain);
            let next = (self.at / grain).saturating_add(1).saturating_mul(grain);
            let stop = if is_open || end < next { next.min(end) } else { end / grain * grain };
            // The disk's last grain may be short and counts as whole.
            let stop = if end == self.size && !is_open { end } else { stop };
            let piece = Unit { offset: self.at, len: stop.saturating_sub(self.at), content };
            self.at = stop;
            let is_whole = stop == self.size || stop.is_multiple_of(grain);
            match (self.open.take(), is_whole) {
                (None, true) => self.append(piece),
                (Some(open), true) => self.append(joined(open, piece)),
                (None, false) => self.open = Some(piece),
                (Some(open), false) => self.open = Some(joined(open, piece)),
            }
        }
    }

    /// The next unit, if it is known where it ends.
    pub fn pop(&mut self) -> Option<Unit> {
        let is_last = self.runs.len() == 1 && self.at < self.size;
        let front = self.runs.front_mut()?;
        if !matches!(front.content, Content::Bytes { .. }) {
            return if is_last { None } else { self.runs.pop_front() };
        }
        let stop = (front.offset / self.unit_bytes).saturating_add(1) * self.unit_bytes;
        if front.end() <= stop {
            // More of the same may still come, unless the unit is full.
            return if is_last && front.end() < stop { None } else { self.runs.pop_front() };
        }
        let unit = Unit { len: stop.saturating_sub(front.offset), ..*front };
        front.offset = stop;
        front.len = front.len.saturating_sub(unit.len);
        Some(unit)
    }

    fn append(&mut self, piece: Unit) {
        match self.runs.back_mut() {
            Some(last) if last.content == piece.content => last.len += piece.len,
            // A unit may mix plain and compressed clusters, unless that joins long runs.
            Some(last) if shares_unit(last, &piece, self.unit_bytes) => {
                *last = joined(*last, piece);
            }
            _ => self.runs.push_back(piece),
        }
    }
}

/// Whether two runs of content that differ only by compression fit one unit.
fn shares_unit(last: &Unit, piece: &Unit, unit_bytes: u64) -> bool {
    let both = matches!(last.content, Content::Bytes { .. })
        && matches!(piece.content, Content::Bytes { .. });
    both && last.offset / unit_bytes == piece.end().saturating_sub(1) / unit_bytes
}

/// Two neighbours as one: content wins over zeroes, and zeroes over nothing.
fn joined(first: Unit, second: Unit) -> Unit {
    let content = match (first.content, second.content) {
        (Content::Bytes { compressed: a }, Content::Bytes { compressed: b }) => {
            Content::Bytes { compressed: a || b }
        }
        (bytes @ Content::Bytes { .. }, _) | (_, bytes @ Content::Bytes { .. }) => bytes,
        (Content::Untouched, Content::Untouched) => Content::Untouched,
        _ => Content::Zeroes,
    };
    Unit { offset: first.offset, len: first.len.saturating_add(second.len), content }
}

/// The units of a source, in order.
pub struct Units<'a> {
    source: &'a dyn BlockSource,
    cutter: Cutter,
}

impl<'a> Units<'a> {
    /// All units of `source`.
    pub fn new(source: &'a dyn BlockSource, scope: Scope, unit_bytes: u64) -> Self {
        Self { source, cutter: Cutter::new(source.size(), scope, unit_bytes) }
    }

    fn extent(&self, at: u64) -> Result<Extent> {
        let max = self.source.size().saturating_sub(at);
        self.source.extent(at, max).map_err(Error::Source)
    }
}

impl Iterator for Units<'_> {
    type Item = Result<Unit>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(unit) = self.cutter.pop() {
                return Some(Ok(unit));
            }
            match self.extent(self.cutter.wants()?) {
                Ok(extent) => self.cutter.push(extent.len, extent.kind),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// What a disk holds, as a walk over its extents tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Survey {
    /// Bytes in units with content: what a transfer reads, and the total of its progress.
    pub content: u64,
    /// Bytes of plain data extents.
    pub data: u64,
    /// Bytes of the guest that are stored compressed.
    pub compressed: u64,
    /// Bytes that read as zero without being looked at.
    pub zero: u64,
    /// Bytes that are not there, with [`Scope::Above`].
    pub untouched: u64,
}

/// Walks a source's extents. Reads metadata only.
pub fn survey(source: &dyn BlockSource, scope: Scope, unit_bytes: u64) -> Result<Survey> {
    survey_noting(source, scope, unit_bytes, &mut Runs::default())
}

/// [`survey`], noting what it finds for whoever walks the same extents later.
pub fn survey_noting(
    source: &dyn BlockSource,
    scope: Scope,
    unit_bytes: u64,
    runs: &mut Runs,
) -> Result<Survey> {
    let mut cutter = Cutter::new(source.size(), scope, unit_bytes);
    let mut survey = Survey::default();
    while let Some(at) = cutter.wants() {
        let extent = source.extent(at, source.size().saturating_sub(at)).map_err(Error::Source)?;
        match scope.class(extent.kind) {
            Content::Bytes { compressed: false } => survey.data += extent.len,
            Content::Bytes { compressed: true } => survey.compressed += extent.len,
            Content::Zeroes => survey.zero += extent.len,
            Content::Untouched => survey.untouched += extent.len,
        }
        runs.push(at, extent.len, extent.kind);
        cutter.push(extent.len, extent.kind);
        while let Some(unit) = cutter.pop() {
            if matches!(unit.content, Content::Bytes { .. }) {
                survey.content += unit.len;
            }
        }
    }
    Ok(survey)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LEAF: u64 = LEAF_BYTES as u64;

    fn cut(size: u64, scope: Scope, extents: &[(u64, ExtentKind)]) -> Vec<Unit> {
        let mut cutter = Cutter::new(size, scope, 1 << 20);
        let mut units = Vec::new();
        for (len, kind) in extents {
            cutter.push(*len, *kind);
            units.extend(std::iter::from_fn(|| cutter.pop()));
            assert!(cutter.runs.len() <= 1);
        }
        assert_eq!(cutter.wants(), None);
        units
    }

    #[test]
    fn a_sparse_disk_is_one_unit() {
        let size = 16 << 40;
        let units =
            cut(size, Scope::Whole, &[(size / 2, ExtentKind::Hole), (size / 2, ExtentKind::Zero)]);
        assert_eq!(units, [Unit { offset: 0, len: size, content: Content::Zeroes }]);
    }

    #[test]
    fn a_leaf_with_one_sector_of_data_is_content() {
        let extents = [
            (LEAF + 512, ExtentKind::Hole),
            (512, ExtentKind::Compressed),
            (LEAF * 3 - 512, ExtentKind::Hole),
        ];
        let units = cut(LEAF * 4 + 512, Scope::Whole, &extents);
        let offsets: Vec<_> = units.iter().map(|u| (u.offset, u.len)).collect();
        assert_eq!(offsets, [(0, LEAF), (LEAF, LEAF), (2 * LEAF, 2 * LEAF + 512)]);
        assert_eq!(units[1].content, Content::Bytes { compressed: true });
    }

    #[test]
    fn above_a_backing_file_extents_are_kept_apart() {
        let extents = [(512, ExtentKind::Hole), (1024, ExtentKind::Zero), (512, ExtentKind::Data)];
        let units = cut(2048, Scope::Above, &extents);
        let contents: Vec<_> = units.iter().map(|u| u.content).collect();
        assert_eq!(
            contents,
            [Content::Untouched, Content::Zeroes, Content::Bytes { compressed: false }]
        );
    }

    fn kind(n: u8) -> ExtentKind {
        [ExtentKind::Data, ExtentKind::Compressed, ExtentKind::Zero, ExtentKind::Hole]
            [n as usize % 4]
    }

    proptest! {
        #[test]
        fn units_tile_the_disk(
            sectors in proptest::collection::vec((1u64..5000, 0u8..4), 1..80), above: bool,
        ) {
            let scope = if above { Scope::Above } else { Scope::Whole };
            let extents: Vec<_> = sectors.iter().map(|(n, k)| (n * 512, kind(*k))).collect();
            let size = extents.iter().map(|(n, _)| n).sum();
            let units = cut(size, scope, &extents);
            let mut at = 0;
            for unit in &units {
                prop_assert_eq!(unit.offset, at);
                prop_assert!(unit.len > 0);
                at = unit.end();
                prop_assert!(at == size || at.is_multiple_of(scope.grain()));
                if matches!(unit.content, Content::Bytes { .. }) {
                    prop_assert_eq!(unit.offset >> 20, (unit.end() - 1) >> 20);
                }
            }
            prop_assert_eq!(at, size);
            // No data extent lies in a unit without content.
            let mut at = 0;
            for (len, k) in extents {
                for unit in units.iter().filter(|u| u.offset < at + len && u.end() > at) {
                    match (k, unit.content) {
                        (ExtentKind::Compressed, c) => {
                            prop_assert_eq!(c, Content::Bytes { compressed: true });
                        }
                        (ExtentKind::Data, c) => {
                            prop_assert!(matches!(c, Content::Bytes { .. }), "{:?}", c);
                        }
                        (_, c) => prop_assert!(c != Content::Untouched || k == ExtentKind::Hole),
                    }
                }
                at += len;
            }
        }
    }
}
