//! A disk that is written to while it goes to a real QEMU, and its bitmaps.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bitferry::live::{Builder, LiveImage, Outgoing, QemuTarget};
use bitferry::policy::Limits;
use bitferry::qemu::Version;
use bitferry::report::{BitmapOutcome, Report, Status, Verified};
use bitferry::status::{Migration, Parameters};
use bitferry::{Error, exit_status};
use bitferry_tests::destination::{Destination, connection};
use bitferry_tests::image::make;
use bitferry_tests::outgoing::pong;
use bitferry_tests::qmp::Qemu;
use bitferry_tests::random::{Random, seed};
use bitferry_tests::{Peer, Scratch, qemu, require_all};
use mig_core::bitmap::BitmapInfo;
use mig_core::guest::{Guest, GuestError};
use mig_core::transport::Connection;
use serde_json::json;

const MIB: u64 = 1 << 20;
/// Not whole chunks of QEMU's, so that the last one overlaps.
const SIZE: u64 = 48 * MIB + 65536 + 512;

fn peers() -> bool {
    require_all(&[Peer::Qemu72, Peer::Qemu10, Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

fn source(scratch: &Scratch) -> PathBuf {
    let image = make(scratch, "source", SIZE).write(1, 0, 20 * MIB).bitmap("nightly", 65536);
    let image = image.write(2, 30 * MIB, 2 * MIB).bitmap("hourly", 4096);
    image.write(3, SIZE - 512, 512).disabled_bitmap("old", 65536).done()
}

/// Writes through the disk all the time, in a few hot places, one of them where the last chunk
/// overlaps the one before it, until it is told to stop or the disk is handed over.
struct Writer<'a> {
    image: &'a LiveImage,
    is_stopped: AtomicBool,
    writes: AtomicU64,
}

impl<'a> Writer<'a> {
    fn new(image: &'a LiveImage) -> Self {
        Self { image, is_stopped: AtomicBool::new(false), writes: AtomicU64::new(0) }
    }

    fn run(&self, name: &str) {
        let mut random = Random::new(seed(), name);
        let disk = self.image.disk();
        let last = SIZE / 512 - 160;
        while !self.is_stopped.load(Ordering::Acquire) {
            let sector = match random.below(64) {
                0 => random.below(last),
                1..16 => last - random.below(1800),
                _ => 10 * MIB / 512 + random.below(4 * MIB / 512),
            };
            let (offset, len) = (sector * 512, (1 + random.below(159)) * 512);
            let done = match random.below(8) {
                0 => disk.write_zeroes(offset, len),
                _ => {
                    let byte = u8::try_from(random.below(256)).unwrap();
                    disk.write(&vec![byte; usize::try_from(len).unwrap()], offset)
                }
            };
            if done.is_err() {
                return;
            }
            self.writes.fetch_add(1, Ordering::Release);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn stop(&self) {
        self.is_stopped.store(true, Ordering::Release);
    }
}

/// Notes what it is told to do.
#[derive(Default)]
struct Told {
    pauses: usize,
    resumes: usize,
}

impl Guest for Told {
    fn pause(&mut self) -> Result<(), GuestError> {
        self.pauses += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.resumes += 1;
        Ok(())
    }
}

fn target(blocks: bool, monitor: Option<PathBuf>) -> QemuTarget {
    let version = if blocks { Version::new(7, 2) } else { Version::new(10, 0) };
    QemuTarget { version, machine: String::new(), uuid: None, blocks, peer_qmp: monitor }
}

/// Migrates `image` while it is written to; afterwards nobody writes any more. Also how often it
/// was written to, and what the guest was told.
fn migrate(
    image: &LiveImage,
    connection: Connection,
    to: &QemuTarget,
) -> (Result<Report, Error>, Told) {
    migrate_as(image, connection, to, |builder| builder)
}

fn migrate_as<'a>(
    image: &'a LiveImage,
    connection: Connection,
    to: &QemuTarget,
    wish: impl FnOnce(Builder<'a>) -> Builder<'a>,
) -> (Result<Report, Error>, Told) {
    let writer = Writer::new(image);
    let mut guest = Told::default();
    let migration = Arc::new(Migration::new(64 << 20, Duration::from_millis(150)));
    let limits = Limits { timeout: Some(Duration::from_secs(60)), ..Limits::default() };
    let builder = Outgoing::builder()
        .disk("d", image.disk().clone(), image.bitmaps().clone())
        .migration(migration)
        .limits(limits);
    let outgoing = wish(builder).build().unwrap();
    let result = std::thread::scope(|scope| {
        scope.spawn(|| writer.run("a live disk"));
        while writer.writes.load(Ordering::Acquire) < 20 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let before = writer.writes.load(Ordering::Acquire);
        let result = outgoing.run_to_qemu(|| Ok(connection), to, &mut guest);
        if result.is_err() {
            // The guest goes on.
            let begun = Instant::now();
            let now = writer.writes.load(Ordering::Acquire);
            while writer.writes.load(Ordering::Acquire) <= now {
                assert!(begun.elapsed() < Duration::from_secs(20), "the guest hangs");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(!to.blocks || writer.writes.load(Ordering::Acquire) > before, "nobody wrote");
        writer.stop();
        if result.as_ref().is_ok_and(|report| report.status == Status::Unknown) {
            // Whoever waits for the disk is let go, so that the test ends.
            assert!(image.disk().is_paused());
            image.disk().retire();
        }
        result
    });
    (result, guest)
}

/// QEMU's hash of each bitmap of an image.
fn hashes(image: &Path) -> Vec<String> {
    let mut oracle = Qemu::block_only(Peer::Qemu10);
    oracle.open("image", image, false).unwrap();
    ["nightly", "hourly", "old"].map(|name| oracle.bitmap_hash("image", name)).to_vec()
}

#[test]
fn a_disk_that_is_written_to_arrives_whole_at_a_qemu() {
    if !peers() {
        return;
    }
    for peer in [Peer::Qemu72, Peer::Qemu10] {
        let blocks = peer == Peer::Qemu72;
        let scratch = Scratch::new();
        let source = source(&scratch);
        let copy = make(&scratch, "copy", SIZE).write(9, 0, 2 * MIB).done();
        let image = LiveImage::open(&source).unwrap();
        let mut destination = match blocks {
            true => Destination::of_disks(peer, &[("d", &copy)]),
            false => Destination::of_bitmaps(peer, &[("d", &copy)]),
        };
        let to = target(blocks, Some(destination.monitor()));
        let connection = destination.connect();
        let (report, guest) = migrate(&image, connection, &to);
        let report = report.unwrap_or_else(|e| panic!("{peer:?}: {e:?}"));
        assert_eq!((report.status, exit_status(&report)), (Status::Completed, 0), "{report:?}");
        assert_eq!((guest.pauses, guest.resumes), (1, 0));
        let disk = &report.disks[0];
        assert!(disk.bitmaps.len() == 3, "{report:?}");
        assert!(disk.bitmaps.iter().all(|b| b.outcome == BitmapOutcome::Preserved), "{report:?}");
        let verified = if blocks { Verified::Unconfirmed } else { Verified::No };
        assert_eq!(disk.verified, verified);
        assert!(!blocks || report.repeated_bytes > 0, "nothing changed: {report:?}");
        assert!(report.downtime_ms.is_some_and(|ms| ms < 20_000), "{report:?}");
        destination.completes();
        let found =
            ["nightly", "hourly", "old"].map(|name| destination.qemu.bitmap_hash("d", name));
        assert!(destination.quit().status.success());
        image.close().unwrap();
        assert_eq!(hashes(&source), found, "{peer:?}");
        if blocks {
            qemu::same_content((&source, "qcow2"), (&copy, "qcow2"));
            assert_eq!(hashes(&copy), hashes(&source));
        }
        qemu::check_is_clean(&source);
        qemu::check_is_clean(&copy);
    }
}

/// A guest whose backup jobs are busy with the bitmaps to the last moment.
struct Busy<'a>(&'a LiveImage, Told);

impl Guest for Busy<'_> {
    fn pause(&mut self) -> Result<(), GuestError> {
        let bitmaps = self.0.bitmaps();
        let again = |name: &str, granularity| BitmapInfo {
            name: name.to_owned(),
            granularity,
            is_enabled: true,
            is_persistent: true,
            is_inconsistent: false,
        };
        bitmaps.remove("nightly").unwrap();
        bitmaps.add(&again("nightly", 1 << 20)).unwrap();
        bitmaps.set_enabled("hourly", false).unwrap();
        bitmaps.remove("old").unwrap();
        bitmaps.add(&again("new", 512)).unwrap();
        bitmaps.add(&again("taken", 65536)).unwrap();
        self.0.disk().write(&[9; 512], MIB + 512).unwrap();
        self.1.pause()
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.1.resume()
    }
}

#[test]
fn bitmaps_that_jobs_change_on_the_way_arrive_as_they_are_at_the_pause() {
    if !peers() {
        return;
    }
    for (peer, blocks) in [(Peer::Qemu72, true), (Peer::Qemu10, false)] {
        let scratch = Scratch::new();
        let source = source(&scratch);
        let copy = make(&scratch, "copy", SIZE).done();
        let image = LiveImage::open(&source).unwrap();
        let mut destination = if blocks {
            Destination::of_disks(peer, &[("d", &copy)])
        } else {
            Destination::of_bitmaps(peer, &[("d", &copy)])
        };
        let taken = json!({ "node": "d", "name": "taken", "granularity": 512 });
        destination.qemu.ok("block-dirty-bitmap-add", taken);
        let to = target(blocks, Some(destination.monitor()));
        let connection = destination.connect();
        let outgoing = Outgoing::builder()
            .disk("d", image.disk().clone(), image.bitmaps().clone())
            .build()
            .unwrap();
        let mut guest = Busy(&image, Told::default());
        let report = outgoing.run_to_qemu(|| Ok(connection), &to, &mut guest).unwrap();
        assert_eq!((guest.1.pauses, guest.1.resumes), (1, 0));
        destination.completes();
        let outcomes: Vec<_> =
            report.disks[0].bitmaps.iter().map(|b| (b.name.as_str(), b.outcome)).collect();
        let (preserved, dropped) = (BitmapOutcome::Preserved, BitmapOutcome::Dropped);
        let expected =
            [("hourly", preserved), ("nightly", preserved), ("new", preserved), ("taken", dropped)];
        assert_eq!(outcomes, expected, "{report:?}");
        assert_eq!((report.status, exit_status(&report)), (Status::Completed, 6));
        let node = destination.qemu.ok("query-block", json!({}))[0]["inserted"].clone();
        let found = node["dirty-bitmaps"].as_array().unwrap();
        let of = |name: &str| {
            let found = found.iter().find(|b| b["name"] == name)?;
            let number = |key: &str| found[key].as_u64().unwrap();
            Some((number("granularity"), number("count"), found["recording"] == true))
        };
        assert_eq!(of("nightly"), Some((1 << 20, 1 << 20, true)), "{found:?}");
        assert_eq!(of("new"), Some((512, 512, true)));
        assert_eq!(of("hourly").map(|b| b.2), Some(false));
        assert_eq!((of("old"), of("taken").map(|b| b.0)), (None, Some(512)));
    }
}

#[test]
fn above_a_shared_base_what_is_held_and_written_goes_to_a_qemu() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "base", SIZE).write(7, 0, 9 * MIB).write(8, 16 * MIB, 30 * MIB).done();
    let overlay = |name: &str| make(&scratch, name, SIZE).backing("base", "qcow2");
    let source = overlay("source").write(1, 5 * MIB + 65536, 65536).bitmap("nightly", 65536);
    let source = source.io(format!("write -z {} {}", 20 * MIB, 2 * MIB)).bitmap("hourly", 4096);
    let source = source.disabled_bitmap("old", 65536).done();
    let copy = overlay("copy").done();
    let image = LiveImage::open_above(&source).unwrap();
    let mut destination = Destination::of_disks(Peer::Qemu72, &[("d", &copy)]);
    let to = target(true, Some(destination.monitor()));
    let connection = destination.connect();
    let (report, guest) = migrate_as(&image, connection, &to, Builder::shared_base);
    let report = report.unwrap();
    assert_eq!((report.status, exit_status(&report)), (Status::Completed, 0), "{report:?}");
    assert_eq!((guest.pauses, guest.resumes), (1, 0));
    destination.completes();
    let found = ["nightly", "hourly", "old"].map(|name| destination.qemu.bitmap_hash("d", name));
    assert!(destination.quit().status.success());
    image.close().unwrap();
    let disk = &report.disks[0];
    assert!(disk.bytes_data > 0 && disk.bytes_data < 30 * MIB, "{disk:?}");
    assert!(disk.not_carried.iter().any(|what| what.contains("has its own")), "{disk:?}");
    assert_eq!(hashes(&source), found);
    qemu::same_content((&source, "qcow2"), (&copy, "qcow2"));
    qemu::check_is_clean(&source);
    qemu::check_is_clean(&copy);
}

#[test]
fn a_qemu_that_dies_leaves_the_guest_where_it_is() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch);
    let copy = make(&scratch, "copy", SIZE).done();
    let image = LiveImage::open(&source).unwrap();
    let mut destination = Destination::of_disks(Peer::Qemu72, &[("d", &copy)]);
    let connection = destination.connect();
    let writer = Box::new(Counted {
        writer: connection.writer,
        left: 10 << 20,
        destination: Some(destination),
    });
    let connection = Connection { writer, ..connection };
    let (result, guest) = migrate(&image, connection, &target(true, None));
    assert_eq!(result.unwrap_err().exit_status(), 4);
    assert_eq!(guest.pauses, guest.resumes);
    // And from there it goes elsewhere, with bitmaps that know of all that was written.
    let copy = make(&scratch, "other", SIZE).done();
    let mut destination = Destination::of_disks(Peer::Qemu72, &[("d", &copy)]);
    let connection = destination.connect();
    let (report, _) = migrate(&image, connection, &target(true, Some(destination.monitor())));
    assert_eq!(exit_status(&report.unwrap()), 0);
    destination.completes();
    assert!(destination.quit().status.success());
    image.close().unwrap();
    qemu::same_content((&source, "qcow2"), (&copy, "qcow2"));
    assert_eq!(hashes(&copy), hashes(&source));
}

/// Kills the destination when so many bytes were written.
struct Counted {
    writer: Box<dyn Write + Send>,
    left: usize,
    destination: Option<Destination>,
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.left < bytes.len()
            && let Some(destination) = self.destination.take()
        {
            drop(destination.qemu.kill());
        }
        let written = self.writer.write(bytes)?;
        self.left = self.left.saturating_sub(written);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.writer.flush()
    }
}

/// A destination of our own, which takes everything and answers with these bytes.
fn answering(answer: &'static [u8]) -> Connection {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let (mut bytes, mut tail) = (vec![0; 1 << 20], Vec::new());
        while !tail.ends_with(b"\x06\0\0\0\x02{}") {
            let Ok(len @ 1..) = theirs.read(&mut bytes) else { return };
            tail.extend_from_slice(&bytes[..len]);
            pong(&tail, &mut theirs);
            tail.drain(..tail.len().saturating_sub(16));
        }
        theirs.write_all(answer).unwrap();
    });
    connection(ours)
}

#[test]
fn only_the_destinations_word_lets_the_guest_go_on_after_the_end() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch);
    let image = LiveImage::open(&source).unwrap();
    let (result, guest) =
        migrate(&image, answering(b"\0\x01\0\x04\0\0\0\x01"), &target(true, None));
    assert_eq!(result.unwrap_err().exit_status(), 4);
    assert_eq!((guest.pauses, guest.resumes), (1, 1));
    let (result, guest) = migrate(&image, answering(b""), &target(true, None));
    let report = result.unwrap();
    assert_eq!((report.status, exit_status(&report)), (Status::Unknown, 8));
    assert_eq!((guest.pauses, guest.resumes), (1, 0));
}

#[test]
fn a_migration_to_a_silent_qemu_is_called_off_at_once() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch);
    let image = LiveImage::open(&source).unwrap();
    // It does not read; it reads and says nothing while the guest is paused.
    for blocks in [true, false] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let migration = Arc::new(Migration::new(0, Duration::from_millis(150)));
        let cancel = migration.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(500));
            cancel.cancel();
        });
        let begun = Instant::now();
        let (result, guest) =
            migrate_as(&image, connection(ours), &target(blocks, None), |b| b.migration(migration));
        assert_eq!(result.unwrap_err().exit_status(), 130);
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        assert_eq!(guest.pauses, guest.resumes);
    }
}

#[test]
fn bandwidth_and_downtime_can_be_changed_on_the_way_to_a_qemu() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch);
    let copy = make(&scratch, "copy", SIZE).done();
    let image = LiveImage::open(&source).unwrap();
    let mut destination = Destination::of_disks(Peer::Qemu72, &[("d", &copy)]);
    let connection = destination.connect();
    // It would take minutes, and then never fit into no pause at all.
    let migration = Arc::new(Migration::new(64 << 10, Duration::ZERO));
    let steered = migration.clone();
    let operator = std::thread::spawn(move || hurry(&steered));
    let begun = Instant::now();
    let (report, _) =
        migrate_as(&image, connection, &target(true, None), |builder| builder.migration(migration));
    assert_eq!(report.unwrap().status, Status::Completed);
    assert!(operator.join().unwrap(), "it was over before it was hurried");
    assert!(begun.elapsed() < Duration::from_secs(50), "{:?}", begun.elapsed());
    destination.completes();
}

/// Waits for some bytes at a low rate, allows all bandwidth, waits for some passes, and allows a
/// pause. Whether each had to be done.
fn hurry(migration: &Migration) -> bool {
    let until = |is_so: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !is_so() && begun.elapsed() < Duration::from_secs(40) {
            std::thread::sleep(Duration::from_millis(20));
        }
        migration.info().status == bitferry::status::Status::Active && is_so()
    };
    let disk = || migration.info().disk.unwrap_or_default();
    let is_slow = until(&|| disk().normal_bytes > 0);
    migration.set_parameters(Parameters { max_bandwidth: 0, ..migration.parameters() });
    let goes_on = until(&|| disk().dirty_sync_count > 3);
    migration.set_parameters(Parameters { downtime_limit: 2000, ..migration.parameters() });
    is_slow && goes_on
}

#[test]
fn what_a_qemu_cannot_take_is_refused_before_it_is_connected() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch);
    let image = LiveImage::open(&source).unwrap();
    let builder = || Outgoing::builder().disk("d", image.disk().clone(), image.bitmaps().clone());
    let refused = |outgoing: Outgoing<'_>, to: &QemuTarget| {
        let connect = || -> std::io::Result<Connection> { panic!("it connects") };
        outgoing.run_to_qemu(connect, to, &mut ()).unwrap_err().exit_status()
    };
    assert_eq!(refused(builder().channels(2).build().unwrap(), &target(true, None)), 2);
    let again = builder().reconnect(Duration::from_secs(1)).build().unwrap();
    assert_eq!(refused(again, &target(true, None)), 2);
    let new = QemuTarget { version: Version::new(10, 0), ..target(true, None) };
    assert_eq!(refused(builder().build().unwrap(), &new), 2);
}
