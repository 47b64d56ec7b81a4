//! Find the first byte in which two disks differ.

use std::sync::atomic::{AtomicU64, Ordering};

use mig_core::block::{BlockSource, on_page};

use crate::error::{Error, Result};
use crate::limits::UNIT_BYTES;
use crate::monitor::Monitor;
use crate::plan::{Content, Unit};
use crate::pool::Pool;

/// Where two disks differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// First byte that differs. Beyond the end of the shorter disk bytes count as zero.
    pub offset: u64,
}

/// Compares two disks as guests see them; the shorter one is filled up with zeroes. What both know
/// to be zero is not read. `None` if there is no difference.
pub fn first_difference(
    a: &dyn BlockSource,
    b: &dyn BlockSource,
    workers: usize,
    monitor: &dyn Monitor,
) -> Result<Option<Difference>> {
    let first = AtomicU64::new(u64::MAX);
    let work = |buffers: &mut [Vec<u8>; 2], unit: Unit| {
        // Units come in order: what stands behind a known difference does not matter any more.
        if unit.offset < first.load(Ordering::Relaxed)
            && let Some(offset) = compare_unit([a, b], &unit, buffers)?
        {
            first.fetch_min(offset, Ordering::Relaxed);
        }
        if matches!(unit.content, Content::Bytes { .. }) {
            monitor.advance(unit.len);
        }
        Ok(())
    };
    let units = Both { a, b, at: 0 }.take_while(|unit| match unit {
        Ok(unit) => unit.offset < first.load(Ordering::Relaxed),
        Err(_) => true,
    });
    Pool { workers, monitor }.run(units, Default::default, work)?;
    let offset = first.into_inner();
    Ok((offset < u64::MAX).then_some(Difference { offset }))
}

/// Offset of the first difference in a unit.
fn compare_unit(
    disks: [&dyn BlockSource; 2],
    unit: &Unit,
    buffers: &mut [Vec<u8>; 2],
) -> Result<Option<u64>> {
    if !matches!(unit.content, Content::Bytes { .. }) {
        return Ok(None);
    }
    let [left, right] = buffers;
    let left = load_padded(disks[0], unit, left)?;
    let right = load_padded(disks[1], unit, right)?;
    Ok(first_unequal(left, right).map(|at| unit.offset.saturating_add(at as u64)))
}

/// Reads a unit; what lies beyond the disk is zero.
fn load_padded<'b>(
    disk: &dyn BlockSource,
    unit: &Unit,
    buffer: &'b mut Vec<u8>,
) -> Result<&'b [u8]> {
    let bytes = on_page(buffer, usize::try_from(unit.len).unwrap_or(usize::MAX));
    let inside = disk.size().saturating_sub(unit.offset).min(unit.len);
    let (there, beyond) = bytes
        .split_at_mut_checked(usize::try_from(inside).unwrap_or(usize::MAX))
        .unwrap_or_default();
    if !there.is_empty() {
        disk.read_at(there, unit.offset).map_err(Error::Source)?;
    }
    beyond.fill(0);
    Ok(bytes)
}

fn first_unequal(a: &[u8], b: &[u8]) -> Option<usize> {
    const STRIDE: usize = 4096;
    let pairs = a.chunks(STRIDE).zip(b.chunks(STRIDE)).enumerate();
    pairs
        .into_iter()
        .find(|(_, (a, b))| a != b)
        .and_then(|(i, (a, b))| a.iter().zip(b).position(|(a, b)| a != b).map(|at| i * STRIDE + at))
}

/// Units of two disks at once: content where either has some.
struct Both<'a> {
    a: &'a dyn BlockSource,
    b: &'a dyn BlockSource,
    at: u64,
}

impl Both<'_> {
    /// The unit at the current place.
    fn unit(&self) -> Result<Unit> {
        let end = self.a.size().max(self.b.size());
        let (mut len, mut has_bytes) = (end - self.at, false);
        for disk in [self.a, self.b] {
            let inside = disk.size().saturating_sub(self.at);
            if inside == 0 {
                continue;
            }
            let extent = disk.extent(self.at, inside.min(len)).map_err(Error::Source)?;
            len = len.min(extent.len);
            has_bytes |= !extent.kind.reads_as_zero();
        }
        if !has_bytes {
            return Ok(Unit { offset: self.at, len, content: Content::Zeroes });
        }
        // Small extents on either side are read together: the disks' own zeroes are cheap to read.
        let to_boundary = UNIT_BYTES - self.at % UNIT_BYTES;
        let content = Content::Bytes { compressed: false };
        Ok(Unit { offset: self.at, len: to_boundary.min(end - self.at), content })
    }
}

impl Iterator for Both<'_> {
    type Item = Result<Unit>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.a.size().max(self.b.size()) {
            return None;
        }
        let unit = self.unit();
        if let Ok(unit) = &unit {
            self.at = unit.end();
        }
        Some(unit)
    }
}
