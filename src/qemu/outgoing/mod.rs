//! Disks at rest and their bitmaps to a stock QEMU that waits with `-incoming`.
//!
//! Phases: [`prepare`] (open, choose, ask the destination's monitor, refuse), then
//! [`Prepared::send`]: header, disks created, chunks, bits, end, the destination's answer,
//! confirmation, report. [`run`] does both. [`Session`] is the stream by itself, for who drives it
//! otherwise.
//!
//! What QEMU does not do, and what is done about it here:
//!
//! * It drops bitmaps whose node it does not find, and any that are not complete by then, and
//!   reports success. Only its monitor knows: with [`Options::peer_qmp`] each bitmap is asked for
//!   by name, count and hash; without it the report says `sent`, never `preserved`.
//! * It aborts on bits of a disk of another size, on contents for a disk without a guest device,
//!   and fails on a bitmap that is there already. With a monitor that is found before anything is
//!   sent.
//! * It dies of a chunk that reaches beyond the end of a disk: the last one is moved down.
//! * QEMU 10 that is paused (`-S`) keeps persistent bitmaps in memory and loses them when it quits
//!   before `cont` or `blockdev-set-active`: a warning says so.

pub mod bitmaps;
pub mod blocks;
pub mod chunks;
mod confirm;
mod describe;
mod options;
mod plan;
mod preflight;
mod report;
mod selection;
pub mod session;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use block_mig::limits::workers;
use block_mig::load::SharedTree;
use format_spec::Blame;
use mig_core::heart::Heart;
use mig_core::transport::Connection;
use qcow2_file::bitmaps::Bits;

pub use options::{Options, SourceDisk};
pub use plan::Prepared;
pub use session::{Breaker, Ending, Greeting, Session};

use self::blocks::{OutgoingDisk, Pass};
pub(crate) use self::confirm::{Fingerprint, Outcome, conclude, explain};
pub(crate) use self::plan::{PlannedBitmap, peer};
pub(crate) use self::preflight::{Wish, check as preflight, refuse_late};
use self::report::DiskDone;
pub(crate) use self::report::{carried, dropped, each};
use crate::observe::Progress;
use crate::qemu;
use crate::qemu::peer::Peer;
use crate::qemu::qmp::Hurry;
use crate::report::Report;
use crate::{Error, Observer, Phase, Result};

/// How often the user is asked whether to stop, where the other end lets one wait.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Opens the disks and decides what is sent. What would lose a bitmap, kill the destination or make
/// no sense is refused here, before there is a connection.
pub fn prepare<'a>(options: &'a Options, observer: &dyn Observer) -> Result<Prepared<'a>> {
    let hurry = Hurry::default();
    let decided = attended(
        |is_cancelled| hurry.store(is_cancelled, Ordering::Release),
        observer,
        || Prepared::decide(options, &hurry, observer),
    );
    decided.map_err(|error| match error.blame() {
        Blame::Transport if observer.is_cancelled() => Error::Interrupted,
        _ => error,
    })
}

/// Does something that may wait, and tells `beat` again and again meanwhile whether the user wants
/// to stop.
fn attended<T>(
    mut beat: impl FnMut(bool) + Send,
    observer: &dyn Observer,
    body: impl FnOnce() -> T,
) -> T {
    let heart = Heart::new();
    std::thread::scope(|scope| {
        scope.spawn(|| heart.run(LOOK_INTERVAL, || beat(observer.is_cancelled())));
        let _stopping = heart.stop_on_drop();
        body()
    })
}

/// [`prepare`], then [`Prepared::send`]. A refusal closes the connection with nothing sent, of
/// which a waiting QEMU dies: connect after [`prepare`] to spare it.
pub fn run(connection: Connection, options: &Options, observer: &dyn Observer) -> Result<Report> {
    prepare(options, observer)?.send(connection, observer)
}

impl Prepared<'_> {
    /// Sends everything on a fresh connection and finds out what became of it. An error means that
    /// the destination does not have the disks; a status `unknown` that nobody could tell.
    pub fn send(mut self, connection: Connection, observer: &dyn Observer) -> Result<Report> {
        let started = Instant::now();
        let greeting = Greeting {
            machine: self.options.machine.clone(),
            uuid: self.options.uuid,
            is_one_way: self.options.is_one_way,
        };
        let mut session = Session::open(connection, &greeting)?;
        let mut breaker = session.breaker();
        let hurry = self.peer.as_ref().map(Peer::hurry).unwrap_or_default();
        let beat = |is_cancelled| {
            hurry.store(is_cancelled, Ordering::Release);
            breaker.beat(is_cancelled);
        };
        let (outcome, disks) = attended(beat, observer, || self.run(&mut session, observer))?;
        Ok(Report {
            status: outcome.status,
            error: outcome.error,
            total_time_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            downtime_ms: None,
            wire_bytes: session.wire_bytes(),
            repeated_bytes: 0,
            resumed: false,
            disks: report::disks(&self, &disks, &outcome.verdicts),
            ram: None,
        })
    }

    /// The stream, and what became of it.
    fn run(
        &mut self,
        session: &mut Session,
        observer: &dyn Observer,
    ) -> qemu::Result<(Outcome, Vec<DiskDone>)> {
        let streamed = self.stream(session, observer).and_then(|(disks, sent)| {
            observer.phase(Phase::Prove);
            Ok((disks, sent, session.finish()?))
        });
        let (disks, sent, ending) = match streamed {
            Ok(done) => done,
            Err(error) if observer.is_cancelled() => return Err(error.when_cancelled()),
            Err(error) => return Err(explain(self.peer.as_mut(), session, error)),
        };
        let bitmaps = self.bitmaps();
        let outcome = conclude(self.peer.as_mut(), (&bitmaps, &sent), ending, observer)?;
        Ok((outcome, disks))
    }

    /// Everything up to the end of the stream, which [`Session::finish`] writes.
    fn stream(
        &self,
        session: &mut Session,
        observer: &dyn Observer,
    ) -> qemu::Result<(Vec<DiskDone>, Vec<Fingerprint>)> {
        let bitmaps = self.bitmaps();
        let wire: Vec<_> = bitmaps.iter().map(|bitmap| bitmap.wire.clone()).collect();
        if self.options.blocks {
            session.start_blocks()?;
        }
        // Before the contents, so that a destination that cannot create one fails at once.
        if !wire.is_empty() {
            session.start_bitmaps(&wire)?;
        }
        let disks = if self.options.blocks {
            self.contents(session, observer)?
        } else {
            vec![DiskDone::default(); self.disks.len()]
        };
        let mut sent = Vec::with_capacity(bitmaps.len());
        if !wire.is_empty() {
            observer.phase(Phase::Bitmaps);
            session.end_bitmaps(&wire, |index| {
                let bits = self.load(bitmaps.get(index))?;
                let granularity = wire.get(index).map_or(0, |bitmap| bitmap.granularity.into());
                sent.push(Fingerprint::of(&bits, granularity));
                Ok(bits)
            })?;
        }
        Ok((disks, sent))
    }

    /// The disks, one after another.
    fn contents(
        &self,
        session: &mut Session,
        observer: &dyn Observer,
    ) -> qemu::Result<Vec<DiskDone>> {
        let totals: Vec<_> = self.disks.iter().map(describe::bytes_data).collect::<Result<_>>()?;
        let progress = Progress::begin(observer, Phase::Transfer, totals.iter().sum());
        let mut done = Vec::with_capacity(self.disks.len());
        for (disk, total) in self.disks.iter().zip(totals) {
            let source = disk.blocks();
            let hashes = !disk.is_above && !self.options.no_verify;
            let tree = hashes.then(|| SharedTree::new(disk.size())).transpose();
            let tree = tree.map_err(Error::from)?;
            let outgoing = OutgoingDisk { name: &disk.id, source: &*source, tree: tree.as_ref() };
            let pass = Pass {
                workers: workers(self.options.workers),
                monitor: &progress,
                meter: &self.options.meter,
                total,
            };
            let sent = session.blocks(&outgoing, disk.chunks(&*source), &pass)?;
            let root = tree.map(|tree| tree.root()).transpose().map_err(Error::from)?;
            done.push(DiskDone {
                sent: Some(sent),
                content_hash: root.map(|root| root.to_string()),
            });
        }
        progress.end();
        session.end_blocks()?;
        Ok(done)
    }

    fn load(&self, bitmap: Option<&PlannedBitmap>) -> qemu::Result<Bits> {
        let found = bitmap.and_then(|bitmap| {
            let directory = self.disks.get(bitmap.disk)?.disk.bitmaps.directory()?;
            Some((directory, bitmap))
        });
        let (directory, bitmap) = found.ok_or_else(|| Error::Usage {
            reason: "a bitmap went away while it was sent".to_owned(),
        })?;
        Ok(directory.load(&bitmap.source_name)?)
    }
}
