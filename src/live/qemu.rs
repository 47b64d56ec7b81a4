//! A guest that runs here and is to go on at a stock QEMU, which waits with `-incoming`: its disks
//! while it writes to them, and their bitmaps.
//!
//! QEMU's stream has no barriers and no answers on the way, no connection is made again, and
//! bitmaps are named once and sent whole while the guest is paused. From the end of the stream on
//! only the destination's own word proves that it did not take over.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bitmap_mig::live::JobError;
use block_mig::Monitor as _;
use block_mig::device::HeldSource;
use block_mig::limits::UNIT_BYTES;
use block_mig::plan::{Scope, Units};
use mig_core::block::BlockSource;
use mig_core::dirty::DirtySet;
use mig_core::guest::Guest;
use mig_core::heart::Heart;
use mig_core::meter::Meter;
use mig_core::section::Pending;
use mig_core::stream;
use mig_core::transport::Connection;

use super::builder::{LiveDisk, Outgoing};
use super::paused::Whole;
use super::run::LOOK_INTERVAL;
use super::steering::{Eye, Steering, millis};
use crate::observe::Progress;
use crate::outgoing::{Next, Policy as _, Round};
use crate::qemu::outgoing::bitmaps::OutgoingBitmap;
use crate::qemu::outgoing::blocks::{OutgoingDisk, Pass};
use crate::qemu::outgoing::chunks::{CHUNK, Chunk, Chunks};
use crate::qemu::outgoing::{
    Ending, Fingerprint, Greeting, Outcome, PlannedBitmap, Session, carried, conclude, each,
    explain, peer, preflight,
};
use crate::qemu::{self, Version};
use crate::report::{BitmapOutcome, BitmapReport, DiskReport, ONLY_BITMAPS, Report, Verified};
use crate::send::BELOW;
use crate::status::{Amounts, Status};
use crate::{Error, Phase, Result, report};

/// The QEMU that is to go on with the guest.
#[derive(Debug, Clone)]
pub struct QemuTarget {
    /// What it takes; see [`Version::decide`].
    pub version: Version,
    /// Its machine type; an empty one fits every destination.
    pub machine: String,
    /// The machine's UUID.
    pub uuid: Option<[u8; 16]>,
    /// Carry the disks' contents: only to a QEMU up to 9.0. Without, bitmaps alone.
    pub blocks: bool,
    /// Its monitor, to ask beforehand what it would die of, and afterwards what it has.
    pub peer_qmp: Option<PathBuf>,
}

/// What one disk cost.
#[derive(Debug, Clone, Copy, Default)]
struct Sent {
    data: u64,
    zero: u64,
    /// Of `data`, what had been sent before.
    repeated: u64,
}

/// A migration on its way.
struct Moving<'m> {
    disks: &'m [LiveDisk],
    workers: usize,
    target: &'m QemuTarget,
    shares_base: bool,
    bitmaps: &'m [PlannedBitmap],
    meter: &'m Meter,
    eye: &'m Eye<'m>,
    dirty: Vec<Arc<DirtySet>>,
    sent: Vec<Sent>,
}

impl Outgoing<'_> {
    /// Migrates `guest`, which runs, to a QEMU that `connect` reaches. An error means that it goes
    /// on here. A status `unknown` means that nobody can tell where it goes on: it stays paused.
    /// Otherwise its disks are [retired](block_mig::TrackedDisk::retire).
    ///
    /// One connection, plain, made once; only bitmaps that are there when it begins go along.
    pub fn run_to_qemu(
        &self,
        connect: impl FnOnce() -> io::Result<Connection>,
        target: &QemuTarget,
        guest: &mut dyn Guest,
    ) -> Result<Report> {
        let started = Instant::now();
        self.refuse_to_qemu(target)?;
        let bitmaps = self.bitmaps_to_qemu()?;
        let mut monitor =
            peer(target.peer_qmp.as_deref(), target.blocks.then_some(target.version))?;
        if let Some(monitor) = &mut monitor {
            let disks = self.disks.iter().filter(|_| target.blocks);
            let disks: Vec<_> = disks.map(|d| (d.name.as_str(), d.disk.size())).collect();
            preflight((&disks, &bitmaps), monitor, self.observer)?;
        }
        self.migration.update(|info| {
            info.status = Status::Setup;
            let total = self.disks.iter().map(|disk| disk.disk.size()).sum();
            info.disk = Some(Amounts { total, remaining: total, ..Amounts::default() });
        });
        let greeting =
            Greeting { machine: target.machine.clone(), uuid: target.uuid, is_one_way: false };
        let connection = connect().map_err(stream::Error::Connect)?;
        let mut session = Session::open(connection, &greeting).map_err(Error::from)?;
        let mut whole =
            Whole { guest, disks: &self.disks, migration: &self.migration, since: None };
        let mut steering = Steering::new(&self.migration, self.limits);
        let ended = self
            .stream_to_qemu((&mut session, target), &bitmaps, &mut whole, &mut steering)
            .map_err(|error| explain(monitor.as_mut(), &mut session, error))
            .and_then(|(ending, prints, sent)| {
                let sent_bitmaps = (&*bitmaps, &*prints);
                let outcome = conclude(monitor.as_mut(), sent_bitmaps, ending, self.observer)?;
                Ok((outcome, sent))
            });
        let wire_bytes = session.wire_bytes();
        // An unfinished stream is a failure at the other end, before anything goes on here.
        drop(session);
        whole.throttle(0);
        match ended {
            Ok((outcome, sent)) => {
                let times = (started, whole.since);
                if outcome.status == report::Status::Completed {
                    whole.retire();
                    self.migration.update(|info| info.status = Status::Completed);
                } else {
                    self.migration.update(|info| info.error_desc.clone_from(&outcome.error));
                }
                Ok(self.report_to_qemu(&bitmaps, (&outcome, &sent), times, wire_bytes))
            }
            Err(error) => {
                if whole.since.is_some()
                    && let Err(error) = whole.resume()
                {
                    tracing::error!(%error, "the guest stays paused");
                }
                Err(self.note_failure(Error::from(error).into(), steering.reason))
            }
        }
    }

    /// What QEMU's stream does not have is refused, not left out.
    fn refuse_to_qemu(&self, target: &QemuTarget) -> Result<()> {
        let given = [
            (self.channels > 1, "several connections"),
            (self.compression.is_some(), "compression"),
            (!self.states.is_empty(), "state beside the disks"),
            (!self.reconnect.is_zero(), "connecting again"),
            (target.blocks && !self.blocks, "the contents that no_blocks leaves out"),
            (!target.blocks && self.shared_base, "contents, and then nothing stands above a base"),
        ];
        if let Some((_, what)) = given.iter().find(|(is_given, _)| *is_given) {
            let reason = format!("disks and bitmaps go to a QEMU without {what}");
            return Err(Error::Usage { reason });
        }
        let small = self.disks.iter().find(|disk| disk.disk.size() < CHUNK);
        match small.filter(|_| target.blocks) {
            Some(disk) => Err(Error::Usage {
                reason: format!(
                    "disk {:?} has less than {CHUNK} bytes: a QEMU dies of its content",
                    disk.name
                ),
            }),
            None => Ok(()),
        }
    }

    /// The bitmaps that go along, disk by disk.
    fn bitmaps_to_qemu(&self) -> Result<Vec<PlannedBitmap>> {
        let mut planned = Vec::new();
        for (disk, live) in self.disks.iter().enumerate() {
            for info in live.bitmaps.all() {
                let Some(name) = (self.choose)(&info) else { continue };
                let granularity = u32::try_from(info.granularity).unwrap_or(0);
                if granularity == 0 || !(1..=255).contains(&name.len()) {
                    let reason = format!("a QEMU aborts on bitmap {name:?} of {:?}", live.name);
                    return Err(Error::Usage { reason });
                }
                let wire = OutgoingBitmap {
                    device: live.name.clone(),
                    name,
                    disk_size: live.disk.size(),
                    granularity,
                    is_enabled: info.is_enabled,
                    is_persistent: info.is_persistent,
                };
                planned.push(PlannedBitmap { disk, source_name: info.name, wire });
            }
        }
        Ok(planned)
    }

    /// Everything up to the end of the stream and what is said of it.
    fn stream_to_qemu(
        &self,
        (session, target): (&mut Session, &QemuTarget),
        bitmaps: &[PlannedBitmap],
        whole: &mut Whole<'_>,
        steering: &mut Steering<'_>,
    ) -> qemu::Result<(Ending, Vec<Fingerprint>, Vec<Sent>)> {
        let meter = Meter::default();
        let total = if target.blocks { self.content(self.shared_base)? } else { 0 };
        let progress = Progress::begin(self.observer, Phase::Transfer, total);
        let watched = (self.observer, &progress);
        let eye = Eye::new(&self.migration, &meter, steering.deadline(), watched);
        let dirty = self.disks.iter().map(|live| live.disk.start_tracking());
        let dirty = dirty.collect::<mig_core::Result<Vec<_>>>().map_err(Error::from)?;
        let mut moving = Moving {
            disks: &self.disks,
            workers: self.workers,
            target,
            shares_base: self.shared_base,
            bitmaps,
            meter: &meter,
            eye: &eye,
            dirty,
            sent: vec![Sent::default(); self.disks.len()],
        };
        self.migration.enter(Status::Active);
        let watch = Heart::new();
        let streamed = std::thread::scope(|scope| {
            scope.spawn(|| watch.run(LOOK_INTERVAL, || eye.steer_meter()));
            let _stopping = watch.stop_on_drop();
            moving.run(session, whole, steering)
        });
        let (ending, prints) = streamed?;
        Ok((ending, prints, moving.sent))
    }

    fn report_to_qemu(
        &self,
        bitmaps: &[PlannedBitmap],
        (outcome, sent): (&Outcome, &[Sent]),
        (started, paused): (Instant, Option<Instant>),
        wire_bytes: u64,
    ) -> Report {
        let mut verdicts = each(&outcome.verdicts, bitmaps.len());
        let disks = self.disks.iter().zip(sent).enumerate().map(|(index, (live, sent))| {
            let of_disk = bitmaps.iter().filter(|bitmap| bitmap.disk == index);
            let reports = of_disk.map(|bitmap| {
                let (old, new) = (&bitmap.source_name, &bitmap.wire.name);
                carried(old, new, verdicts.next())
            });
            let mut report = disk_report(live, sent, reports.collect());
            let is_above = live.scope(self.shared_base) == Scope::Above;
            report.not_carried.extend(is_above.then(|| BELOW.to_owned()));
            report
        });
        Report {
            status: outcome.status,
            error: outcome.error.clone(),
            total_time_ms: millis(started.elapsed()),
            downtime_ms: paused.map(|since| millis(since.elapsed())),
            wire_bytes,
            repeated_bytes: sent.iter().map(|sent| sent.repeated).sum(),
            resumed: false,
            disks: disks.collect(),
            ram: None,
        }
    }
}

/// A monitor can confirm bitmaps, not contents.
fn disk_report(live: &LiveDisk, sent: &Sent, bitmaps: Vec<BitmapReport>) -> DiskReport {
    let is_there = |bitmap: &BitmapReport| bitmap.outcome == BitmapOutcome::Preserved;
    let has_content = sent.data + sent.zero > 0;
    let is_confirmed = !has_content && !bitmaps.is_empty() && bitmaps.iter().all(is_there);
    DiskReport {
        id: live.name.clone(),
        bytes_data: sent.data.saturating_sub(sent.repeated),
        bytes_zero: sent.zero,
        content_hash: None,
        // The bitmaps are, and nobody looked at the content.
        verified: if is_confirmed { Verified::No } else { Verified::Unconfirmed },
        not_carried: (!has_content).then(|| ONLY_BITMAPS.to_owned()).into_iter().collect(),
        bitmaps,
    }
}

impl Moving<'_> {
    fn run(
        &mut self,
        session: &mut Session,
        whole: &mut Whole<'_>,
        steering: &mut Steering<'_>,
    ) -> qemu::Result<(Ending, Vec<Fingerprint>)> {
        let wire: Vec<_> = self.bitmaps.iter().map(|bitmap| bitmap.wire.clone()).collect();
        if self.target.blocks {
            session.start_blocks()?;
        }
        if !wire.is_empty() {
            session.start_bitmaps(&wire)?;
        }
        if self.target.blocks {
            self.rounds(session, whole, steering)?;
        }
        let paused = whole.pause();
        paused.map_err(|e| Error::from(stream::Error::handler(format_spec::Blame::Device, e)))?;
        if self.target.blocks {
            self.changes(session)?;
            session.end_blocks()?;
        }
        let mut prints = Vec::new();
        if !wire.is_empty() {
            session.end_bitmaps(&wire, |index| {
                let (bits, print) = self.bits(index)?;
                prints.push(print);
                Ok(bits)
            })?;
        }
        if self.eye.is_cancelled() {
            return Err(qemu::Error::Interrupted);
        }
        Ok((session.finish()?, prints))
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
        for (index, live) in self.disks.iter().enumerate() {
            let held = HeldSource(&*live.disk);
            let (source, scope): (&dyn BlockSource, _) = match live.scope(self.shares_base) {
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
        let (Some(live), Some(sent)) = (self.disks.get(index), self.sent.get_mut(index)) else {
            return Ok(());
        };
        let disk = OutgoingDisk { name: &live.name, source: &*live.disk, tree: None };
        let (workers, meter) = (self.workers, self.meter);
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
    fn bits(&self, index: usize) -> qemu::Result<(qcow2_file::bitmaps::Bits, Fingerprint)> {
        let gone = || Error::Usage { reason: "a bitmap went away while it was sent".to_owned() };
        let bitmap = self.bitmaps.get(index).ok_or_else(gone)?;
        let live = self.disks.get(bitmap.disk).ok_or_else(gone)?;
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
