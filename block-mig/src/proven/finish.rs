//! The rest of the proof: a finished disk, opened afresh, is held against what was read before.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use format_spec::content_hash::{ContentHash, LEDGER_HEIGHT, subtree};
use mig_core::block::{BlockSource, Extent, is_zero, on_page};

use super::mark::{Places, mark};
use super::{Proven, bytes_of};
use crate::error::{Error, Result};
use crate::ledger::{Entry, UNIT_BYTES};
use crate::monitor::Monitor;
use crate::pool::Pool;

/// Units that one worker looks at in one go.
const BATCH_UNITS: u64 = 64;

/// A finished disk as whoever opens it reads it.
#[derive(Clone, Copy)]
pub struct Finished<'a> {
    /// What is read.
    pub disk: &'a dyn BlockSource,
    /// Where its content stands, by its tables alone.
    pub places: &'a Places<'a>,
    /// Worker threads.
    pub workers: usize,
    /// Told of bytes that were looked at.
    pub monitor: &'a dyn Monitor,
}

/// So many units in a row that were not read before are worth a look for holes.
const FEW_UNITS: u64 = 4;

/// How a finished disk reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// All of it.
    pub content: ContentHash,
    /// Bytes that had to be read for it now; the others had been read before.
    pub bytes_read: u64,
}

/// Units that are alike.
enum Piece {
    Zeroes(Range<u64>),
    Content(Range<u64>),
}

impl Proven {
    /// The content hash of the finished disk: reads what was not read before, or not in the place
    /// where it stands now, or was written since. Nobody writes any more.
    pub fn finish(&self, finished: Finished<'_>) -> Result<Proof> {
        let read = AtomicU64::new(0);
        let work = |buffer: &mut Vec<u8>, piece: Piece| match piece {
            Piece::Zeroes(units) => self.lock().nodes.set_zeroes(units),
            Piece::Content(mut units) => units.try_for_each(|unit| {
                let range = bytes_of(unit, self.size);
                if !self.is_known(unit, &range, finished.places)? {
                    let len = usize::try_from(range.end - range.start).unwrap_or_default();
                    let bytes = on_page(buffer, len);
                    finished.disk.read_at(bytes, range.start).map_err(Error::Source)?;
                    let node = subtree(LEDGER_HEIGHT, bytes, &is_zero);
                    self.lock().nodes.set(unit, node)?;
                    read.fetch_add(len as u64, Ordering::Relaxed);
                }
                finished.monitor.advance(range.end - range.start);
                Ok(())
            }),
        };
        let Finished { workers, monitor, .. } = finished;
        let pieces = Pieces { proven: self, finished, at: 0, found: (0, false) };
        Pool { workers, monitor }.run(pieces, Vec::new, work)?;
        let content = self.lock().nodes.root()?;
        Ok(Proof { content, bytes_read: read.into_inner() })
    }

    /// Whether the content of a unit was read from where it stands, after it was written.
    fn is_known(&self, unit: u64, range: &Range<u64>, places: &Places<'_>) -> Result<bool> {
        let Some(mark) = mark(range, places, &self.writes).map_err(Error::Source)? else {
            return Ok(false);
        };
        Ok(self.lock().marks.get(unit)? == Entry::Node(mark))
    }
}

/// Cuts a disk into units that read as zero, and others.
struct Pieces<'a> {
    proven: &'a Proven,
    finished: Finished<'a>,
    /// The next unit.
    at: u64,
    /// The extent that was found last: where it ends, and whether it reads as zero.
    found: (u64, bool),
}

impl Pieces<'_> {
    fn find(&mut self) -> Result<Piece> {
        let (start, size) = (self.at.saturating_mul(UNIT_BYTES), self.finished.disk.size());
        if self.found.0 <= start {
            let extent = self.extent(start, size)?;
            let end = start.saturating_add(extent.len.max(1)).min(size);
            self.found = (end, extent.kind.reads_as_zero());
        }
        let (end, is_zero) = self.found;
        let whole = if end == size { end.div_ceil(UNIT_BYTES) } else { end / UNIT_BYTES };
        let first = self.at;
        if is_zero && whole > first {
            self.at = whole;
            return Ok(Piece::Zeroes(first..whole));
        }
        // Of an extent of zeroes only a part of one unit is left.
        let last = if is_zero { first.saturating_add(1) } else { end.div_ceil(UNIT_BYTES) };
        self.at = last.min(first.saturating_add(BATCH_UNITS));
        Ok(Piece::Content(first..self.at))
    }

    /// What lies behind `start`. Holes of the file are looked for only where several units were not
    /// read before: to find the end of a long run of data takes the file system longer than all
    /// else that is done here, and a guest may be waiting.
    fn extent(&self, start: u64, size: u64) -> Result<Extent> {
        let (disk, places) = (self.finished.disk, self.finished.places);
        let placed = places(start, size - start).map_err(Error::Source)?;
        if placed.kind.reads_as_zero() {
            return Ok(placed);
        }
        let first = start / UNIT_BYTES;
        for unit in first..first.saturating_add(FEW_UNITS) {
            let range = bytes_of(unit, size);
            if range.is_empty() || self.proven.is_known(unit, &range, places)? {
                let len = if unit == first { BATCH_UNITS } else { unit.saturating_sub(first) };
                let len = placed.len.min(len.saturating_mul(UNIT_BYTES));
                return Ok(Extent { len, ..placed });
            }
        }
        disk.extent(start, size - start).map_err(Error::Source)
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        let is_over = self.at.saturating_mul(UNIT_BYTES) >= self.finished.disk.size();
        (!is_over).then(|| self.find())
    }
}
