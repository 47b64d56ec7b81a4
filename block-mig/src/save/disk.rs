//! One disk while it is sent.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use format_spec::content_hash::{ContentHash, LEAF_BYTES, LEDGER_HEIGHT, Node, subtree};
use format_spec::native::block::{DiskId, RUN, Run};
use mig_core::block::{BlockSource, ExtentKind, is_zero, on_page};
use mig_core::channels::Outlet;
use mig_core::dirty::{AtomicBits, DirtySet};

use super::walk::{ALL_LEAVES, Leaves, Work, mask};
use crate::error::{Error, Result};
use crate::ledger::{Ledger, UNIT_BYTES};

/// A disk that is sent.
#[derive(Clone)]
pub struct SaveDisk<'a> {
    /// Its number in the session.
    pub id: DiskId,
    /// Its name on the wire, at most 255 bytes.
    pub name: String,
    /// Its content.
    pub source: &'a dyn BlockSource,
    /// What the guest changes meanwhile, in leaves of 64 KiB; marked after each write. `None` for a
    /// disk at rest.
    pub dirty: Option<Arc<DirtySet>>,
}

/// What of a disk's content travels.
#[derive(Clone, Copy)]
pub(super) enum Carried<'a> {
    /// All of it.
    Whole,
    /// What this holds: what it calls a hole the destination has below. It reads as the disk.
    Above(&'a dyn BlockSource),
    /// None: the destination has it by another way, and only bitmaps go along.
    Nothing,
}

/// What was sent of one disk so far. Shared with whoever reports.
#[derive(Debug, Default)]
pub struct SaveCounts {
    /// Bytes of content on the wire.
    pub data: AtomicU64,
    /// Bytes that went as runs of zeroes.
    pub zero: AtomicU64,
    /// Bytes of content that had been sent before.
    pub repeated: AtomicU64,
    /// Bytes that were not sent since the destination had them from an earlier attempt.
    pub kept: AtomicU64,
    /// What the content hashes to, once it was sealed.
    pub root: OnceLock<ContentHash>,
}

fn add(counter: &AtomicU64, bytes: u64) {
    counter.fetch_add(bytes, Ordering::Relaxed);
}

/// One disk while it is sent.
pub(super) struct Saved<'a> {
    pub(super) disk: SaveDisk<'a>,
    pub(super) carried: Carried<'a>,
    pub(super) counts: Arc<SaveCounts>,
    /// Nodes of all units as they were last sent, where hashes are wanted.
    ledger: Option<Mutex<Ledger>>,
    /// Units that the destination has as they were here when it told so, content that was read.
    pub(super) equal: Option<AtomicBits>,
    /// Units that the destination has as zeroes.
    pub(super) zero: Option<AtomicBits>,
    /// Units that the destination has, and that are different.
    pub(super) differs: Option<AtomicBits>,
    /// Whether content goes to the wire at all, or is only hashed.
    pub(super) sends: bool,
}

impl<'a> Saved<'a> {
    pub(super) fn new(disk: SaveDisk<'a>, carried: Carried<'a>, hashes: bool) -> Result<Self> {
        let size = disk.source.size();
        // What does not travel is not read, so that nothing can be said of it.
        let hashes = hashes && !matches!(carried, Carried::Nothing);
        let ledger = if hashes { Some(Mutex::new(Ledger::new(size)?)) } else { None };
        let counts = Arc::default();
        let (equal, zero, differs) = (None, None, None);
        Ok(Self { disk, carried, counts, ledger, equal, zero, differs, sends: true })
    }

    /// Whether any of its content travels.
    pub(super) fn has_content(&self) -> bool {
        !matches!(self.carried, Carried::Nothing)
    }

    pub(super) fn size(&self) -> u64 {
        self.disk.source.size()
    }

    /// Does one work. `buffer` is the worker's.
    pub(super) fn send(&self, work: &Work, buffer: &mut Vec<u8>, out: &Outlet<'_>) -> Result<()> {
        match work {
            Work::Zeroes(range) => self.zeroes(range.clone(), out),
            Work::Unit(range) => self.unit(range.clone(), buffer, out),
            Work::Changed(range, leaves) => {
                let bytes = self.load(range.clone(), buffer)?;
                self.leaves(range.start, bytes, (*leaves, true), out)
            }
        }
    }

    fn unit(&self, range: Range<u64>, buffer: &mut Vec<u8>, out: &Outlet<'_>) -> Result<()> {
        let unit = range.start / UNIT_BYTES;
        let is_noted = |noted: &Option<AtomicBits>| noted.as_ref().is_some_and(|n| n.get(unit));
        if is_noted(&self.equal) {
            add(&self.counts.kept, range.end.saturating_sub(range.start));
            return Ok(());
        }
        if let Some(dirty) = &self.disk.dirty {
            // Before it is read: what changes from now on is sent again.
            dirty.take_range(range.clone());
        }
        let leaves = self.carried_leaves(&range)?;
        if leaves == 0 && self.ledger.is_none() {
            return Ok(());
        }
        let bytes = self.load(range.clone(), buffer)?;
        self.leaves(range.start, bytes, (leaves, is_noted(&self.differs)), out)
    }

    /// Which leaves of a unit travel: all that are held in part.
    fn carried_leaves(&self, unit: &Range<u64>) -> Result<Leaves> {
        let Carried::Above(above) = self.carried else { return Ok(ALL_LEAVES) };
        let mut leaves = 0;
        for held in held(above, unit.clone()) {
            let held = held?;
            leaves |= mask(held.start - unit.start, held.end - unit.start);
        }
        Ok(leaves)
    }

    /// Reads and hashes a unit.
    fn load<'b>(&self, range: Range<u64>, buffer: &'b mut Vec<u8>) -> Result<&'b [u8]> {
        let unit = range.start / UNIT_BYTES;
        let bytes = read(self.disk.source, range, buffer)?;
        if let Some(ledger) = &self.ledger {
            let node = unit_node(bytes);
            lock(ledger).set(unit, node)?;
        }
        Ok(bytes)
    }

    /// Sends leaves of the unit at byte `start`, which may have been sent before.
    fn leaves(
        &self,
        start: u64,
        bytes: &[u8],
        (leaves, is_again): (Leaves, bool),
        out: &Outlet<'_>,
    ) -> Result<()> {
        if !self.sends {
            return Ok(());
        }
        for (part, is_zero) in parts(bytes, leaves) {
            let at = start.saturating_add(part.start as u64);
            let part = bytes.get(part).unwrap_or_default();
            self.part(at, part, is_zero, out)?;
            if is_again && !is_zero {
                add(&self.counts.repeated, part.len() as u64);
            }
        }
        Ok(())
    }

    /// Sends neighbouring leaves that are alike.
    fn part(&self, at: u64, bytes: &[u8], is_zero: bool, out: &Outlet<'_>) -> Result<()> {
        let len = bytes.len() as u64;
        let (run, content, counter) = if is_zero {
            (Run::zeroes(self.disk.id, at, len), &[][..], &self.counts.zero)
        } else {
            (Run::data(self.disk.id, at, bytes), bytes, &self.counts.data)
        };
        let mut head = Vec::new();
        run.encode_body_head(&mut head);
        out.content(RUN, &head, content)?;
        add(counter, len);
        Ok(())
    }

    fn zeroes(&self, range: Range<u64>, out: &Outlet<'_>) -> Result<()> {
        if let Some(dirty) = &self.disk.dirty {
            // The disk may have changed since it said so: then this is sent again.
            dirty.take_range(range.clone());
            self.remark(dirty, range.clone())?;
        }
        let units = range.start / UNIT_BYTES..range.end.div_ceil(UNIT_BYTES);
        if let Some(ledger) = &self.ledger {
            lock(ledger).set_zeroes(units.clone())?;
        }
        if !self.sends {
            return Ok(());
        }
        if let Carried::Above(above) = self.carried {
            return held(above, range).try_for_each(|held| self.zero_run(held?, out));
        }
        let mut at = units.start;
        while at < units.end {
            // Not what was equal: the guest may have made it zero since.
            let known = self.zero.as_ref().and_then(|zero| zero.next_run(at, u64::MAX));
            let stop = known.as_ref().map_or(units.end, |run| run.start.min(units.end));
            if stop > at {
                self.zero_run(at * UNIT_BYTES..(stop * UNIT_BYTES).min(range.end), out)?;
            }
            at = known.map_or(units.end, |run| run.end.max(stop));
        }
        Ok(())
    }

    fn zero_run(&self, range: Range<u64>, out: &Outlet<'_>) -> Result<()> {
        let len = range.end.saturating_sub(range.start);
        let mut head = Vec::new();
        Run::zeroes(self.disk.id, range.start, len).encode_body_head(&mut head);
        out.content(RUN, &head, &[])?;
        add(&self.counts.zero, len);
        Ok(())
    }

    /// Marks what of a range that was taken as zero is not: the guest wrote between the walk that
    /// found it and now.
    fn remark(&self, dirty: &DirtySet, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let extent = self.disk.source.extent(at, range.end - at).map_err(Error::Source)?;
            let end = at.saturating_add(extent.len).min(range.end);
            if !extent.kind.reads_as_zero() {
                dirty.mark(at..end);
            }
            at = end;
        }
        Ok(())
    }

    /// Whether a unit reads as this node; noted, so that it is not sent if it does.
    pub(super) fn compare(&self, unit: u64, node: &Node, buffer: &mut Vec<u8>) -> Result<()> {
        let start = unit.saturating_mul(UNIT_BYTES);
        let range = start..start.saturating_add(UNIT_BYTES).min(self.size());
        if let Some(dirty) = &self.disk.dirty {
            dirty.take_range(range.clone());
        }
        let ours = unit_node(read(self.disk.source, range, buffer)?);
        let is_equal = ours == *node;
        let noted = if is_equal { &self.equal } else { &self.differs };
        if let Some(noted) = noted {
            noted.set_range(unit..unit.saturating_add(1));
        }
        if let (true, Some(ledger)) = (is_equal, &self.ledger) {
            lock(ledger).set(unit, ours)?;
        }
        Ok(())
    }

    /// The content hash, once everything was sent.
    pub(super) fn root(&self) -> Result<Option<ContentHash>> {
        self.ledger.as_ref().map(|ledger| lock(ledger).root()).transpose()
    }
}

/// The runs of leaves of a range, which begins with one, that a disk holds at least in part.
fn held(
    source: &dyn BlockSource,
    range: Range<u64>,
) -> impl Iterator<Item = Result<Range<u64>>> + '_ {
    let leaf = LEAF_BYTES as u64;
    let (mut at, mut run) = (range.start, None::<Range<u64>>);
    std::iter::from_fn(move || {
        while at < range.end {
            let found = source.extent(at, range.end - at).map_err(Error::Source);
            let extent = match found {
                Ok(extent) => extent,
                Err(error) => {
                    at = range.end;
                    return Some(Err(error));
                }
            };
            let end = at.saturating_add(extent.len.max(1)).min(range.end);
            let (start, stop) = (at / leaf * leaf, end.next_multiple_of(leaf).min(range.end));
            at = end;
            if extent.kind == ExtentKind::Hole {
                continue;
            }
            match &mut run {
                Some(run) if run.end >= start => run.end = stop,
                _ => {
                    if let Some(done) = run.replace(start..stop) {
                        return Some(Ok(done));
                    }
                }
            }
        }
        run.take().map(Ok)
    })
}

/// `T(4, i)` of a unit's bytes.
fn unit_node(bytes: &[u8]) -> Node {
    subtree(LEDGER_HEIGHT, bytes, &is_zero)
}

fn read<'b>(
    source: &dyn BlockSource,
    range: Range<u64>,
    buffer: &'b mut Vec<u8>,
) -> Result<&'b [u8]> {
    let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
    let bytes = on_page(buffer, len);
    source.read_at(bytes, range.start).map_err(Error::Source)?;
    Ok(bytes)
}

/// The wanted leaves of a unit as runs of leaves that are all zero, or all not.
fn parts(bytes: &[u8], leaves: Leaves) -> Vec<(Range<usize>, bool)> {
    let mut parts: Vec<(Range<usize>, bool)> = Vec::new();
    for (index, leaf) in bytes.chunks(LEAF_BYTES).enumerate() {
        if leaves.checked_shr(u32::try_from(index).unwrap_or(u32::MAX)).unwrap_or(0) & 1 == 0 {
            continue;
        }
        let (start, zero) = (index * LEAF_BYTES, is_zero(leaf));
        let end = start + leaf.len();
        match parts.last_mut() {
            Some((last, is_zero)) if last.end == start && *is_zero == zero => last.end = end,
            _ => parts.push((start..end, zero)),
        }
    }
    parts
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryDisk;

    #[test]
    fn leaves_that_are_held_in_part_are_held() {
        let leaf = LEAF_BYTES as u64;
        let mut disk = MemoryDisk::new(20 * leaf + 512);
        disk.fill(leaf + 512, 512, 1, ExtentKind::Data);
        disk.fill(2 * leaf, 512, 0, ExtentKind::Zero);
        disk.fill(5 * leaf - 512, 1024, 1, ExtentKind::Data);
        disk.fill(20 * leaf, 512, 0, ExtentKind::Zero);
        let found = |range: Range<u64>| held(&disk, range).collect::<Result<Vec<_>>>().unwrap();
        let size = 20 * leaf + 512;
        let expected = [leaf..3 * leaf, 4 * leaf..6 * leaf, 20 * leaf..size];
        assert_eq!(found(0..size), expected);
        assert_eq!(found(4 * leaf..5 * leaf), vec![4 * leaf..5 * leaf; 1]);
        assert!(found(6 * leaf..20 * leaf).is_empty());
    }

    #[test]
    fn leaves_that_are_alike_are_one_part() {
        let mut bytes = vec![0; 5 * LEAF_BYTES + 512];
        bytes[LEAF_BYTES] = 1;
        bytes[3 * LEAF_BYTES - 1] = 1;
        bytes[5 * LEAF_BYTES] = 1;
        let leaf = |n: usize| n * LEAF_BYTES;
        let expected = vec![
            (0..leaf(1), true),
            (leaf(1)..leaf(3), false),
            (leaf(3)..leaf(5), true),
            (leaf(5)..leaf(5) + 512, false),
        ];
        assert_eq!(parts(&bytes, ALL_LEAVES), expected);
        assert_eq!(parts(&bytes, 0b10_0010), [(leaf(1)..leaf(2), false), expected[3].clone()]);
        assert!(parts(&[], ALL_LEAVES).is_empty());
    }
}
