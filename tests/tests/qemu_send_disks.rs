//! Disk contents sent to QEMU 7.2's block migration, and destinations that fail.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitferry::qemu::outgoing::{self, Options};
use bitferry::report::{BitmapOutcome, Status, Verified};
use bitferry::{Error, Silent, exit_status};
use bitferry_tests::bitferry::bitferry as program;
use bitferry_tests::destination::{Destination, connection};
use bitferry_tests::image::make;
use bitferry_tests::incoming::{Receiver, places};
use bitferry_tests::outgoing::{bitmaps_of, contents_of, send};
use bitferry_tests::qmp::Qemu;
use bitferry_tests::random::{Random, seed};
use bitferry_tests::{Peer, Scratch, qemu, require_all};
use mig_core::transport::Connection;
use serde_json::json;

const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;

fn peers() -> bool {
    require_all(&[Peer::Qemu72, Peer::Qemu10, Peer::QemuImg, Peer::QemuIo])
}

fn paths<'a>(disks: &'a [(&'a str, PathBuf)]) -> Vec<(&'a str, &'a Path)> {
    disks.iter().map(|(name, path)| (*name, path.as_path())).collect()
}

/// A disk with data, zeroes and holes in patterns that chunks do not follow.
fn patchwork(scratch: &Scratch, name: &str, format: &str, size: u64) -> PathBuf {
    let mut random = Random::new(seed(), name);
    let mut maker = make(scratch, name, size).format(format);
    for n in 1..12u8 {
        let at = random.below(size / 512) * 512;
        let len = ((1 + random.below(3000)) * 512).min(size - at);
        maker = if n % 4 == 0 {
            maker.io(format!("write -z {at} {len}"))
        } else {
            maker.write(n, at, len)
        };
    }
    maker.done()
}

/// An image whose content is another one everywhere: what is not sent is seen.
fn filled(scratch: &Scratch, name: &str, format: &str, size: u64) -> PathBuf {
    make(scratch, name, size).format(format).write(0xdd, 0, size).done()
}

#[test]
fn disks_of_all_sizes_arrive_whole() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let sizes = [
        ("a", "qcow2", 5 * MIB),
        ("b", "qcow2", 9 * MIB + 512),
        ("c", "raw", 3 * MIB - 512),
        ("d", "raw", MIB),
        ("e", "qcow2", MIB + 64 * KIB),
    ];
    let made = |name: &str, format: &str, size, is_source: bool| {
        let side = if is_source { "s" } else { "t" };
        let name = format!("{side}{name}.{format}");
        if is_source {
            patchwork(&scratch, &name, format, size)
        } else {
            filled(&scratch, &name, format, size)
        }
    };
    let side =
        |is_source| sizes.map(|(name, format, size)| (name, made(name, format, size, is_source)));
    let (sources, targets) = (side(true), side(false));
    let mut destination = Destination::of_disks(Peer::Qemu72, &paths(&targets));
    let mut options = contents_of(&paths(&sources));
    options.peer_qmp = Some(destination.monitor());
    let report = send(&mut destination, &options);
    destination.completes();
    assert_eq!((report.status, exit_status(&report)), (Status::Completed, 0));
    assert!(destination.quit().status.success());
    for (((name, format, size), (_, source)), (disk, (_, target))) in
        sizes.iter().zip(&sources).zip(report.disks.iter().zip(&targets))
    {
        qemu::same_content((source, format), (target, format));
        assert_eq!(disk.id, *name);
        assert_eq!(disk.bytes_data + disk.bytes_zero, *size);
        assert_eq!(disk.verified, Verified::Unconfirmed);
        let hash = program().args(["hash", "-f", format]).arg(target).ok();
        assert!(hash.contains(disk.content_hash.as_ref().unwrap()), "{hash}");
    }
}

#[test]
fn zeroes_are_sent_as_such() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    // A small disk of zeroes, one of holes, one whose end is zeroes that are no whole chunk: they
    // go with what is before them.
    let small = make(&scratch, "small.qcow2", 64 * KIB).done();
    let hole = make(&scratch, "hole.raw", 64 * MIB).format("raw").done();
    let tail = make(&scratch, "tail.qcow2", 2 * MIB + 512)
        .write(1, 0, 2 * MIB)
        .write(0, 2 * MIB, 512)
        .done();
    let sources = [("small", small), ("hole", hole), ("tail", tail)];
    let targets = [
        ("small", filled(&scratch, "t0.qcow2", "qcow2", 64 * KIB)),
        ("hole", filled(&scratch, "t1.raw", "raw", 64 * MIB)),
        ("tail", filled(&scratch, "t2.qcow2", "qcow2", 2 * MIB + 512)),
    ];
    let mut destination = Destination::of_disks(Peer::Qemu72, &paths(&targets));
    let report = send(&mut destination, &contents_of(&paths(&sources)));
    destination.completes();
    assert!(destination.quit().status.success());
    for ((_, source), (_, target)) in sources.iter().zip(&targets) {
        let format = source.extension().unwrap().to_str().unwrap();
        qemu::same_content((source, format), (target, format));
    }
    let sent: Vec<_> = report.disks.iter().map(|d| (d.bytes_data, d.bytes_zero)).collect();
    assert_eq!(sent, [(0, 64 * KIB), (0, 64 * MIB), (2 * MIB + 512, 0)]);
    assert!(report.wire_bytes < 3 * MIB + 8 * KIB, "{}", report.wire_bytes);
}

#[test]
fn a_larger_destination_keeps_its_rest() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let size = 2 * MIB + 512;
    let tail = |name: &str| make(&scratch, name, size).write(1, 0, MIB);
    let sources = [
        ("random", patchwork(&scratch, "s0.qcow2", "qcow2", size)),
        ("data", tail("s1.qcow2").write(2, 2 * MIB, 512).done()),
        ("zero", tail("s2.qcow2").write(2, 2 * MIB - 512, 512).done()),
        ("zeroes", tail("s3.qcow2").done()),
    ];
    let names = ["t0.raw", "t1.raw", "t2.raw", "t3.raw"];
    let targets: Vec<_> = std::iter::zip(&sources, names)
        .map(|((id, _), name)| (*id, filled(&scratch, name, "raw", 4 * MIB)))
        .collect();
    let mut destination = Destination::of_disks(Peer::Qemu72, &paths(&targets));
    let mut options = contents_of(&paths(&sources));
    options.peer_qmp = Some(destination.monitor());
    send(&mut destination, &options);
    destination.completes();
    assert!(destination.quit().status.success());
    for ((id, source), (_, target)) in sources.iter().zip(&targets) {
        let whole = scratch.path("whole.raw");
        qemu::qemu_img("convert").words("-O raw").arg(source).arg(&whole).ok();
        let (whole, target) = (std::fs::read(whole).unwrap(), std::fs::read(target).unwrap());
        assert!(target.starts_with(&whole), "{id}");
        assert!(target[whole.len()..].iter().all(|b| *b == 0xdd), "{id}");
    }
}

#[test]
fn contents_and_bitmaps_go_together() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let size = 6 * MIB + 512;
    let source = make(&scratch, "s.qcow2", size)
        .write(1, 0, 3 * MIB)
        .bitmap("b", 64 * KIB)
        .write(2, MIB, 512)
        .disabled_bitmap("off", 512)
        .write(3, size - 512, 512)
        .done();
    let target = filled(&scratch, "t.qcow2", "qcow2", size);
    let mut destination = Destination::of_disks(Peer::Qemu72, &[("d", &target)]);
    let mut options = contents_of(&[("d", &source)]);
    options.peer_qmp = Some(destination.monitor());
    let report = send(&mut destination, &options);
    destination.completes();
    // What block migration wrote at the destination is not dirt.
    let outcomes: Vec<_> = report.disks[0].bitmaps.iter().map(|b| b.outcome).collect();
    assert_eq!(outcomes, [BitmapOutcome::Preserved; 2], "{report:?}");
    assert!(destination.quit().status.success());
    qemu::same_content((&source, "qcow2"), (&target, "qcow2"));
    let ranges = |image: &Path| qemu::dirty_ranges(image, "b").unwrap();
    assert_eq!(ranges(&target), ranges(&source));
    assert_eq!(ranges(&target).len(), 2);
}

#[test]
fn above_a_shared_base_only_the_overlay_travels() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let size = 40 * MIB + 512;
    let base = make(&scratch, "base.qcow2", size).write(7, 0, 30 * MIB).done();
    let overlay = |name: &str| make(&scratch, name, size).backing("base.qcow2", "qcow2");
    let source = overlay("s.qcow2")
        .write(1, 5 * MIB + 64 * KIB, 64 * KIB)
        .io(format!("write -z {} {}", 9 * MIB, 64 * KIB))
        .io(format!("write -z {} {}", 12 * MIB, 2 * MIB))
        .write(2, size - 512, 512)
        .done();
    let target = overlay("t.qcow2").done();
    let mut destination = Destination::of_disks(Peer::Qemu72, &[("d", &target)]);
    let options =
        Options { allow_backing: true, shared_base: true, ..contents_of(&[("d", &source)]) };
    let named = Options { allow_backing: false, ..options.clone() };
    let error = outgoing::prepare(&named, &Silent).unwrap_err();
    assert!(error.hint().unwrap().contains("--allow-backing"), "{error}");
    let report = send(&mut destination, &options);
    destination.completes();
    assert!(destination.quit().status.success());
    qemu::same_content((&source, "qcow2"), (&target, "qcow2"));
    let disk = &report.disks[0];
    assert_eq!((disk.bytes_data, disk.bytes_zero), (2 * MIB + 512, 2 * MIB));
    assert_eq!(disk.content_hash, None);
    let kept = qemu::allocated_bytes(&target);
    assert!(kept < 8 * MIB, "{kept} bytes: more than the overlay was written");
    qemu::same_content((&base, "qcow2"), (&base, "qcow2"));
}

#[test]
fn what_would_kill_the_destination_is_found_first() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 2 * MIB).bitmap("b", 65536).done();
    let target = make(&scratch, "t.qcow2", 2 * MIB).done();
    let small = make(&scratch, "small.qcow2", MIB).done();
    let mut destination =
        Destination::of_bitmaps(Peer::Qemu72, &[("bare", &target), ("small", &small)]);
    destination.qemu.ok("block-dirty-bitmap-add", json!({ "node": "bare", "name": "b" }));
    let monitor = destination.monitor();
    let refused = |options: Options| {
        let options = Options { peer_qmp: Some(monitor.clone()), ..options };
        let error = outgoing::prepare(&options, &Silent).expect_err("refused");
        (error.exit_status(), error.to_string())
    };
    for (options, says) in [
        (contents_of(&[("bare", &source)]), "virtio-blk-pci"),
        (contents_of(&[("nobody", &source)]), "\"bare\", \"small\""),
        (bitmaps_of(&[("bare", &source)]), "has a bitmap \"b\" already"),
        (bitmaps_of(&[("small", &source)]), "would abort"),
    ] {
        let (status, said) = refused(options);
        assert!(status == 4 && said.contains(says), "{status} {said}");
        assert!(said.contains("nothing was sent"));
    }
    // The same QEMU is none the worse for it.
    let mut options = bitmaps_of(&[("bare", &source)]);
    options.renames = vec!["b=c".parse().unwrap()];
    options.peer_qmp = Some(monitor.clone());
    assert_eq!(exit_status(&send(&mut destination, &options)), 0);
    destination.completes();
    let (status, said) = refused(options);
    assert!(status == 2 && said.contains("does not wait"), "{said}");

    let newest = Destination::of_bitmaps(Peer::Qemu10, &[("d", &small)]);
    let options = Options { peer_qmp: Some(newest.monitor()), ..contents_of(&[("d", &source)]) };
    let error = outgoing::prepare(&options, &Silent).unwrap_err();
    assert_eq!(error.exit_status(), 2, "{error}");
}

fn failure(connection: Connection, options: &Options) -> Error {
    let begun = Instant::now();
    let error = outgoing::run(connection, options, &Silent).expect_err("it fails");
    assert!(begun.elapsed() < Duration::from_secs(50), "{error}");
    error
}

#[test]
fn a_destination_that_dies_is_a_failure() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = filled(&scratch, "s.raw", "raw", 64 * MIB);
    let target = make(&scratch, "t.qcow2", 64 * MIB).done();
    // Dead before: a name that it does not know.
    let mut destination = Destination::of_disks(Peer::Qemu72, &[("d", &target)]);
    let connection = destination.connect();
    let error = failure(connection, &contents_of(&[("unknown", &source)]));
    assert_eq!(error.exit_status(), 4, "{error}");
    // Killed in the middle.
    let mut destination = Destination::of_disks(Peer::Qemu72, &[("d", &target)]);
    let connection = destination.connect();
    let killed = kill_at(connection, 20 << 20, move || drop(destination.qemu.kill()));
    assert_eq!(failure(killed, &contents_of(&[("d", &source)])).exit_status(), 4);
}

/// A connection that runs something once so many bytes were written to it.
fn kill_at(
    connection: Connection,
    bytes: usize,
    then: impl FnOnce() + Send + 'static,
) -> Connection {
    let writer = Counted { writer: connection.writer, left: bytes, then: Some(then) };
    Connection { writer: Box::new(writer), ..connection }
}

struct Counted<F> {
    writer: Box<dyn Write + Send>,
    left: usize,
    then: Option<F>,
}

impl<F: FnOnce()> Write for Counted<F> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.left < bytes.len()
            && let Some(then) = self.then.take()
        {
            then();
        }
        let written = self.writer.write(bytes)?;
        self.left = self.left.saturating_sub(written);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.writer.flush()
    }
}

#[test]
fn the_destinations_own_words_are_repeated() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 2 * MIB).bitmap("b", 65536).done();
    let target = make(&scratch, "t.qcow2", 2 * MIB).done();
    let mut destination = Destination::of_bitmaps(Peer::Qemu10, &[("d", &target)]);
    let mut options = bitmaps_of(&[("d", &source)]);
    options.peer_qmp = Some(destination.monitor());
    let prepared = outgoing::prepare(&options, &Silent).unwrap();
    // Between asking and sending somebody takes the name.
    let taken = json!({ "node": "d", "name": "b" });
    destination.qemu.ok("blockdev-set-active", json!({ "active": true }));
    destination.qemu.ok("block-dirty-bitmap-add", taken);
    let connection = destination.connect_with(json!({ "exit-on-error": false }));
    let error = prepared.send(connection, &Silent).expect_err("it fails");
    assert_eq!(error.exit_status(), 4);
    let said = error.to_string();
    assert!(said.contains("load") || said.contains("already exists"), "{said}");
}

#[test]
fn a_stream_without_a_way_back_is_the_same_to_qemu() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 2 * MIB).bitmap("b", 65536).write(1, 0, 512).done();
    for peer in [Peer::Qemu72, Peer::Qemu10] {
        let target = make(&scratch, "t.qcow2", 2 * MIB).done();
        let mut destination = Destination::of_bitmaps(peer, &[("d", &target)]);
        let options = Options {
            is_one_way: true,
            machine: "none".to_owned(),
            uuid: Some(*b"sixteen bytes id"),
            ..bitmaps_of(&[("d", &source)])
        };
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let file = scratch.path("stream");
        let copy = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            theirs.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let report = outgoing::run(connection(ours), &options, &Silent).unwrap();
        assert_eq!(report.disks[0].bitmaps[0].outcome, BitmapOutcome::Sent);
        std::fs::write(&file, copy.join().unwrap()).unwrap();
        let uri = format!("exec:cat {}", file.display());
        destination.qemu.ok("migrate-incoming", json!({ "uri": uri }));
        destination.completes();
        let mut oracle = Qemu::block_only(Peer::Qemu10);
        oracle.open("d", &source, false).unwrap();
        assert_eq!(destination.qemu.bitmap_hash("d", "b"), oracle.bitmap_hash("d", "b"));
    }
}

#[test]
fn our_own_destination_takes_it_too() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd]) {
        return;
    }
    let scratch = Scratch::new();
    let size = 5 * MIB + 512;
    let source = make(&scratch, "s.qcow2", size)
        .write(1, 0, 2 * MIB)
        .bitmap("b", 64 * KIB)
        .write(2, size - 512, 512)
        .done();
    let target = filled(&scratch, "t.qcow2", "qcow2", size);
    let receiver = Receiver::listen(places(&[("d", &target)]));
    let stream = receiver.connect();
    let report = outgoing::run(connection(stream), &contents_of(&[("d", &source)]), &Silent);
    assert_eq!(exit_status(&report.unwrap()), 0);
    assert_eq!(exit_status(receiver.wait().report()), 0);
    qemu::same_content((&source, "qcow2"), (&target, "qcow2"));
    let ranges = |image: &Path| qemu::dirty_ranges(image, "b").unwrap();
    assert_eq!(ranges(&target), ranges(&source));
}
