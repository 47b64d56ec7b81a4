//! Disks at rest and their bitmaps sent to real QEMUs, and what these then have.
#![allow(clippy::unwrap_used)]

use std::ops::Range;
use std::path::{Path, PathBuf};

use bitferry::copy::{BitmapSelection, Rename};
use bitferry::qemu::Version;
use bitferry::qemu::outgoing::{self, Options};
use bitferry::report::{BitmapOutcome, BitmapReport, Report, Status, Verified};
use bitferry::{Silent, exit_status};
use bitferry_tests::destination::Destination;
use bitferry_tests::image::make;
use bitferry_tests::outgoing::{bitmaps_of, contents_of, send};
use bitferry_tests::qmp::Qemu;
use bitferry_tests::{Peer, Scratch, qemu, require_all};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;
const QEMUS: [Peer; 2] = [Peer::Qemu72, Peer::Qemu10];

fn peers() -> bool {
    require_all(&[Peer::Qemu72, Peer::Qemu10, Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

fn outcomes(report: &Report) -> Vec<(&str, BitmapOutcome)> {
    let bitmaps = report.disks.iter().flat_map(|disk| &disk.bitmaps);
    bitmaps.map(|bitmap| (bitmap.name.as_str(), bitmap.outcome)).collect()
}

fn bitmap<'r>(report: &'r Report, name: &str) -> &'r BitmapReport {
    let mut bitmaps = report.disks.iter().flat_map(|disk| &disk.bitmaps);
    bitmaps.find(|bitmap| bitmap.name == name).unwrap()
}

/// A node's bitmaps: name, granularity, count, recording, persistent, hash. The node is named as
/// the stream names it.
fn described(qemu: &mut Qemu, device: &str) -> Vec<(String, u64, u64, bool, bool, String)> {
    let devices = qemu.ok("query-block", json!({}));
    let found = devices.as_array().unwrap().iter().find(|d| d["device"] == device);
    let node = found
        .map_or(device.to_owned(), |d| d["inserted"]["node-name"].as_str().unwrap().to_owned());
    let mut all = Vec::new();
    for bitmap in qemu.bitmaps(&node) {
        assert_eq!(bitmap["busy"], false, "{bitmap}");
        let name = bitmap["name"].as_str().unwrap().to_owned();
        let number = |key: &str| bitmap[key].as_u64().unwrap();
        let hash = qemu.bitmap_hash(&node, &name);
        let flag = |key: &str| bitmap[key].as_bool().unwrap();
        all.push((
            name,
            number("granularity"),
            number("count"),
            flag("recording"),
            flag("persistent"),
            hash,
        ));
    }
    all.sort();
    all
}

/// What a QEMU that opens the image itself says of its bitmaps.
fn as_qemu_reads(image: &Path) -> Vec<(String, u64, u64, bool, bool, String)> {
    let mut qemu = Qemu::block_only(Peer::Qemu10);
    qemu.open("image", image, false).unwrap();
    described(&mut qemu, "image")
}

fn empty(scratch: &Scratch, name: &str, size: u64) -> PathBuf {
    make(scratch, name, size).done()
}

#[test]
fn bitmaps_of_all_kinds_arrive_bit_for_bit() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let long = "n".repeat(255);
    let size = 300 * MIB + 512;
    let first = make(&scratch, "first.qcow2", size)
        .bitmap("sector", 512)
        .bitmap(&long, 64 * KIB)
        .bitmap("huge", 2 << 30)
        .bitmap("mega", MIB)
        .write(1, 0, 512)
        .write(2, 5 * MIB - 512, 66 * KIB)
        .write(3, size - 512, 512)
        .bitmap("clear", 64 * KIB)
        .disabled_bitmap("off", 4 * KIB)
        .done();
    let second = make(&scratch, "second.qcow2", 7 * MIB)
        .bitmap("sector", 512)
        .bitmap("ünï", 128 * KIB)
        .write(9, 3 * MIB, 5000 * 512)
        .done();
    qemu::qemu_img("bitmap").args(["--merge", "mega"]).arg(&first).arg("off").ok();
    for peer in QEMUS {
        let images = [empty(&scratch, "a.qcow2", size), empty(&scratch, "b.qcow2", 7 * MIB)];
        let mut destination =
            Destination::of_bitmaps(peer, &[("disk0", &images[0]), ("disk1", &images[1])]);
        let mut options = bitmaps_of(&[("disk0", &first), ("disk1", &second)]);
        options.peer_qmp = Some(destination.monitor());
        let report = send(&mut destination, &options);
        destination.completes();
        for (id, image) in [("disk0", &first), ("disk1", &second)] {
            assert_eq!(described(&mut destination.qemu, id), as_qemu_reads(image), "{peer:?} {id}");
        }
        assert_eq!(report.status, Status::Completed);
        assert!(report.disks.iter().all(|d| d.verified == Verified::No), "{report:?}");
        assert!(outcomes(&report).iter().all(|(_, o)| *o == BitmapOutcome::Preserved));
        assert_eq!(outcomes(&report).len(), 8);
        assert_eq!(exit_status(&report), 0);

        // They are stored with the disk, by a QEMU that owns it.
        destination.cont();
        assert!(destination.quit().status.success());
        for (stored, sent) in images.iter().zip([&first, &second]) {
            assert_eq!(as_qemu_reads(stored), as_qemu_reads(sent), "{peer:?}");
            qemu::check_is_clean(stored);
        }
    }
}

#[test]
fn without_a_monitor_nothing_is_claimed() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "s.qcow2", 4 * MIB).bitmap("b", 65536).write(1, 0, 512).done();
    for peer in QEMUS {
        let target = empty(&scratch, "d.qcow2", 4 * MIB);
        let mut destination = Destination::of_bitmaps(peer, &[("d", &target)]);
        let report = send(&mut destination, &bitmaps_of(&[("d", &image)]));
        assert_eq!(outcomes(&report), [("b", BitmapOutcome::Sent)]);
        assert_eq!(report.disks[0].verified, Verified::Unconfirmed);
        assert_eq!((report.status, exit_status(&report)), (Status::Completed, 0));
        destination.completes();
        assert_eq!(described(&mut destination.qemu, "d"), as_qemu_reads(&image));
    }
}

#[test]
fn a_paused_qemu_10_stores_bitmaps_once_its_disks_are_active() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "s.qcow2", 4 * MIB).bitmap("b", 65536).write(1, 0, 512).done();
    for activates in [false, true] {
        let target = empty(&scratch, "d.qcow2", 4 * MIB);
        let mut destination = Destination::of_bitmaps(Peer::Qemu10, &[("d", &target)]);
        let warnings = Warnings::default();
        let mut options = bitmaps_of(&[("d", &image)]);
        options.peer_qmp = Some(destination.monitor());
        let connection = destination.connect();
        let report = outgoing::run(connection, &options, &warnings).unwrap();
        assert_eq!(outcomes(&report), [("b", BitmapOutcome::Preserved)]);
        let said = warnings.0.into_inner().unwrap().join("\n");
        assert!(said.contains("blockdev-set-active"), "{said}");
        destination.completes();
        if activates {
            destination.qemu.ok("blockdev-set-active", json!({ "active": true }));
        }
        assert!(destination.quit().status.success());
        let expected = if activates { as_qemu_reads(&image) } else { Vec::new() };
        assert_eq!(as_qemu_reads(&target), expected);
    }
}

#[derive(Default)]
struct Warnings(std::sync::Mutex<Vec<String>>);

impl bitferry::Observer for Warnings {
    fn warning(&self, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
}

#[test]
fn names_go_through_renames_and_mappings() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "s.qcow2", 4 * MIB)
        .bitmap("one", 65536)
        .disabled_bitmap("two", 512)
        .write(1, 0, 512)
        .done();
    for peer in QEMUS {
        let target = empty(&scratch, "d.qcow2", 4 * MIB);
        let node = format!(
            "driver=qcow2,node-name=other,file.driver=file,file.filename={}",
            target.display()
        );
        let args = ["-machine", "none", "-blockdev", &node].map(str::to_owned);
        let mut destination = Destination::start(peer, args);
        let mapping = json!([{ "node-name": "other", "alias": "X", "bitmaps": [
            { "name": "there", "alias": "1", "transform": { "persistent": false } },
            { "name": "two", "alias": "two" },
        ] }]);
        destination.qemu.ok("migrate-set-parameters", json!({ "block-bitmap-mapping": mapping }));
        let renames = vec!["X/one=1".parse::<Rename>().unwrap()];
        let mut options = Options { renames, ..bitmaps_of(&[("X", &image)]) };
        options.peer_qmp = Some(destination.monitor());
        let report = send(&mut destination, &options);
        let preserved = BitmapOutcome::Preserved;
        assert_eq!(outcomes(&report), [("one", preserved), ("two", preserved)]);
        let changed = &bitmap(&report, "one").changed;
        assert_eq!(*changed, ["name: one -> 1", "persistent: true -> false"]);
        let found = described(&mut destination.qemu, "other");
        let names: Vec<_> = found.iter().map(|b| (b.0.as_str(), b.3, b.4)).collect();
        assert_eq!(names, [("there", true, false), ("two", false, true)]);
    }
}

#[test]
fn what_qemu_drops_without_a_word_is_seen() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "s.qcow2", 4 * MIB).bitmap("b", 65536).write(1, 0, 512).done();
    for peer in QEMUS {
        let targets = [empty(&scratch, "a.qcow2", 4 * MIB), empty(&scratch, "b.qcow2", 4 * MIB)];
        let mut destination = Destination::of_bitmaps(peer, &[("known", &targets[0])]);
        let mut options = bitmaps_of(&[("known", &image), ("unknown", &image)]);
        options.disks[1].path = make(&scratch, "s2.qcow2", 4 * MIB).bitmap("c", 512).done();
        options.peer_qmp = Some(destination.monitor());
        let report = send(&mut destination, &options);
        // QEMU calls it a success.
        destination.completes();
        assert_eq!(report.status, Status::Completed);
        let dropped = BitmapOutcome::Dropped;
        assert_eq!(outcomes(&report), [("b", dropped), ("c", dropped)], "{peer:?}");
        assert!(bitmap(&report, "c").reason.as_ref().unwrap().contains("no node \"unknown\""));
        assert_eq!(exit_status(&report), 6);
        assert_eq!(described(&mut destination.qemu, "known"), []);
    }
}

fn job(qemu: &mut Qemu, command: &str, arguments: Value) {
    qemu.ok(command, arguments);
    let event = qemu.event("BLOCK_JOB_COMPLETED");
    assert!(event["data"]["error"].is_null(), "{event}");
}

/// Ranges that an image without a backing file holds itself.
fn allocated(image: &Path) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for part in qemu::map(image, "qcow2") {
        // A cluster of zeroes that was copied is there, too.
        if part["present"] == false {
            continue;
        }
        let number = |key: &str| part[key].as_u64().unwrap();
        let (start, end) = (number("start"), number("start") + number("length"));
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

#[test]
fn the_next_incremental_backup_copies_exactly_what_is_dirty() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let size = 64 * MIB + 512;
    let image = make(&scratch, "s.qcow2", size)
        .write(1, 0, 20 * MIB)
        .bitmap("b", 128 * KIB)
        .write(2, 3 * MIB, 64 * KIB)
        .write(3, 40 * MIB + 60 * KIB, 8 * KIB)
        .write(4, size - 512, 512)
        .done();
    let dirty = qemu::dirty_ranges(&image, "b").unwrap();
    assert_eq!(dirty.len(), 3);
    for peer in QEMUS {
        let target = scratch.path("d.qcow2");
        qemu::qemu_img("convert").words("-O qcow2").arg(&image).arg(&target).ok();
        let mut destination = Destination::of_bitmaps(peer, &[("disk0", &target)]);
        let mut options = bitmaps_of(&[("disk0", &image)]);
        options.peer_qmp = Some(destination.monitor());
        assert_eq!(exit_status(&send(&mut destination, &options)), 0);
        destination.completes();
        destination.cont();
        let qemu = &mut destination.qemu;

        let backup = empty(&scratch, "inc.qcow2", size);
        qemu.open("inc", &backup, true).unwrap();
        let arguments = json!({
            "job-id": "j", "device": "disk0", "target": "inc", "sync": "incremental", "bitmap": "b",
        });
        job(qemu, "blockdev-backup", arguments);
        qemu.close("inc");
        assert_eq!(allocated(&backup), dirty, "{peer:?}");
        assert_eq!(described(qemu, "disk0")[0].2, 0, "the backup has cleared the bitmap");

        // It records what comes next.
        qemu.io("disk0", "write -P 5 50M 64k");
        let next = empty(&scratch, "inc2.qcow2", size);
        qemu.open("inc", &next, true).unwrap();
        let arguments = json!({
            "job-id": "j", "device": "disk0", "target": "inc", "sync": "incremental", "bitmap": "b",
        });
        job(qemu, "blockdev-backup", arguments);
        qemu.close("inc");
        let granule = 50 * MIB..50 * MIB + 128 * KIB;
        assert_eq!(allocated(&next), [granule], "{peer:?}");
        assert!(destination.quit().status.success());
    }
}

#[test]
fn bad_wishes_are_refused_before_anything_is_sent() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let long = "n".repeat(256);
    let image = make(&scratch, "s.qcow2", 4 * MIB).bitmap(&long, 65536).done();
    let small = make(&scratch, "small.qcow2", MIB - 512).write(1, 512, 512).done();
    let refused = |options: &Options| {
        let error = outgoing::prepare(options, &Silent).expect_err("refused");
        (error.exit_status(), error.to_string() + &error.hint().unwrap_or_default())
    };
    let options = bitmaps_of(&[("d", &image)]);
    let (status, said) = refused(&options);
    assert!(status == 7 && said.contains("--rename-bitmap"), "{said}");
    let renames = vec![format!("{long}=n").parse().unwrap()];
    assert!(outgoing::prepare(&Options { renames, ..options.clone() }, &Silent).is_ok());
    let bitmaps = BitmapSelection::Named(vec!["x".into()]);
    assert_eq!(refused(&Options { bitmaps, ..options.clone() }).0, 2);
    assert_eq!(refused(&bitmaps_of(&[])).0, 2);
    assert_eq!(refused(&bitmaps_of(&[("", &small)])).0, 2);
    assert_eq!(refused(&bitmaps_of(&[(&long, &small)])).0, 2);

    let (status, said) = refused(&contents_of(&[("d", &small)]));
    assert!(status == 7 && said.contains("resize"), "{said}");
    let newest = Options { version: Version::NEWEST, ..contents_of(&[("d", &small)]) };
    let (status, said) = refused(&newest);
    assert!(status == 2 && said.contains("--no-blocks"), "{said}");
}

#[test]
fn broken_bitmaps_are_left_only_on_request() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "s.qcow2", 4 * MIB).bitmap("b", 65536).bitmap("good", 512).done();
    let mut qemu = Qemu::block_only(Peer::Qemu10);
    qemu.open("n", &image, true).unwrap();
    qemu.ok("block-dirty-bitmap-remove", json!({ "node": "n", "name": "good" }));
    qemu.kill();
    qemu::qemu_img("bitmap").args(["--add", "-g", "512"]).arg(&image).arg("good").ok();
    let target = empty(&scratch, "d.qcow2", 4 * MIB);
    let mut destination = Destination::of_bitmaps(Peer::Qemu10, &[("d", &target)]);
    let mut options = bitmaps_of(&[("d", &image)]);
    options.peer_qmp = Some(destination.monitor());
    assert_eq!(outgoing::prepare(&options, &Silent).unwrap_err().exit_status(), 7);
    options.skip_broken_bitmaps = true;
    let report = send(&mut destination, &options);
    assert_eq!(bitmap(&report, "b").outcome, BitmapOutcome::Dropped);
    assert_eq!(bitmap(&report, "good").outcome, BitmapOutcome::Preserved);
    assert_eq!(exit_status(&report), 6);
}

/// A QEMU that took such a bitmap would be without the disk from `cont` on.
#[test]
fn a_bitmap_that_the_image_there_holds_is_not_sent_to_it() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "s.qcow2", 4 * MIB).bitmap("b", 65536).write(1, 0, 512).done();
    let copy = scratch.path("copy.qcow2");
    for peer in QEMUS {
        std::fs::copy(&image, &copy).unwrap();
        let mut destination = Destination::of_bitmaps(peer, &[("d", &copy)]);
        let mut options = bitmaps_of(&[("d", &image)]);
        options.peer_qmp = Some(destination.monitor());
        let error = outgoing::prepare(&options, &Silent).expect_err("refused");
        let said = error.to_string();
        assert_eq!(error.exit_status(), 4, "{said}");
        assert!(said.contains("nothing was sent") && said.contains("bitferry bitmap remove"));
        // Under another name it goes, and both are there when it runs.
        options.renames = vec!["b=c".parse().unwrap()];
        assert_eq!(exit_status(&send(&mut destination, &options)), 0);
        destination.completes();
        destination.cont();
        let found = described(&mut destination.qemu, "d");
        assert_eq!(found.iter().map(|b| b.0.as_str()).collect::<Vec<_>>(), ["b", "c"]);
        drop(destination);

        // What the QEMU that was killed left marked as in use is not loaded.
        let mut destination = Destination::of_bitmaps(peer, &[("d", &copy)]);
        let mut options = bitmaps_of(&[("d", &image)]);
        options.peer_qmp = Some(destination.monitor());
        assert_eq!(exit_status(&send(&mut destination, &options)), 0);
        destination.completes();
        destination.cont();
        assert_eq!(described(&mut destination.qemu, "d").len(), 1);
    }
}
