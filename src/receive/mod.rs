//! Receive one migration into image files, and report what became of it.

mod arrivals;
mod dialect;
mod options;

use std::sync::Arc;
use std::time::Instant;

use mig_core::section::Registry;
use mig_core::stream;
use mig_core::transport::{Connection, Listen};

pub use self::arrivals::Arrivals;
pub use self::dialect::Dialect;
pub use self::options::ReceiveOptions;
use crate::berth::{DiskPlace, FileOptions, Files};
use crate::copy::{Format, TargetOptions};
use crate::incoming::{IncomingOptions, Received, ReceivedDisk, receive};
use crate::observe::Stops;
use crate::options::DiskOption;
use crate::report::{BitmapOutcome, BitmapReport, DiskReport, Report, Status, Verified};
use crate::{Error, Observer, Phase, Result, qemu};

/// Receives one migration from whoever comes to `arrivals` first and speaks a dialect that is known
/// here. On an error nothing was published.
pub fn run(
    options: &ReceiveOptions,
    arrivals: &Arrivals<'_>,
    observer: &dyn Observer,
) -> Result<Report> {
    let started = Instant::now();
    options.check()?;
    observer.phase(Phase::Wait);
    let (dialect, main) = first(arrivals, observer)?;
    observer.phase(Phase::Transfer);
    match dialect {
        Dialect::Native if options.in_place => Err(Error::Usage {
            reason: format!(
                "{} speaks bitferry's own dialect, which makes its images: leave --in-place out",
                main.peer
            ),
        }),
        Dialect::Native => native(options, (main, arrivals), (observer, started)),
        Dialect::Qemu if !options.in_place => Err(Error::Usage {
            reason: format!(
                "{} is a QEMU, and does not say how large its disks are: make the images first, as \
                 large as they are, and use --in-place",
                main.peer
            ),
        }),
        Dialect::Qemu => {
            let incoming = qemu::incoming::IncomingOptions {
                disks: options.disks.clone(),
                bitmaps: options.bitmaps.clone(),
                renames: options.renames.clone(),
                allow_backing: options.allow_backing,
                shared_base: options.shared_base,
                is_one_way: arrivals.nature().is_one_way,
            };
            qemu::incoming::run(main, &incoming, observer)
        }
    }
}

/// The first connection that begins as a migration does. Others are turned away.
fn first(arrivals: &Arrivals<'_>, observer: &dyn Observer) -> Result<(Dialect, Connection)> {
    loop {
        let connection = arrivals.accept(None).map_err(|error| match observer.is_cancelled() {
            true => Error::Interrupted,
            false => stream::Error::Connect(error).into(),
        })?;
        let peer = connection.peer.clone();
        match dialect::recognise(connection) {
            Ok(recognised) => return Ok(recognised),
            // With one connection there is nobody else to wait for.
            Err(error) if arrivals.nature().max_connections == 1 => return Err(error),
            Err(error) => {
                let why = crate::report::error_chain(&error);
                observer.warning(&format!("a connection from {peer} was turned away: {why}"));
            }
        }
    }
}

fn native(
    options: &ReceiveOptions,
    (main, arrivals): (Connection, &Arrivals<'_>),
    (observer, started): (&dyn Observer, Instant),
) -> Result<Report> {
    let place = |disk: &DiskOption| DiskPlace {
        name: disk.id.clone(),
        path: disk.path.clone(),
        format: disk.format.unwrap_or(Format::Qcow2),
        target: TargetOptions::default(),
    };
    let files = FileOptions {
        replaces: options.replaces,
        is_fresh: options.fresh,
        ..FileOptions::default()
    };
    let destination = Arc::new(Files::new(options.disks.iter().map(place).collect(), files));
    let monitor = Stops(observer);
    let incoming =
        IncomingOptions { max_channels: options.max_channels, ..IncomingOptions::new(&monitor) };
    let received = receive(main, arrivals, destination, Registry::new(), &incoming)?;
    Ok(report(options, received, started))
}

fn report(options: &ReceiveOptions, received: Received, started: Instant) -> Report {
    let status =
        if received.already_complete { Status::AlreadyComplete } else { Status::Completed };
    Report {
        status,
        error: None,
        total_time_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        downtime_ms: None,
        wire_bytes: received.wire_bytes,
        repeated_bytes: 0,
        resumed: received.resumed,
        disks: received.disks.into_iter().map(|disk| disk_report(options, disk)).collect(),
        ram: None,
    }
}

fn disk_report(_options: &ReceiveOptions, disk: ReceivedDisk) -> DiskReport {
    let bitmap = |name: String| BitmapReport {
        name,
        outcome: BitmapOutcome::Preserved,
        changed: Vec::new(),
        reason: None,
        is_wanted: true,
    };
    DiskReport {
        id: disk.name,
        bytes_data: disk.bytes_data,
        bytes_zero: disk.bytes_zero,
        verified: if disk.proof.is_some() { Verified::Yes } else { Verified::No },
        content_hash: disk.proof.map(|proof| proof.content.to_string()),
        not_carried: Vec::new(),
        bitmaps: disk.bitmaps.into_iter().map(bitmap).collect(),
    }
}
