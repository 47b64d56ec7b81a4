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
//! | `store` | what happens when the stream has ended well |

mod bitmaps;
mod bulk;
mod course;
mod disk;
mod limits;
mod loading;
mod options;
mod session;
mod store;

use std::io::Write;
use std::time::Instant;

use format_spec::Writer;
use format_spec::qemu::reply::Reply;
use mig_core::transport::Connection;

pub use self::options::{DeviceStates, IncomingOptions};

use self::disk::Disk;
use self::session::{Received, Session};
use crate::report::{DiskReport, Report, Status, Verified};
use crate::{Observer, Phase};

/// Receives one migration. On an error the source is told, where it listens, and goes on with its
/// guest; no bitmap was stored, and an image that was written says that it is unfinished.
///
/// A source with a return path completes only when everything is stored. One without learns of a
/// failure only as long as it sends.
pub fn run(
    connection: Connection,
    options: &IncomingOptions,
    observer: &dyn Observer,
) -> crate::Result<Report> {
    let started = Instant::now();
    let Connection { reader, mut writer, line, peer: _ } = connection;
    let received = receive(reader, &mut *writer, options, observer);
    // Whoever is still sending must not wait for somebody who has given up.
    if received.is_err() {
        line.hang_up();
    }
    let Done { disks, wire_bytes, repeated_bytes, is_answered } = received?;
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
    if !is_answered {
        report.status = Status::Unknown;
        report.error = Some(
            "everything is stored, and the source could not be told: it may go on with its guest"
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
    /// Whether a source that waits for the outcome has been told.
    is_answered: bool,
}

fn receive(
    reader: impl std::io::Read,
    writer: &mut dyn Write,
    options: &IncomingOptions,
    observer: &dyn Observer,
) -> crate::Result<Done> {
    observer.phase(Phase::Plan);
    options.check()?;
    let places = options.disks.iter();
    let disks = places.map(|place| Disk::open(place, options, observer));
    let disks = disks.collect::<crate::Result<Vec<_>>>()?;
    observer.phase(Phase::Transfer);
    let mut session = Session::new(reader, &mut *writer, options, disks);
    let result = session.receive(observer);
    let awaits_outcome = session.awaits_outcome();
    let Received { mut disks, bitmaps, wire_bytes } = session.into_received();
    let stored = result.and_then(|()| {
        let repeated_bytes = disks.iter().map(|disk| disk.counts.repeated).sum();
        let disks = store::store(&mut disks, bitmaps, options, observer)?;
        Ok((disks, wire_bytes, repeated_bytes))
    });
    if stored.is_err() {
        disks.iter_mut().for_each(Disk::leave);
    }
    let is_whole = |disks: &[DiskReport]| disks.iter().all(|d| d.verified != Verified::Mismatch);
    let is_good = stored.as_ref().is_ok_and(|(disks, ..)| is_whole(disks));
    let is_told = !awaits_outcome || shut(writer, u32::from(!is_good)).is_ok();
    let (disks, wire_bytes, repeated_bytes) = stored?;
    Ok(Done { disks, wire_bytes, repeated_bytes, is_answered: is_told || !is_good })
}

/// The last answer of the return path.
fn shut(writer: &mut dyn Write, status: u32) -> std::io::Result<()> {
    let mut out = Writer::new();
    Reply::Shut(status).encode(&mut out);
    writer.write_all(&out.into_bytes())?;
    writer.flush()
}
