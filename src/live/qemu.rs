//! A guest that runs here and is to go on at a stock QEMU, which waits with `-incoming`: its disks
//! while it writes to them, and their bitmaps.
//!
//! QEMU's stream has no barriers and no answers on the way, no connection is made again, and
//! bitmaps are named once and sent whole, all of it while the guest is paused. From the end of the stream on
//! only the destination's own word proves that it did not take over.

use std::io;
use std::path::PathBuf;
use std::time::Instant;

use block_mig::Monitor as _;
use block_mig::plan::Scope;
use mig_core::guest::Guest;
use mig_core::heart::Heart;
use mig_core::meter::Meter;
use mig_core::stream;
use mig_core::transport::Connection;

use super::builder::{LiveDisk, Outgoing};
use super::moving::{Left, Moving, Sent};
use super::paused::Whole;
use super::run::LOOK_INTERVAL;
use super::steering::{Eye, Steering, millis};
use crate::observe::Progress;
use crate::qemu::outgoing::bitmaps::OutgoingBitmap;
use crate::qemu::outgoing::chunks::CHUNK;
use crate::qemu::outgoing::{
    Ending, Fingerprint, Greeting, Outcome, PlannedBitmap, Session, Wish, carried, conclude,
    dropped, each, explain, peer, preflight,
};
use crate::qemu::peer::Peer;
use crate::qemu::qmp::Hurry;
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

/// What left this side.
#[derive(Debug)]
pub(super) struct Parting {
    pub(super) ending: Ending,
    /// The bitmaps that were sent, and those that could not be.
    pub(super) bitmaps: Vec<PlannedBitmap>,
    pub(super) left: Vec<Left>,
    /// What was sent of each bitmap, and of each disk.
    pub(super) prints: Vec<Fingerprint>,
    pub(super) sent: Vec<Sent>,
}

impl Outgoing<'_> {
    /// Migrates `guest`, which runs, to a QEMU that `connect` reaches. An error means that it goes
    /// on here. A status `unknown` means that nobody can tell where it goes on: it stays paused.
    /// Otherwise its disks are [retired](block_mig::TrackedDisk::retire).
    ///
    /// One connection, plain, made once. Bitmaps arrive as they are at the pause. One that was
    /// added meanwhile and that the destination's monitor says it cannot take is
    /// [`Dropped`](BitmapOutcome::Dropped); a removed one is in no report.
    pub fn run_to_qemu(
        &self,
        connect: impl FnOnce() -> io::Result<Connection>,
        target: &QemuTarget,
        guest: &mut dyn Guest,
    ) -> Result<Report> {
        let started = Instant::now();
        self.refuse_to_qemu(target)?;
        let known = self.known_to_qemu()?;
        let hurry = Hurry::default();
        let path = (target.peer_qmp.as_deref(), &hurry);
        let mut monitor = peer(path, target.blocks.then_some(target.version))?;
        if let Some(monitor) = &mut monitor {
            let disks = self.disks.iter().filter(|_| target.blocks);
            let wish = Wish {
                disks: disks.map(|d| (d.name.as_str(), d.disk.size())).collect(),
                bitmaps: &known,
                machine: &target.machine,
                uuid: target.uuid,
            };
            preflight(&wish, monitor, self.observer)?;
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
            .stream_to_qemu(
                (&mut session, target, monitor.as_mut()),
                &known,
                (&mut whole, &mut steering),
            )
            .map_err(|error| explain(monitor.as_mut(), &mut session, error))
            .and_then(|mut parting| {
                let ending = std::mem::replace(&mut parting.ending, Ending::Unheard);
                let sent = (&*parting.bitmaps, &*parting.prints);
                let outcome = conclude(monitor.as_mut(), sent, ending, self.observer)?;
                Ok((outcome, parting))
            });
        let wire_bytes = session.wire_bytes();
        // An unfinished stream is a failure at the other end, before anything goes on here.
        drop(session);
        whole.throttle(0);
        match ended {
            Ok((outcome, parting)) => {
                let times = (started, whole.since);
                if outcome.status == report::Status::Completed {
                    whole.retire();
                    self.migration.update(|info| info.status = Status::Completed);
                } else {
                    self.migration.update(|info| info.error_desc.clone_from(&outcome.error));
                }
                Ok(self.report_to_qemu((&outcome, &parting), times, wire_bytes))
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

    /// The bitmaps that are there when it begins. One that a QEMU cannot take is refused.
    fn known_to_qemu(&self) -> Result<Vec<PlannedBitmap>> {
        let (planned, left) = self.bitmaps_to_qemu();
        match left.into_iter().next() {
            Some(Left { reason, .. }) => Err(Error::Usage { reason }),
            None => Ok(planned),
        }
    }

    /// The bitmaps that go along, disk by disk, and those that a QEMU cannot take.
    pub(super) fn bitmaps_to_qemu(&self) -> (Vec<PlannedBitmap>, Vec<Left>) {
        let (mut planned, mut left) = (Vec::new(), Vec::new());
        for (disk, live) in self.disks.iter().enumerate() {
            for info in live.bitmaps.all() {
                let Some(name) = (self.choose)(&info) else { continue };
                let granularity = u32::try_from(info.granularity).unwrap_or(0);
                if granularity == 0 || !(1..=255).contains(&name.len()) {
                    let reason = format!("a QEMU aborts on bitmap {name:?} of {:?}", live.name);
                    left.push(Left { disk, name: info.name, reason });
                    continue;
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
        (planned, left)
    }

    /// Everything up to the end of the stream and what is said of it.
    fn stream_to_qemu(
        &self,
        (session, target, monitor): (&mut Session, &QemuTarget, Option<&mut Peer>),
        known: &[PlannedBitmap],
        (whole, steering): (&mut Whole<'_>, &mut Steering<'_>),
    ) -> qemu::Result<Parting> {
        let meter = Meter::default();
        let total = if target.blocks { self.content(self.shared_base)? } else { 0 };
        let progress = Progress::begin(self.observer, Phase::Transfer, total);
        let watched = (self.observer, &progress);
        let eye = Eye::new(&self.migration, &meter, steering.deadline(), watched);
        let dirty = self.disks.iter().map(|live| live.disk.start_tracking());
        let dirty = dirty.collect::<mig_core::Result<Vec<_>>>().map_err(Error::from)?;
        let moving = Moving {
            outgoing: self,
            target,
            known,
            meter: &meter,
            eye: &eye,
            dirty,
            sent: vec![Sent::default(); self.disks.len()],
        };
        self.migration.enter(Status::Active);
        let watch = Heart::new();
        let mut breaker = session.breaker();
        let look = || {
            eye.steer_meter();
            breaker.beat(eye.is_cancelled());
        };
        let streamed = std::thread::scope(|scope| {
            scope.spawn(|| watch.run(LOOK_INTERVAL, look));
            let _stopping = watch.stop_on_drop();
            moving.run((session, monitor), whole, steering)
        });
        streamed.map_err(|error| if eye.is_cancelled() { error.when_cancelled() } else { error })
    }

    fn report_to_qemu(
        &self,
        (outcome, parting): (&Outcome, &Parting),
        (started, paused): (Instant, Option<Instant>),
        wire_bytes: u64,
    ) -> Report {
        let Parting { bitmaps, left, sent, .. } = parting;
        let mut verdicts = each(&outcome.verdicts, bitmaps.len());
        let disks = self.disks.iter().zip(sent).enumerate().map(|(index, (live, sent))| {
            let of_disk = bitmaps.iter().filter(|bitmap| bitmap.disk == index);
            let reports = of_disk.map(|bitmap| {
                let (old, new) = (&bitmap.source_name, &bitmap.wire.name);
                carried(old, new, verdicts.next())
            });
            let mut reports: Vec<_> = reports.collect();
            let left = left.iter().filter(|left| left.disk == index);
            reports.extend(left.map(|left| dropped(&left.name, left.reason.clone())));
            let mut report = disk_report(live, sent, reports);
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
