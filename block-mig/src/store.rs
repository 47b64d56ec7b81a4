//! The second half of a worker's job: put a unit into a sink, leaving out what need not be written.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use mig_core::block::{BlockSink, BlockSource, ExtentKind, SECTOR_BYTES, is_zero};

use crate::error::{Error, Result};
use crate::plan::{Content, Unit};

/// What was stored so far.
#[derive(Debug, Default)]
pub struct Counts {
    /// Bytes of content that were written.
    pub data: AtomicU64,
    /// Bytes that the source does not have, see [`Content::Untouched`].
    pub untouched: AtomicU64,
    /// Guest bytes of compressed clusters that were passed on as they are.
    pub passed_on: AtomicU64,
    /// Guest bytes of compressed clusters that had to be stored plain.
    pub decompressed: AtomicU64,
}

/// A unit with its content.
#[derive(Clone, Copy)]
pub struct Chunk<'a> {
    /// Which unit.
    pub unit: &'a Unit,
    /// Its content, if it has any.
    pub bytes: &'a [u8],
    /// Where it comes from, for what is passed on compressed.
    pub source: &'a dyn BlockSource,
}

impl<'a> Chunk<'a> {
    /// The content from guest offset `start` to `end`.
    fn part(&self, start: u64, end: u64) -> &'a [u8] {
        let index = |at: u64| usize::try_from(at - self.unit.offset).unwrap_or(usize::MAX);
        self.bytes.get(index(start)..index(end)).unwrap_or_default()
    }
}

/// Writes content to a sink that may hold anything, except for what is zero and reads so already.
pub(crate) fn store_bytes(sink: &dyn BlockSink, offset: u64, bytes: &[u8]) -> Result<()> {
    let zero_grain = sink.allocation_unit().max(SECTOR_BYTES);
    let mut at = 0;
    while at < bytes.len() {
        let (len, zero) = grain_run(zero_grain, offset, bytes, at);
        let here = offset.saturating_add(at as u64);
        let run = bytes.get(at..at.saturating_add(len)).unwrap_or_default();
        let stored = match zero {
            false => sink.write_at(run, here),
            true if sink.reads_as_zero(here, run.len() as u64) => Ok(()),
            true => sink.write_zeroes(here, run.len() as u64),
        };
        stored.map_err(Error::Sink)?;
        at += len;
    }
    Ok(())
}

/// Length of the run of grains from `at` on that are all zero or all not, and which.
fn grain_run(zero_grain: u64, offset: u64, bytes: &[u8], at: usize) -> (usize, bool) {
    let mut end = at;
    let mut zero = None;
    while end < bytes.len() {
        let here = offset.saturating_add(end as u64);
        let to_next = zero_grain - here % zero_grain;
        let next = usize::try_from(to_next).unwrap_or(usize::MAX).saturating_add(end);
        let grain = bytes.get(end..next.min(bytes.len())).unwrap_or_default();
        let is_zero = is_zero(grain);
        if *zero.get_or_insert(is_zero) != is_zero {
            break;
        }
        end += grain.len();
    }
    (end - at, zero.unwrap_or(false))
}

/// Puts units into one sink. Every range is stored once.
pub struct Storer<'a> {
    sink: &'a dyn BlockSink,
    /// Whether the whole sink read as zero before the first unit. Since no range is stored twice, a
    /// range that was not stored still does.
    starts_zero: bool,
    /// Grain of the zero test.
    zero_grain: u64,
    /// Whether compressed clusters are offered as they are.
    offers_compressed: bool,
    /// What was stored.
    pub counts: Counts,
}

impl<'a> Storer<'a> {
    /// Before anything is written to `sink`.
    pub fn new(sink: &'a dyn BlockSink, offers_compressed: bool) -> Self {
        Self {
            sink,
            starts_zero: sink.reads_as_zero(0, sink.size()),
            zero_grain: sink.allocation_unit().max(SECTOR_BYTES),
            offers_compressed,
            counts: Counts::default(),
        }
    }

    /// Stores a unit. `packed` is scratch room for a compressed cluster.
    pub fn store(&self, chunk: Chunk<'_>, packed: &mut Vec<u8>) -> Result<()> {
        let Unit { offset, len, content } = *chunk.unit;
        match content {
            Content::Untouched => {
                self.counts.untouched.fetch_add(len, Ordering::Relaxed);
                Ok(())
            }
            Content::Zeroes => self.zeroes(offset, len),
            Content::Bytes { compressed: true } => self.mixed(chunk, packed),
            Content::Bytes { .. } => self.bytes(offset, chunk.bytes),
        }
    }

    /// Writes content, except for what is zero and need not be written.
    pub fn bytes(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            let (len, zero) = grain_run(self.zero_grain, offset, bytes, at);
            let here = offset.saturating_add(at as u64);
            let run = bytes.get(at..at.saturating_add(len)).unwrap_or_default();
            if zero {
                self.zeroes(here, run.len() as u64)?;
            } else {
                self.sink.write_at(run, here).map_err(Error::Sink)?;
                self.counts.data.fetch_add(run.len() as u64, Ordering::Relaxed);
            }
            at += len;
        }
        Ok(())
    }

    /// Makes a range read as zero, if it does not yet.
    fn zeroes(&self, offset: u64, len: u64) -> Result<()> {
        if self.starts_zero || self.sink.reads_as_zero(offset, len) {
            return Ok(());
        }
        self.sink.write_zeroes(offset, len).map_err(Error::Sink)
    }

    /// Stores a unit of plain and compressed clusters.
    fn mixed(&self, chunk: Chunk<'_>, packed: &mut Vec<u8>) -> Result<()> {
        let mut at = chunk.unit.offset;
        while at < chunk.unit.end() {
            let max_len = chunk.unit.end() - at;
            let extent = chunk.source.extent(at, max_len).map_err(Error::Source)?;
            let end = at.saturating_add(extent.len.min(max_len));
            if extent.kind != ExtentKind::Compressed {
                self.bytes(at, chunk.part(at, end))?;
                at = end;
            }
            while at < end {
                at += self.cluster(chunk, at..end, packed)?;
            }
        }
        Ok(())
    }

    /// Stores the compressed cluster at the start of `range`, and says how many guest bytes that
    /// was.
    fn cluster(&self, chunk: Chunk<'_>, range: Range<u64>, packed: &mut Vec<u8>) -> Result<u64> {
        packed.clear();
        let at = range.start;
        let cluster = match self.offers_compressed {
            true => chunk.source.read_compressed(at, packed).map_err(Error::Source)?,
            false => None,
        };
        // The last cluster of a disk may stand for more than the disk has.
        let left = range.end - at;
        let len = cluster.map_or(left, |c| c.len.min(left));
        let plain = chunk.part(at, at.saturating_add(len));
        if let Some(cluster) = cluster
            && !(is_zero(plain) && self.starts_zero)
            && self.sink.write_compressed(at, cluster, packed).map_err(Error::Sink)?
        {
            self.counts.passed_on.fetch_add(len, Ordering::Relaxed);
            self.counts.data.fetch_add(len, Ordering::Relaxed);
            return Ok(len);
        }
        self.counts.decompressed.fetch_add(len, Ordering::Relaxed);
        self.bytes(at, plain)?;
        Ok(len)
    }
}
