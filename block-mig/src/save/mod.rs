//! Disks on their way out: the content of section `block` (SPEC 6).
//!
//! A disk is sent in passes. The first one, *bulk*, walks over all of it; each later one sweeps up
//! what the guest changed meanwhile. What is sent is read, hashed as a whole unit of 1 MiB, and
//! written from where it lies. Bitmaps travel in the same section and are not known here.

mod disk;
mod walk;

use std::collections::BTreeMap;
use std::sync::Arc;

use format_spec::content_hash::Node;
use format_spec::native::answer::Ready;
use format_spec::native::block::{self, BlockRecord, Disk, DiskContent, DiskId, DiskSeal};
use mig_core::block::BlockSource;
use mig_core::channels::Outlet;
use mig_core::dirty::AtomicBits;
use mig_core::section::{Have, HaveReader, Pass, Pending, SaveHandler, SectionKey, Stage, Start};
use mig_core::stream;

use self::disk::{Carried, Saved};
pub use self::disk::{SaveCounts, SaveDisk};
use self::walk::{Sweep, Walk, Work};
use crate::error::{Error, Result};
use crate::ledger::UNIT_BYTES;
use crate::monitor::Monitor;
use crate::pool::Pool;

/// The section of disks and their bitmaps.
pub const SECTION: SectionKey =
    SectionKey { name: block::SECTION, instance: 0, version: block::SECTION_VERSION };

/// How disks are sent.
#[derive(Clone, Copy)]
pub struct SaveOptions<'a> {
    /// Whether content is hashed, so that the destination can be held against it.
    pub hashes: bool,
    /// Worker threads: they read, hash and write.
    pub workers: usize,
    /// Who watches.
    pub monitor: &'a dyn Monitor,
}

/// Sends disks.
pub struct SaveBlocks<'a> {
    disks: Vec<Saved<'a>>,
    options: SaveOptions<'a>,
    place: Place,
    /// Bytes of content of disks of which that is known.
    content: BTreeMap<DiskId, u64>,
}

/// Where the current pass stands: which disk, and where on it.
#[derive(Debug)]
enum Place {
    Bulk(usize, Walk),
    Sweep(usize, Sweep),
    /// A pass is done; the next one needs a barrier before it.
    BehindPass,
}

impl<'a> SaveBlocks<'a> {
    /// Sends `disks`, whose numbers are different.
    pub fn new(disks: Vec<SaveDisk<'a>>, options: SaveOptions<'a>) -> Result<Self> {
        Self::carrying(disks.into_iter().map(|disk| (disk, Carried::Whole)), options)
    }

    /// Introduces `disks` for the sake of their bitmaps: the destination has their content by
    /// another way. None of it is read, sent or hashed, and a destination that does not have a disk
    /// of that size already refuses it.
    pub fn without_content(disks: Vec<SaveDisk<'a>>, options: SaveOptions<'a>) -> Result<Self> {
        Self::carrying(disks.into_iter().map(|disk| (disk, Carried::Nothing)), options)
    }

    /// Sends of each disk that comes with a second source what that one holds: what it calls a hole
    /// the destination has below a new image of its own. All of the disk is read all the same where
    /// it is hashed. Disks without a second source are sent whole.
    pub fn above(
        disks: Vec<(SaveDisk<'a>, Option<&'a dyn BlockSource>)>,
        options: SaveOptions<'a>,
    ) -> Result<Self> {
        let carried = |above: Option<_>| above.map_or(Carried::Whole, Carried::Above);
        Self::carrying(disks.into_iter().map(|(disk, above)| (disk, carried(above))), options)
    }

    fn carrying(
        disks: impl Iterator<Item = (SaveDisk<'a>, Carried<'a>)>,
        options: SaveOptions<'a>,
    ) -> Result<Self> {
        let saved = disks.map(|(disk, carried)| Saved::new(disk, carried, options.hashes));
        let disks = saved.collect::<Result<_>>()?;
        let place = Place::Bulk(0, Walk::default());
        Ok(Self { disks, options, place, content: BTreeMap::new() })
    }

    /// Says of a disk how many bytes of content it will send, as far as its maps tell, so that a
    /// destination without room can refuse it before they come.
    pub fn telling(mut self, disk: DiskId, content: u64) -> Self {
        self.content.insert(disk, content);
        self
    }

    /// What was sent of each disk, now and later.
    pub fn counts(&self) -> Vec<Arc<SaveCounts>> {
        self.disks.iter().map(|saved| saved.counts.clone()).collect()
    }

    /// Sends about `budget` bytes of the pass.
    fn advance(&mut self, out: &Outlet<'_>, budget: u64) -> Result<Pass> {
        let Self { disks, options, place, .. } = self;
        let pool = Pool { workers: options.workers, monitor: options.monitor };
        let disks = disks.as_slice();
        let mut left = budget;
        let works = std::iter::from_fn(|| {
            if left == 0 {
                return None;
            }
            let next = place.next(disks).transpose()?;
            if let Ok((_, work)) = &next {
                left = left.saturating_sub(work.cost());
            }
            Some(next)
        });
        let send = |buffer: &mut Vec<u8>, (saved, work): (&Saved<'_>, Work)| {
            saved.send(&work, buffer, out)?;
            options.monitor.advance(work.cost());
            Ok(())
        };
        pool.run(works, Vec::new, send)?;
        Ok(if matches!(place, Place::BehindPass) { Pass::Done } else { Pass::Open })
    }

    /// Asks what the destination has of each disk and compares it with what is here.
    fn compare(&mut self, have: &mut dyn HaveReader) -> Result<()> {
        let Self { disks, options, .. } = self;
        let pool = Pool { workers: options.workers, monitor: options.monitor };
        for saved in disks {
            let units = if saved.has_content() { saved.size().div_ceil(UNIT_BYTES) } else { 0 };
            saved.equal = Some(AtomicBits::new(units));
            saved.zero = Some(AtomicBits::new(units));
            saved.differs = Some(AtomicBits::new(units));
            let saved = &*saved;
            let told = Told { have, saved, run: None, next: 0, units };
            pool.run(told, Vec::new, |buffer: &mut Vec<u8>, (unit, node)| {
                saved.compare(unit, &node, buffer)
            })?;
        }
        Ok(())
    }

    fn seal(&self, out: &Outlet<'_>) -> Result<()> {
        for saved in &self.disks {
            let hash = saved.root()?;
            if let Some(root) = hash {
                // Sealed twice means the same content twice.
                let _ = saved.counts.root.set(root);
            }
            let seal = BlockRecord::DiskSeal(DiskSeal { disk: saved.disk.id, hash });
            out.record(|bytes| seal.encode(bytes))?;
        }
        Ok(())
    }
}

impl Place {
    /// The next work of the pass; `None` when it is done.
    fn next<'s, 'a>(&mut self, disks: &'s [Saved<'a>]) -> Result<Option<(&'s Saved<'a>, Work)>> {
        loop {
            let (index, work) = match self {
                Self::BehindPass => return Ok(None),
                Self::Bulk(index, walk) => {
                    let Some(saved) = disks.get(*index) else {
                        *self = Self::BehindPass;
                        continue;
                    };
                    let is_walked = saved.has_content();
                    (*index, if is_walked { walk.next(saved.disk.source)? } else { None })
                }
                Self::Sweep(index, sweep) => {
                    let Some(saved) = disks.get(*index) else {
                        *self = Self::BehindPass;
                        continue;
                    };
                    (*index, saved.disk.dirty.as_ref().and_then(|dirty| sweep.next(dirty)))
                }
            };
            match (work, disks.get(index), &self) {
                (Some(work), Some(saved), _) => return Ok(Some((saved, work))),
                (_, _, Self::Sweep(..)) => *self = Self::Sweep(index + 1, Sweep::default()),
                _ => *self = Self::Bulk(index + 1, Walk::default()),
            }
        }
    }
}

impl SaveHandler for SaveBlocks<'_> {
    fn section(&self) -> SectionKey {
        SECTION
    }

    fn setup(&mut self, out: &Outlet<'_>) -> stream::Result<()> {
        for saved in &self.disks {
            let (disk, size, name) = (saved.disk.id, saved.size(), saved.disk.name.as_str());
            // Else all of it is sent, or told by HAVE: no older content is to stay unseen.
            let keeps_rest = !matches!(saved.carried, Carried::Whole);
            let record = BlockRecord::Disk(Disk { disk, keeps_rest, size, name });
            out.record(|bytes| record.encode(bytes))?;
            if let Some(bytes) = self.content.get(&disk).copied() {
                let record = BlockRecord::DiskContent(DiskContent { disk, bytes });
                out.record(|bytes| record.encode(bytes))?;
            }
        }
        Ok(())
    }

    fn begin(&mut self, start: &mut Start<'_>, _out: &Outlet<'_>) -> stream::Result<()> {
        match start {
            Start::Fresh => Ok(()),
            Start::Resumable(have) => Ok(self.compare(*have)?),
            Start::Ready => {
                self.disks.iter_mut().for_each(|saved| saved.sends = false);
                Ok(())
            }
        }
    }

    fn iterate(&mut self, out: &Outlet<'_>, budget: u64) -> stream::Result<Pass> {
        Ok(self.advance(out, budget)?)
    }

    fn pending(&self) -> Pending {
        let dirty = |saved: &Saved<'_>| saved.disk.dirty.as_ref().map_or(0, |d| d.dirty_bytes());
        let mut pending = Pending::default();
        let moved = self.disks.iter().enumerate().filter(|(_, saved)| saved.has_content());
        for (index, saved) in moved {
            let bulk = match &self.place {
                Place::Bulk(at, walk) if *at == index => walk.left(saved.size()),
                Place::Bulk(at, _) if *at < index => saved.size(),
                _ => 0,
            };
            let must_precopy = bulk.saturating_add(dirty(saved));
            pending = pending + Pending { must_precopy, ..Pending::default() };
        }
        pending.has_bulk = matches!(self.place, Place::Bulk(..)) && !self.disks.is_empty();
        pending
    }

    fn complete(&mut self, stage: Stage, out: &Outlet<'_>) -> stream::Result<()> {
        match stage {
            Stage::Content => self.advance(out, u64::MAX).map(|_| ())?,
            Stage::Seal => self.seal(out)?,
        }
        Ok(())
    }

    fn expect(&self, ready: &mut Ready) {
        for saved in &self.disks {
            let root = saved.counts.root.get();
            ready.disks.extend(root.map(|root| (saved.disk.id, *root)));
        }
    }

    fn disk_name(&self, disk: DiskId) -> Option<String> {
        let found = self.disks.iter().find(|saved| saved.disk.id == disk);
        found.map(|saved| saved.disk.name.clone())
    }

    fn barrier(&mut self) {
        if matches!(self.place, Place::BehindPass) {
            self.place = Place::Sweep(0, Sweep::default());
        }
    }

    fn acknowledged(&mut self) {
        let dirty = self.disks.iter().filter_map(|saved| saved.disk.dirty.as_ref());
        dirty.for_each(|dirty| dirty.acknowledged());
    }

    fn abort(&mut self) {
        let dirty = self.disks.iter().filter_map(|saved| saved.disk.dirty.as_ref());
        dirty.for_each(|dirty| dirty.give_back());
    }
}

/// The units that the destination has, one by one, with their nodes.
struct Told<'t, 'a> {
    have: &'t mut dyn HaveReader,
    saved: &'t Saved<'a>,
    run: Option<(u64, std::vec::IntoIter<Node>)>,
    /// What was told so far is below this: each unit is looked at once, whatever the peer says.
    next: u64,
    units: u64,
}

impl Told<'_, '_> {
    fn next_unit(&mut self) -> Result<Option<(u64, Node)>> {
        loop {
            if let Some((unit, nodes)) = &mut self.run {
                if let Some(node) = nodes.next() {
                    let at = *unit;
                    *unit = at.saturating_add(1);
                    return Ok(Some((at, node)));
                }
                self.run = None;
            }
            match self.have.next(self.saved.disk.id)? {
                None => return Ok(None),
                Some(Have::Units(first, nodes)) => {
                    self.rises(first, nodes.len() as u64)?;
                    self.run = Some((first, nodes.into_iter()));
                }
                Some(Have::Zeroes(first, count)) => {
                    self.rises(first, count)?;
                    self.zeroes(first, count)?;
                }
            }
        }
    }

    /// Units are told in rising order, and are those of the disk.
    fn rises(&mut self, first: u64, count: u64) -> Result<()> {
        let end = first.checked_add(count).filter(|end| *end <= self.units);
        match end {
            Some(end) if first >= self.next => {
                self.next = end;
                Ok(())
            }
            _ => {
                let (disk, units) = (self.saved.disk.id.0, self.units);
                let reason = format!(
                    "it has {count} units of disk {disk} from {first} on, which has {units}, \
                     behind those up to {}",
                    self.next
                );
                Err(stream::Error::protocol(0, 0, reason).into())
            }
        }
    }

    /// Units that the destination has as zeroes, held against what the disk says here without
    /// reading them. Others are sent.
    fn zeroes(&mut self, first: u64, count: u64) -> Result<()> {
        let size = self.saved.size();
        let end = first.saturating_add(count).min(self.units);
        let mut at = first.saturating_mul(UNIT_BYTES);
        let stop = end.saturating_mul(UNIT_BYTES).min(size);
        while at < stop {
            let extent = self.saved.disk.source.extent(at, stop - at).map_err(Error::Source)?;
            let extent_end = at.saturating_add(extent.len).min(stop);
            if extent.kind.reads_as_zero() {
                let last = if extent_end == size { self.units } else { extent_end / UNIT_BYTES };
                let units = at.div_ceil(UNIT_BYTES)..last;
                if let (Some(zero), true) = (&self.saved.zero, units.start < units.end) {
                    zero.set_range(units);
                }
            }
            at = extent_end;
        }
        Ok(())
    }
}

impl Iterator for Told<'_, '_> {
    type Item = Result<(u64, Node)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_unit().transpose()
    }
}
