//! Disks on their way in: the content of section `block` (SPEC 6). The rules between records are
//! here; bitmaps, which travel in the same section, are not known.

mod coverage;
mod disk;
mod tally;
mod units;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use format_spec::content_hash::ContentHash;
use format_spec::native::answer::Answer;
use format_spec::native::block::{Content, Disk, DiskId, DiskSeal, Run};
use format_spec::native::units::{UnitNodes, ZeroUnits};
use mig_core::jobs::Jobs;
use mig_core::section::{AnswerWriter, Have};
use mig_core::stream::{Arrival, Result};

pub use self::disk::LoadCounts;
use self::disk::{Arriving, Rest};
pub use self::tally::Tally;
use crate::Landing;
use crate::error::Error;
use crate::ledger::UNIT_BYTES;

/// Most disks in one session. More than any machine type has slots for.
pub const MAX_DISKS: usize = 1024;

/// What is known of the disks of a session when it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Nothing is there: all must come.
    Nothing,
    /// Some of it may be there; the source is told what.
    Some,
    /// All of it is there, prepared in an earlier attempt: nothing comes.
    All,
}

/// A disk of which all has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealedDisk {
    /// Its number.
    pub id: DiskId,
    /// What the seal says of its content.
    pub hash: Option<ContentHash>,
    /// Whether the source wanted what is not sent to stay, and sent none of it.
    pub is_as_it_was: bool,
}

/// Receives disks.
pub struct LoadBlocks {
    known: Known,
    tally: Arc<Tally>,
    /// In the order of their numbers.
    disks: RwLock<BTreeMap<DiskId, Arc<Arriving>>>,
}

impl LoadBlocks {
    /// No disk yet.
    pub fn new(known: Known) -> Self {
        Self { known, tally: Arc::default(), disks: RwLock::default() }
    }

    /// Counts what comes there.
    pub fn counted_in(self, tally: Arc<Tally>) -> Self {
        Self { tally, ..self }
    }

    /// A disk is introduced; `land` finds its place. Tells the source what is there already.
    pub fn introduce(
        &self,
        disk: &Disk<'_>,
        at: &Arrival,
        answers: &dyn AnswerWriter,
        land: impl FnOnce() -> Result<Arc<dyn Landing>>,
    ) -> Result<()> {
        let is_known =
            |(id, known): (&DiskId, &Arc<Arriving>)| *id == disk.disk || known.name == disk.name;
        if self.read().len() >= MAX_DISKS || self.read().iter().any(is_known) {
            let reason = format!("disk {:?} comes twice, or too many do", disk.name);
            return Err(at.protocol(reason));
        }
        let landing = land()?;
        if landing.sink().size() < disk.size {
            let (source_bytes, sink_bytes) = (disk.size, landing.sink().size());
            return Err(Error::Size { source_bytes, sink_bytes }.into());
        }
        let rest = match disk.keeps_rest {
            true => Rest::Kept,
            false if self.known == Known::All => Rest::There,
            false => Rest::Comes,
        };
        let of = (disk.name, disk.size, rest);
        let arriving = Arc::new(Arriving::new(of, landing, Arc::clone(&self.tally)));
        if self.known == Known::Some {
            tell(disk.disk, &arriving, answers)?;
        }
        self.disks.write().unwrap_or_else(PoisonError::into_inner).insert(disk.disk, arriving);
        Ok(())
    }

    /// Name and guest-visible size in bytes of a disk that was introduced.
    pub fn facts(&self, disk: DiskId, at: &Arrival) -> Result<(String, u64)> {
        self.find(disk, at).map(|disk| (disk.name.clone(), disk.size))
    }

    /// The same of a disk that something new comes for: an error behind its seal.
    pub fn open_facts(&self, disk: DiskId, at: &Arrival) -> Result<(String, u64)> {
        let found = self.find(disk, at)?;
        if found.sealed().is_some() {
            let reason = format!("disk {:?} is sealed, and gets another bitmap", found.name);
            return Err(at.protocol(reason));
        }
        Ok((found.name.clone(), found.size))
    }

    /// Name of a disk; `None` for one that was not introduced.
    pub fn name(&self, disk: DiskId) -> Option<String> {
        self.read().get(&disk).map(|disk| disk.name.clone())
    }

    /// Content or zeroes: checked now, stored soon. `run` was decoded from `arrival`.
    pub fn run(&self, run: &Run<'_>, arrival: &Arrival) -> Result<Option<Store>> {
        let disk = self.find(run.disk, arrival)?;
        if self.known == Known::All && run.content != Content::None {
            return Err(arrival.protocol("content comes where all was prepared before"));
        }
        Ok(disk.admit(run, arrival)?.map(|placed| Store { disk, placed }))
    }

    /// A disk is complete.
    pub fn seal(&self, seal: &DiskSeal, at: &Arrival) -> Result<()> {
        self.find(seal.disk, at)?.seal(seal.hash, at)
    }

    /// A barrier: everything before it was stored. With `is_durable` it is made durable.
    pub fn barrier(&self, is_durable: bool) -> Result<()> {
        let disks: Vec<_> = self.read().values().cloned().collect();
        disks.iter().try_for_each(|disk| disk.barrier(is_durable))
    }

    /// All disks in the order of their numbers. `Err` with the name of one that was not sealed.
    pub fn sealed(&self) -> Result<Vec<SealedDisk>, String> {
        let disks = self.read();
        let seal = |(id, disk): (&DiskId, &Arc<Arriving>)| {
            let sealed = disk.sealed();
            let sealed =
                sealed.map(|(hash, is_as_it_was)| SealedDisk { id: *id, hash, is_as_it_was });
            sealed.ok_or_else(|| disk.name.clone())
        };
        disks.iter().map(seal).collect()
    }

    /// Names, sizes in bytes and counts, in the order of the numbers.
    pub fn counts(&self) -> Vec<(String, u64, Arc<LoadCounts>)> {
        let of = |disk: &Arc<Arriving>| (disk.name.clone(), disk.size, disk.counts.clone());
        self.read().values().map(of).collect()
    }

    fn find(&self, id: DiskId, at: &Arrival) -> Result<Arc<Arriving>> {
        let found = self.read().get(&id).cloned();
        found.ok_or_else(|| at.protocol(format!("disk {} was never introduced", id.0)))
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<DiskId, Arc<Arriving>>> {
        self.disks.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A run that was checked and is to be stored.
pub struct Store {
    disk: Arc<Arriving>,
    placed: disk::Placed,
}

impl Store {
    /// Stores it when a worker is free. `arrival` is what it was decoded from.
    pub fn put(self, arrival: Arrival, jobs: &Jobs) -> Result<()> {
        jobs.put(move || {
            let Self { disk, placed } = self;
            let Some(len) = placed.content_len else { return disk.store_zeroes(placed.range) };
            let body = arrival.record().body;
            let content = body.len().checked_sub(len).and_then(|start| body.get(start..));
            disk.store(placed.range, content.unwrap_or_default())
        })
    }
}

/// Tells the source which units are there. They count as come.
fn tell(id: DiskId, disk: &Arriving, answers: &dyn AnswerWriter) -> Result<()> {
    disk.landing.have(&mut |have| {
        let (first, count) = match &have {
            Have::Units(first, nodes) => (*first, nodes.len() as u64),
            Have::Zeroes(first, count) => (*first, *count),
        };
        let end = first.saturating_add(count);
        // Too many gaps: what is not told is sent again.
        if !disk.is_there(first.saturating_mul(UNIT_BYTES)..end.saturating_mul(UNIT_BYTES)) {
            return Ok(());
        }
        match have {
            Have::Units(first, nodes) => {
                answers.answer(&Answer::Have(id, UnitNodes { first, nodes: &nodes }))
            }
            Have::Zeroes(first, count) => {
                answers.answer(&Answer::HaveZeroes(id, ZeroUnits { first, count }))
            }
        }
    })?;
    answers.answer(&Answer::HaveDone(id))
}
