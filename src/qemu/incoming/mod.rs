//! A migration destination for a stock QEMU, 7.2 to 10.0, that keeps what belongs to disks: bitmaps
//! of a `dirty-bitmaps` migration and, from a QEMU that has them, the disks of `migrate -b` and
//! `-i`. Guest memory and device state are received and dropped.
//!
//! [`run`] reads like this list: open the images, receive, store, answer. Bitmaps are held in
//! memory and stored when the stream has ended well, all or none; content goes into the images as
//! it comes, and an image is marked as unfinished from its first chunk until its bitmaps are valid.
//!
//! | module | job |
//! |---|---|
//! | `course` | which commands may come now, what they ask for (pure) |
//! | `bitmaps`, `loading` | the rules between records of `dirty-bitmap` (pure) |
//! | `bulk` | whether the source has looked through all of its disks (pure) |
//! | `disk` | one image, and the content that goes into it |
//! | `session` | takes the stream apart and hands each item to one of these |
//! | `parting` | whether the source is still there, and hears the outcome |
//! | `store` | what happens when the stream has ended well |

mod bitmaps;
mod bulk;
mod course;
mod disk;
mod limits;
mod loading;
mod options;
mod parting;
mod session;
mod store;

use std::io::{Read, Write};
use std::time::Instant;

use mig_core::transport::{Connection, HangUp};

pub use self::options::{DeviceStates, IncomingOptions};

use self::disk::Disk;
use self::parting::{Leave, Parting, with_leave};
use self::session::{Received, Session};
use self::store::Stored;
use super::error::{Error, Result};
use crate::observe::interruptible;
use crate::report::{BitmapOutcome, DiskReport, Report, Status, Verified};
use crate::{Observer, Phase};

/// Receives one migration. On an error the source is told, where it listens, and goes on with its
/// guest; no bitmap was stored, and an image that was written says that it is unfinished.
///
/// A source with a return path completes only when everything is stored. Where it has left before
/// it heard of that, bitmaps that were stored are taken out again; where it does not end the
/// connection either, too, and the outcome is unknown. One without a return path learns of a
/// failure only as long as it sends, and whether it completed cannot be known here.
pub fn run(
    connection: Connection,
    options: &IncomingOptions,
    observer: &dyn Observer,
) -> crate::Result<Report> {
    let started = Instant::now();
    let Connection { reader, mut writer, line, peer: _ } = connection;
    let received = interruptible(observer, &*line, None, || {
        receive(reader, (&mut *writer, &*line), options, observer)
    });
    // Whoever is still sending must not wait for somebody who has given up.
    if received.is_err() {
        line.hang_up();
    }
    let Done { disks, wire_bytes, repeated_bytes, parting } = received?;
    let mut report = Report {
        status: Status::Completed,
        error: None,
        total_time_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        downtime_ms: None,
        wire_bytes,
        repeated_bytes,
        resumed: false,
        disks,
        ram: None,
    };
    if parting == Parting::Unknown {
        report.status = Status::Unknown;
        report.error = Some(
            "the source was told that everything is stored and did not end the connection: \
             whether it has completed or goes on with its guest, its `info migrate` says; its \
             bitmaps were taken out again"
                .to_owned(),
        );
    }
    Ok(report)
}

/// What was stored.
struct Done {
    disks: Vec<DiskReport>,
    wire_bytes: u64,
    repeated_bytes: u64,
    parting: Parting,
}

fn receive(
    reader: impl Read + Send,
    (writer, line): (&mut dyn Write, &dyn HangUp),
    options: &IncomingOptions,
    observer: &dyn Observer,
) -> Result<Done> {
    observer.phase(Phase::Plan);
    options.check()?;
    let places = options.disks.iter();
    let disks = places.map(|place| Disk::open(place, options, observer));
    let disks = disks.collect::<crate::Result<Vec<_>>>()?;
    observer.phase(Phase::Transfer);
    let mut session = Session::new(reader, &mut *writer, options, disks);
    let result = session.receive(line, observer);
    let (awaits, has_return_path) = (session.awaits_outcome(), session.has_return_path());
    let (Received { mut disks, bitmaps, wire_bytes }, reader) = session.into_received();
    with_leave(reader, (writer, line), awaits, |leave| {
        let stored = result.and_then(|()| {
            let is_there = || leave.is_there();
            store::store(&mut disks, bitmaps, options, &is_there, observer)
        });
        if stored.is_err() {
            disks.iter_mut().for_each(Disk::leave);
        }
        let (reports, parting) = part(stored, &disks, leave, observer)?;
        let mut bitmaps = reports.iter().flat_map(|disk| &disk.bitmaps);
        let has_bitmaps = bitmaps.any(|bitmap| bitmap.outcome == BitmapOutcome::Preserved);
        if has_bitmaps && !has_return_path && !options.is_one_way {
            observer.warning(
                "the source has no return path: whether it has completed only its `info migrate` \
                 says, and if it has not, the bitmaps here are stale",
            );
        }
        let repeated_bytes = disks.iter().map(|disk| disk.counts.repeated).sum();
        Ok(Done { disks: reports, wire_bytes, repeated_bytes, parting })
    })
}

/// Tells the source how it went. No bitmap stays that the source may have another one of.
fn part(
    stored: Result<Stored>,
    disks: &[Disk<'_>],
    leave: &mut Leave<'_>,
    observer: &dyn Observer,
) -> Result<(Vec<DiskReport>, Parting)> {
    let mut stored = match stored {
        Ok(stored) => stored,
        Err(error) => {
            // It has an error to tell already.
            let _ = leave.tell(false, observer);
            return Err(if observer.is_cancelled() { Error::Interrupted } else { error });
        }
    };
    let is_whole = stored.reports.iter().all(|disk| disk.verified != Verified::Mismatch);
    let parting = leave.is_there().and_then(|()| leave.tell(is_whole, observer));
    let why = match &parting {
        Ok(Parting::Done) if is_whole => return Ok((stored.reports, Parting::Done)),
        Ok(Parting::Done) => "the images do not read back as what was written to them",
        Ok(Parting::Unknown) => "whether the source has completed is not known",
        Err(_) => "the source goes on with its guest",
    };
    stored.take_back(disks, why)?;
    match parting {
        Err(_) if observer.is_cancelled() => Err(Error::Interrupted),
        parting => Ok((stored.reports, parting?)),
    }
}
