//! Receive one migration into image files, and report what became of it.

mod again;
mod arrivals;
mod arriving;
mod dialect;
mod farewell;
mod image;
mod in_place;
mod options;
mod relay;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use format_spec::native::answer::{Published, PublishedBitmap};
use mig_core::heart::Heart;
use mig_core::stream;
use mig_core::transport::{Connection, Listen};

use self::again::receive_all;
pub use self::arrivals::Arrivals;
use self::arriving::Arriving;
use self::dialect::Stranger;
pub use self::dialect::{Dialect, NO_MIGRATION, is_introduced};
use self::farewell::Farewells;
pub use self::image::{new_image, receive_image};
use self::in_place::InPlace;
pub use self::options::ReceiveOptions;
use self::relay::Relay;
use crate::berth::{Base, DiskPlace, FileOptions, Files};
use crate::copy::{Existing, Format};
use crate::incoming::{Destination, IncomingOptions, Received, ReceivedDisk, turn_away};
use crate::observe::Stops;
use crate::options::{BackingOption, DiskOption};
use crate::renames::Renames;
use crate::report::{
    BitmapOutcome, BitmapReport, DiskReport, ONLY_BITMAPS, Report, Status, Verified,
};
use crate::{Error, Observer, Phase, Result, qemu};

/// How often the observer is told how far it is.
const TELL_INTERVAL: Duration = Duration::from_millis(100);

/// Receives one migration from whoever comes to `arrivals` first and speaks a dialect that is known
/// here. On an error nothing was published.
pub fn run(
    options: &ReceiveOptions,
    arrivals: &Arrivals<'_>,
    observer: &dyn Observer,
) -> Result<Report> {
    options.check()?;
    observer.phase(Phase::Wait);
    let (dialect, main) = first(arrivals, observer, None)?;
    // How long nobody came is nobody's work.
    let started = Instant::now();
    let is_wanted = match options.dialect.filter(|wanted| *wanted != dialect) {
        Some(wanted) => {
            let peer = &main.peer;
            let reason = format!("{peer} speaks the {dialect} dialect, and {wanted} was asked for");
            Err(Error::Usage { reason })
        }
        None => Ok(()),
    };
    match dialect {
        Dialect::Native => {
            let relay = Arc::new(Relay::default());
            let opened = is_wanted
                .and_then(|()| options.check_for(dialect))
                .and_then(|()| Opened::new(options, observer, &relay));
            match opened {
                Ok(opened) => {
                    native(options, (main, arrivals), (observer, started), (opened, relay))
                }
                // The source is there, and waits.
                Err(error) => {
                    turn_away(main, error.blame(), crate::report::error_chain(&error));
                    Err(error)
                }
            }
        }
        Dialect::Qemu => is_wanted.and_then(|()| qemu(options, (main, arrivals), observer)),
    }
}

/// What is there before anything comes.
struct Opened {
    /// What the new images stand on, disk by disk.
    bases: Vec<Option<Base>>,
    /// The images that are written into.
    in_place: Option<Arc<InPlace>>,
}

impl Opened {
    fn new(options: &ReceiveOptions, observer: &dyn Observer, relay: &Arc<Relay>) -> Result<Self> {
        let bases = bases(options, observer)?;
        let in_place = match options.existing {
            Existing::InPlace => Some(Arc::new(InPlace::open(options, observer, relay.clone())?)),
            Existing::Refuse | Existing::Replace => None,
        };
        Ok(Self { bases, in_place })
    }
}

/// The first connection that opens as a migration does. Where anybody may come, others are turned
/// away, with the reason where they would understand it.
fn first(
    arrivals: &Arrivals<'_>,
    observer: &dyn Observer,
    end: Option<Instant>,
) -> Result<(Dialect, Connection)> {
    let farewells = Farewells::default();
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let connection = arrivals.accept(left).map_err(|error| match observer.is_cancelled() {
            true => Error::Interrupted,
            false => stream::Error::Connect(error).into(),
        })?;
        let peer = connection.peer.clone();
        let Stranger { error, to_tell } = match dialect::recognise(connection, observer) {
            Ok(recognised) => return Ok(recognised),
            Err(stranger) => *stranger,
        };
        if observer.is_cancelled() {
            return Err(Error::Interrupted);
        }
        let telling = to_tell.and_then(|connection| farewells.say(connection, &error));
        // There is nobody else to wait for.
        if !arrivals.has_strangers() {
            let _ = telling.map(JoinHandle::join);
            return Err(error.into());
        }
        let why = crate::report::error_chain(&error);
        observer.warning(&format!("a connection from {peer} was turned away: {why}"));
    }
}

/// From a QEMU: see [`qemu::incoming`](crate::qemu::incoming).
fn qemu(
    options: &ReceiveOptions,
    (main, arrivals): (Connection, &Arrivals<'_>),
    observer: &dyn Observer,
) -> Result<Report> {
    if options.existing != Existing::InPlace {
        return Err(Error::Usage {
            reason: format!(
                "{} is a QEMU, whose stream says no sizes: make the images as large as its disks, \
                 and use --in-place",
                main.peer
            ),
        });
    }
    if !options.reconnect.is_zero() {
        observer.warning("--reconnect has no effect: a QEMU does not come back with what is left");
    }
    let incoming = qemu::incoming::IncomingOptions {
        disks: options.disks.clone(),
        bitmaps: options.bitmaps.clone(),
        renames: options.renames.clone(),
        allow_backing: options.allow_backing,
        shared_base: options.shared_base,
        device_journals: options.device_journals.clone(),
        is_one_way: arrivals.nature().is_one_way,
        devices: None,
    };
    let mut report = qemu::incoming::run(main, &incoming, observer)?;
    if options.no_verify {
        // What was stored is read back all the same: that costs nothing beside a QEMU.
        let read_back = report.disks.iter_mut().filter(|d| d.verified != Verified::Mismatch);
        read_back.for_each(|disk| disk.verified = Verified::No);
    }
    Ok(report)
}

fn native(
    options: &ReceiveOptions,
    (main, arrivals): (Connection, &Arrivals<'_>),
    (observer, started): (&dyn Observer, Instant),
    (Opened { bases, in_place }, relay): (Opened, Arc<Relay>),
) -> Result<Report> {
    let watched = Arriving::new(observer);
    let observer: &dyn Observer = &watched;
    // What was there before the first attempt may be unwanted; what that one left never is.
    let destination = |is_first: bool| -> Arc<dyn Destination> {
        let files =
            || new_files(options, &bases, is_first && options.fresh).watched_by(relay.clone());
        let Some(in_place) = &in_place else { return Arc::new(files()) };
        if !is_first {
            in_place.go_on();
        }
        Arc::clone(in_place) as _
    };
    let monitor = Stops(observer);
    let incoming = IncomingOptions {
        max_channels: options.max_channels,
        tally: watched.tally(),
        ..IncomingOptions::new(&monitor)
    };
    let tell = || {
        relay.hand_on(observer);
        watched.tell();
    };
    let over = Heart::new();
    let received = std::thread::scope(|scope| {
        scope.spawn(|| over.run(TELL_INTERVAL, tell));
        let arriving = (main, arrivals);
        let _stopping = over.stop_on_drop();
        receive_all(arriving, destination, options.reconnect, (&incoming, observer))
    })?;
    tell();
    let mut report = report(options, received, started);
    for disk in &mut report.disks {
        disk.bitmaps.extend(in_place.iter().flat_map(|p| p.take_invalidated(&disk.id)));
    }
    Ok(report)
}

/// What the new images stand on, disk by disk.
fn bases(options: &ReceiveOptions, observer: &dyn Observer) -> Result<Vec<Option<Base>>> {
    let base = |disk: &DiskOption| {
        let Some(BackingOption { path, format, .. }) = options.backing_of(disk) else {
            return Ok(None);
        };
        let image = (disk.path.as_path(), options.allow_backing);
        Base::open(path, *format, image, observer).map(Some)
    };
    options.disks.iter().map(base).collect()
}

/// Places that are made.
fn new_files(options: &ReceiveOptions, bases: &[Option<Base>], is_fresh: bool) -> Files {
    let place = |(disk, base): (&DiskOption, &Option<Base>)| DiskPlace {
        base: base.clone(),
        name: disk.id.clone(),
        path: disk.path.clone(),
        format: disk.format.unwrap_or(Format::Qcow2),
        target: options.target.clone(),
        renames: Renames::of(&options.renames, &disk.id),
    };
    let files = FileOptions {
        replaces: options.existing == Existing::Replace,
        is_fresh,
        no_verify: options.no_verify,
        ..FileOptions::default()
    };
    Files::new(options.disks.iter().zip(bases).map(place).collect(), files)
}

fn report(options: &ReceiveOptions, received: Received, started: Instant) -> Report {
    let status =
        if received.already_complete { Status::AlreadyComplete } else { Status::Completed };
    let before = received.published.iter().map(published_before);
    let now = received.disks.into_iter().map(|disk| disk_report(options, disk));
    Report {
        status,
        error: None,
        total_time_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        downtime_ms: None,
        wire_bytes: received.wire_bytes,
        repeated_bytes: 0,
        resumed: received.resumed,
        disks: now.chain(before).collect(),
        ram: None,
    }
}

fn bitmap_report(name: String, stored: &str) -> BitmapReport {
    let changed = (stored != name).then(|| format!("name: {name} -> {stored}"));
    let changed = changed.into_iter().collect();
    let outcome = BitmapOutcome::Preserved;
    BitmapReport { name, outcome, changed, reason: None, is_wanted: true }
}

/// What is not carried of a disk whose bitmaps went alone.
fn only_bitmaps(is_bitmaps_alone: bool) -> Vec<String> {
    is_bitmaps_alone.then(|| ONLY_BITMAPS.to_owned()).into_iter().collect()
}

/// A disk that an earlier run had published.
fn published_before(disk: &Published) -> DiskReport {
    let bitmap = |found: &PublishedBitmap| bitmap_report(found.sent_as.clone(), &found.name);
    let bitmaps = disk.bitmaps.iter().map(bitmap).collect();
    let not_carried = only_bitmaps(disk.is_bitmaps_alone && disk.content.is_none());
    let untouched = DiskReport::untouched(disk.name.clone());
    DiskReport { bitmaps, not_carried, ..untouched }.of_before(Some(disk)).only_seen()
}

fn disk_report(options: &ReceiveOptions, disk: ReceivedDisk) -> DiskReport {
    let of_disk = options.disks.iter().find(|option| option.id == disk.name);
    let renames = of_disk.map(|option| Renames::of(&options.renames, &option.id));
    let bitmap = |name: String| {
        let stored = renames.as_ref().map_or_else(|| name.clone(), |r| r.stored(&name));
        bitmap_report(name, &stored)
    };
    let is_bitmaps_alone = disk.proof.as_ref().is_some_and(|proof| proof.content.is_none());
    let content = disk.proof.and_then(|proof| proof.content);
    DiskReport {
        id: disk.name,
        bytes_data: disk.bytes_data,
        bytes_zero: disk.bytes_zero,
        verified: if content.is_some() { Verified::Yes } else { Verified::No },
        content_hash: content.map(|content| content.to_string()),
        not_carried: only_bitmaps(is_bitmaps_alone),
        bitmaps: disk.bitmaps.into_iter().map(bitmap).collect(),
    }
    .only_seen()
}
