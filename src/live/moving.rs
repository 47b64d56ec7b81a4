//! One migration of a running guest to a QEMU: rounds while the guest runs, then what is left and
//! the bitmaps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bitmap_mig::live::JobError;
use block_mig::Monitor as _;
use block_mig::device::HeldSource;
use block_mig::limits::UNIT_BYTES;
use block_mig::plan::{Scope, Units};
use mig_core::block::BlockSource;
use mig_core::dirty::DirtySet;
use mig_core::guest::Guest as _;
use mig_core::meter::Meter;
use mig_core::section::Pending;
use mig_core::stream;

use super::builder::Outgoing;
use super::paused::Whole;
use super::qemu::{Parting, QemuTarget};
use super::steering::{Eye, Steering};
use crate::Error;
use crate::outgoing::{Next, Policy as _, Round};
use crate::qemu;
use crate::qemu::outgoing::blocks::{OutgoingDisk, Pass};
use crate::qemu::outgoing::chunks::{CHUNK, Chunk, Chunks};
use crate::qemu::outgoing::{Fingerprint, PlannedBitmap, Session, refuse_late};
use crate::qemu::peer::Peer;

/// What one disk cost.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sent {
    pub(super) data: u64,
    pub(super) zero: u64,
    /// Of `data`, what had been sent before.
    pub(super) repeated: u64,
}

/// A migration on its way.
pub(super) struct Moving<'m, 'o> {
    pub(super) outgoing: &'m Outgoing<'o>,
    pub(super) target: &'m QemuTarget,
    /// The bitmaps that the destination's monitor was asked about.
    pub(super) known: &'m [PlannedBitmap],
    pub(super) meter: &'m Meter,
    pub(super) eye: &'m Eye<'m>,
    pub(super) dirty: Vec<Arc<DirtySet>>,
    pub(super) sent: Vec<Sent>,
}

/// A bitmap that stays behind.
#[derive(Debug)]
pub(super) struct Left {
    /// Position of its disk.
    pub(super) disk: usize,
    /// Its name here.
    pub(super) name: String,
    /// Why.
    pub(super) reason: String,
}

impl Moving<'_, '_> {
    /// All of the stream. Bitmaps are announced when the guest is paused and no job changes them
    /// any more, for QEMU cannot be told of a change to what was announced.
    pub(super) fn run(
        mut self,
        (session, monitor): (&mut Session, Option<&mut Peer>),
        whole: &mut Whole<'_>,
        steering: &mut Steering<'_>,
    ) -> qemu::Result<Parting> {
        if self.target.blocks {
            session.start_blocks()?;
            self.rounds(session, whole, steering)?;
        }
        let paused = whole.pause();
        paused.map_err(|e| Error::from(stream::Error::handler(format_spec::Blame::Device, e)))?;
        if self.target.blocks {
            self.changes(session)?;
            session.end_blocks()?;
        }
        let (bitmaps, left) = self.bitmaps(monitor);
        let prints = self.end_bitmaps(session, &bitmaps)?;
        if self.eye.is_cancelled() {
            return Err(qemu::Error::Interrupted);
        }
        let ending = session.finish()?;
        Ok(Parting { ending, bitmaps, left, prints, sent: self.sent })
    }

    /// The bitmaps as they are now; those that QEMU cannot take, and why.
    fn bitmaps(&self, monitor: Option<&mut Peer>) -> (Vec<PlannedBitmap>, Vec<Left>) {
        let (mut bitmaps, mut left) = self.outgoing.bitmaps_to_qemu();
        let place = |bitmap: &PlannedBitmap| (bitmap.disk, bitmap.wire.name.clone());
        let is_known =
            |bitmap: &PlannedBitmap| self.known.iter().any(|k| place(k) == place(bitmap));
        if let Some(monitor) = monitor {
            let observer = self.outgoing.observer;
            let refused = refuse_late(&mut bitmaps, is_known, monitor, observer);
            left.extend(refused.into_iter().map(|(bitmap, reason)| Left {
                disk: bitmap.disk,
                name: bitmap.source_name,
                reason,
            }));
        }
        (bitmaps, left)
    }

    fn end_bitmaps(
        &self,
        session: &mut Session,
        bitmaps: &[PlannedBitmap],
    ) -> qemu::Result<Vec<Fingerprint>> {
        if bitmaps.is_empty() {
            return Ok(Vec::new());
        }
        let wire: Vec<_> = bitmaps.iter().map(|bitmap| bitmap.wire.clone()).collect();
        session.start_bitmaps(&wire)?;
        let mut prints = Vec::new();
        session.end_bitmaps(&wire, |index| {
            let (bits, print) = self.bits(bitmaps.get(index))?;
            prints.push(print);
            Ok(bits)
        })?;
        Ok(prints)
    }

    /// All of it, then what changes, while the guest runs.
    fn rounds(
        &mut self,
        session: &mut Session,
        whole: &mut Whole<'_>,
        steering: &mut Steering<'_>,
    ) -> qemu::Result<()> {
        for number in 1.. {
            let (begun, written) = (Instant::now(), session.wire_bytes());
            if number == 1 {
                self.bulk(session)?
            } else {
                self.changes(session)?
            }
            let took = begun.elapsed();
            let round = Round {
                number,
                took,
                sending: took,
                wire_bytes: session.wire_bytes().saturating_sub(written),
                // QEMU does not say when it has taken something.
                settling: Duration::ZERO,
                round_trip: Duration::ZERO,
                pending: Pending { must_precopy: self.left(), ..Pending::default() },
            };
            match steering.next(&round) {
                Next::Round => {}
                Next::Throttle(percent) => whole.throttle(percent),
                Next::Complete => break,
                Next::GiveUp => return Err(qemu::Error::Interrupted),
            }
        }
        Ok(())
    }

    /// Bytes that have to be sent again: one unit that changed takes a chunk with it.
    fn left(&self) -> u64 {
        let of_disk = |dirty: &Arc<DirtySet>| {
            let (mut at, mut chunks) = (0, 0u64);
            while let Some(unit) = dirty.first_dirty(at) {
                at = (unit.start / CHUNK).saturating_add(1).saturating_mul(CHUNK);
                chunks = chunks.saturating_add(1);
            }
            chunks.saturating_mul(CHUNK)
        };
        self.dirty.iter().map(of_disk).fold(0, u64::saturating_add)
    }

    fn bulk(&mut self, session: &mut Session) -> qemu::Result<()> {
        for (index, live) in self.outgoing.disks.iter().enumerate() {
            let held = HeldSource(&*live.disk);
            let (source, scope): (&dyn BlockSource, _) = match live.scope(self.outgoing.shared_base)
            {
                Scope::Above => (&held, Scope::Above),
                Scope::Whole => (&*live.disk, Scope::Whole),
            };
            let units = Units::new(source, scope, UNIT_BYTES);
            self.send(session, index, Chunks::new(units, live.disk.size()), false)?;
        }
        Ok(())
    }

    fn changes(&mut self, session: &mut Session) -> qemu::Result<()> {
        for index in 0..self.dirty.len() {
            let Some(dirty) = self.dirty.get(index).cloned() else { continue };
            if dirty.dirty_bytes() > 0 {
                self.send(session, index, Changed { dirty: &dirty, at: 0 }, true)?;
            }
        }
        Ok(())
    }

    fn send(
        &mut self,
        session: &mut Session,
        index: usize,
        chunks: impl Iterator<Item = block_mig::Result<Chunk>>,
        is_again: bool,
    ) -> qemu::Result<()> {
        let (Some(live), Some(sent)) = (self.outgoing.disks.get(index), self.sent.get_mut(index))
        else {
            return Ok(());
        };
        let disk = OutgoingDisk { name: &live.name, source: &*live.disk, tree: None };
        let (workers, meter) = (self.outgoing.workers, self.meter);
        let pass = Pass { workers, monitor: self.eye, meter, total: live.disk.size() };
        let done = session.blocks(&disk, chunks, &pass)?;
        sent.data = sent.data.saturating_add(done.data);
        if is_again {
            sent.repeated = sent.repeated.saturating_add(done.data);
        } else {
            sent.zero = sent.zero.saturating_add(done.zero);
        }
        Ok(())
    }

    /// The bits of a bitmap, the guest being paused.
    fn bits(
        &self,
        bitmap: Option<&PlannedBitmap>,
    ) -> qemu::Result<(qcow2_file::bitmaps::Bits, Fingerprint)> {
        let gone = || Error::Usage { reason: "a bitmap went away while it was sent".to_owned() };
        let bitmap = bitmap.ok_or_else(gone)?;
        let live = self.outgoing.disks.get(bitmap.disk).ok_or_else(gone)?;
        let unusable = |error: JobError| Error::Usage { reason: error.to_string() };
        let bits = live.bitmaps.snapshot(&bitmap.source_name).map_err(unusable)?;
        let print = Fingerprint::of(&bits, bitmap.wire.granularity.into());
        Ok((bits, print))
    }
}

/// The chunks with something that changed, in order. Each is taken before it is handed out, and
/// thus before it is read: what changes afterwards is found by the next sweep.
struct Changed<'a> {
    dirty: &'a DirtySet,
    at: u64,
}

impl Iterator for Changed<'_> {
    type Item = block_mig::Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        let unit = self.dirty.take(self.at, self.dirty.unit_bytes())?;
        let offset = unit.start / CHUNK * CHUNK;
        self.at = offset.saturating_add(CHUNK);
        self.dirty.take_range(offset..self.at.min(self.dirty.size()));
        Some(Ok(Chunk { offset, is_zero: false }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_anywhere_sends_its_chunk_once() {
        let size = 5 * CHUNK + 512;
        let dirty = DirtySet::new(size, 16);
        let sweep = || {
            let changed = Changed { dirty: &dirty, at: 0 };
            changed.map(|chunk| chunk.unwrap().offset / CHUNK).collect::<Vec<u64>>()
        };
        assert_eq!(sweep(), Vec::<u64>::new());
        for range in [0..512, CHUNK - 512..CHUNK + 512, 3 * CHUNK..4 * CHUNK, size - 512..size] {
            dirty.mark(range);
        }
        assert_eq!(sweep(), [0, 1, 3, 5]);
        assert_eq!((sweep(), dirty.dirty_bytes()), (Vec::new(), 0));
        dirty.mark(2 * CHUNK - 1..2 * CHUNK);
        assert_eq!(sweep(), [1]);
    }
}
