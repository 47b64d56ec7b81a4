//! A destination without room, at any moment: it says which file does not fit, publishes nothing by
//! halves, and the same commands go on once there is room.

use std::path::{Path, PathBuf};

use bitferry_tests::device::{Loop, Small};
use bitferry_tests::image::make;
use bitferry_tests::migration::{both, command, listening};
use bitferry_tests::qemu::{check_is_clean, dirty_ranges, same_content};
use bitferry_tests::scratch::names_in;
use bitferry_tests::{Exit, Output, Peer, Scratch, json, require_all};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const ROOM: &str = "size=512m,nr_inodes=1000";
const FULL: &str = "No space left on device";
/// What is said of what has no room from the beginning.
const NEEDS: &str = " bytes free, the copy needs about ";

fn has_peers() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

fn small_disk(scratch: &Scratch) -> PathBuf {
    make(scratch, "a.qcow2", 24 * MIB)
        .write(3, 0, 4 * MIB)
        .bitmap("b0", 65536)
        .disabled_bitmap("b1", 512)
        .write(4, MIB, 7 * 512)
        .done()
}

#[track_caller]
fn same(a: &Path, b: &Path) {
    same_content((a, "qcow2"), (b, "qcow2"));
    check_is_clean(b);
    same_bitmaps(a, b);
}

#[track_caller]
fn same_bitmaps(a: &Path, b: &Path) {
    for name in ["b0", "b1"] {
        let read = |image| dirty_ranges(image, name).unwrap_or_else(|o| panic!("{o}"));
        assert_eq!(read(a), read(b), "{name}");
    }
}

/// The destination has no room for `file`, says so, and the source knows why it failed.
#[track_caller]
fn has_no_room(sent: &Output, received: Output, file: &str) {
    let received = received.expect_exit(Exit::Device);
    let said = received.complaint();
    assert!(said.contains(FULL) && said.contains(file), "{received}");
    assert!(said.contains("\nhint: free some room"), "{received}");
    assert_eq!(json::summary(&received)["status"], "failed");
    assert_ne!(sent.code(), Some(0), "{sent}");
    // Where the outcome is unknown the summary says why.
    assert!(sent.complaint().contains(FULL) || sent.text().contains(FULL), "{sent}");
}

/// Both ended well; the source's summary.
#[track_caller]
fn done((sent, received): (Output, Output)) -> Value {
    received.expect_exit(Exit::Done);
    json::summary(&sent.expect_exit(Exit::Done))
}

/// Runs both to their ends, and does something once some of it has arrived: what has no room from
/// the beginning is not begun.
fn both_until(
    scratch: &Scratch,
    send: &str,
    receive: &str,
    then: impl FnOnce(),
) -> (Output, Output) {
    let receiver = command(scratch, &format!("receive --json {receive}")).spawn();
    let uri = listening(&receiver);
    let send = format!("send --json --bandwidth 48M {send}");
    let sender = command(scratch, &send).arg(uri).spawn();
    sender.wait_for(false, |line| {
        let event: Value = serde_json::from_str(line).ok()?;
        (event["phase"] == "transfer" && event["done"].as_u64()? >= 4 * MIB).then_some(())
    });
    then();
    (sender.wait().expect_no_crash(), receiver.wait().expect_no_crash())
}

/// What has no room is refused before it comes; both say so.
#[track_caller]
fn is_refused((sent, received): (Output, Output), place: &str) {
    let received = received.expect_exit(Exit::Device);
    let said = received.complaint();
    assert!(said.contains(NEEDS) && said.contains(place), "{said}");
    assert!(said.contains("\nhint: free some room"), "{received}");
    assert!(sent.expect_exit(Exit::Transport).complaint().contains(NEEDS));
}

#[test]
fn what_has_no_room_is_refused_before_it_comes() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let Some(small) = Small::at(&scratch.path("small"), "size=16m") else { return };
    make(&scratch, "a.qcow2", 64 * MIB).write(1, 0, 10 * MIB).bitmap("b0", 65536).done();
    make(&scratch, "b.qcow2", 64 * MIB).write(2, 0, 10 * MIB).done();
    make(&scratch, "c.qcow2", 64 * MIB).io("write -c -P 3 0 24M").done();
    let refused = |send: &str, receive: &str| {
        is_refused(both(&scratch, send, &format!("{receive} unix:s")), "small");
        assert!(names_in(&scratch.path("small")).iter().all(|name| name == "old"), "{receive}");
    };
    let (a, b) = ("--disk vda=a.qcow2", "--disk vdb=b.qcow2");
    // Each has room, both together have not; and what is compressed arrives plain.
    refused(&format!("{a} {b}"), "--disk vda=small/a --disk vdb=small/b");
    refused("--disk vdc=c.qcow2", "--disk vdc=small/c");
    refused("--disk vdc=c.qcow2", "--disk vdc=small/c -o data_file=c.raw,data_file_raw=on");
    let old = scratch.path("small/old");
    std::fs::File::create(&old).unwrap().set_len(64 * MIB).unwrap();
    let in_place = "--in-place --disk vdc=small/old,format=raw";
    refused("--disk vdc=c.qcow2 --bitmaps none", in_place);
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&old.metadata().unwrap()), 0);
    std::fs::remove_file(old).unwrap();
    // What goes elsewhere is not counted there, nor is what stands on no disk here.
    let receive = "--disk vda=small/a --disk vdb=b.out unix:s";
    done(both(&scratch, &format!("{a} {b}"), receive));
    small.resize(ROOM);
    done(both(&scratch, "--disk vdc=c.qcow2", "--disk vdc=small/c unix:s"));
}

#[test]
fn what_arrived_before_it_was_full_is_not_sent_again() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let Some(small) = Small::at(&scratch.path("small"), ROOM) else { return };
    let source = make(&scratch, "a.qcow2", 256 * MIB).write(1, 0, 100 * MIB).bitmap("b0", 65536);
    let source = source.write(2, 120 * MIB, 120 * MIB).bitmap("b1", 4096).write(3, MIB, 512).done();
    let send = "--disk vda=a.qcow2 --channels 2";
    let receive = "--disk vda=small/out unix:socket";
    let (sent, received) = both_until(&scratch, send, receive, || small.resize("size=150m"));
    has_no_room(&sent, received, "small/.out.bitferry-part");
    // It stays as it is, however often it is tried in vain.
    for _ in 0..2 {
        let left = names_in(&scratch.path("small"));
        assert_eq!(left, [".out.bitferry-journal", ".out.bitferry-part"]);
        // With nothing left not even what is there may be opened.
        let (sent, received) = both(&scratch, send, receive);
        let complaint = received.expect_exit(Exit::Device).complaint();
        assert!(complaint.contains(NEEDS) || complaint.contains(FULL), "{complaint}");
        let complaint = sent.expect_exit(Exit::Transport).complaint();
        assert!(complaint.contains(NEEDS) || complaint.contains(FULL), "{complaint}");
    }
    small.resize(ROOM);
    let summary = done(both(&scratch, send, receive));
    assert_eq!((&summary["status"], &summary["resumed"]), (&"completed".into(), &true.into()));
    assert_eq!(summary["disks"][0]["verified"], "yes", "{summary}");
    // Of 220 MiB nearly all for which there was room had been claimed.
    assert!(summary["wire-bytes"].as_u64() < Some(90 * MIB), "{summary}");
    same(&source, &scratch.path("small/out"));
    assert_eq!(names_in(&scratch.path("small")), [".out.bitferry-receipt", "out"]);
}

#[test]
fn what_arrived_before_the_first_checkpoint_is_kept_too() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "a.qcow2", 1024 * MIB).write(1, 0, 30 * MIB);
    let source = source.write(2, 900 * MIB, 30 * MIB).done();
    for format in ["qcow2", "raw"] {
        let Some(small) = Small::at(&scratch.path("small"), ROOM) else { return };
        let send = "--disk vda=a.qcow2";
        let receive = format!("--disk vda=small/out,format={format} unix:socket");
        let (sent, received) = both_until(&scratch, send, &receive, || small.resize("size=50m"));
        let name = if format == "raw" { "destination" } else { "small/.out.bitferry-part" };
        has_no_room(&sent, received, name);
        small.resize(ROOM);
        let summary = done(both(&scratch, send, &receive));
        assert_eq!(summary["resumed"], true, "{summary}");
        assert!(summary["wire-bytes"].as_u64() < Some(18 * MIB), "{format}: {summary}");
        same_content((&source, "qcow2"), (&scratch.path("small/out"), format));
    }
}

/// With so little room it goes well or not, and there is nothing or all; with more it goes on.
#[track_caller]
fn ends_well(scratch: &Scratch, source: &Path, room: &str) -> Option<i32> {
    let place = scratch.path("small");
    let small = Small::at(&place, room)?;
    let (send, receive) = ("--disk vda=a.qcow2", "--disk vda=small/out unix:socket");
    let (sent, received) = both(scratch, send, receive);
    let is_published = place.join("out").exists();
    if received.code() == Some(0) {
        sent.expect_exit(Exit::Done);
        same(source, &place.join("out"));
        return Some(0);
    }
    has_no_room(&sent, received, "small/.out.bitferry-");
    if is_published {
        // What is missing is the receipt: the source cannot know that all is well.
        same(source, &place.join("out"));
        assert_eq!(json::summary(&sent)["status"], "unknown", "{sent}");
    }
    small.resize(ROOM);
    let summary = done(both(scratch, send, receive));
    let status = if is_published { "already-complete" } else { "completed" };
    assert_eq!(summary["status"], status, "{room}: {summary}");
    same(source, &place.join("out"));
    assert_eq!(names_in(&place), [".out.bitferry-receipt", "out"], "{room}");
    sent.code()
}

#[test]
fn the_last_pages_may_lack_room() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = small_disk(&scratch);
    // From what surely fits down to what fits no bitmap.
    let mut ends = Vec::new();
    for kilobytes in (4188..=4256).rev().step_by(4) {
        let Some(end) = ends_well(&scratch, &source, &format!("size={kilobytes}k")) else { return };
        ends.push(end);
    }
    let is_known = |end: &i32| *end != Exit::Unknown as i32;
    assert!(ends.first() == Some(&0) && !ends.iter().all(is_known), "{ends:?}");
    assert!(ends.last().is_some_and(|end| *end != 0 && is_known(end)), "{ends:?}");
}

#[test]
fn a_name_may_lack_room() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = small_disk(&scratch);
    // The directory, then the image, its journal and its receipt.
    for (names, is_done) in [(1, false), (2, false), (3, false), (4, true)] {
        let room = format!("size=64m,nr_inodes={names}");
        let Some(end) = ends_well(&scratch, &source, &room) else { return };
        assert_eq!(end == 0, is_done, "{names}");
    }
}

#[test]
fn a_journal_without_room_costs_time_alone() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "a.qcow2", 256 * MIB).write(1, 0, 240 * MIB).done();
    let file = make(&scratch, "file", 256 * MIB).format("raw").done();
    let Some(device) = Loop::over(&file) else { return };
    let Some(small) = Small::at(&scratch.path("state"), "size=4k") else { return };
    let receive =
        format!("--in-place --state-dir state --disk vda={} unix:socket", device.0.display());
    let send = "--disk vda=a.qcow2";
    // One page is not enough for so many units, and then there is not even one.
    for is_full in [false, true] {
        if is_full {
            make(&scratch, "file", 256 * MIB).format("raw").done();
            let journal = names_in(&scratch.path("state")).pop().expect("one of a device");
            std::fs::remove_file(scratch.path("state").join(journal)).expect("remove");
            std::fs::write(scratch.path("state/else"), [1; 4096]).expect("write");
        }
        assert_eq!(done(both(&scratch, send, &receive))["status"], "completed");
        same_content((&source, "qcow2"), (&file, "raw"));
    }
    // Half of what it says is there is enough to go on with.
    std::fs::remove_file(scratch.path("state/else")).expect("remove");
    small.resize(ROOM);
    done(both(&scratch, send, &receive));
    let summary = done(both(&scratch, send, &receive));
    assert!(summary["wire-bytes"].as_u64() < Some(MIB), "{summary}");
    same_content((&source, "qcow2"), (&file, "raw"));
}

#[test]
fn an_image_that_is_written_into_may_not_be_able_to_grow() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let Some(small) = Small::at(&scratch.path("small"), ROOM) else { return };
    let source = make(&scratch, "a.qcow2", 96 * MIB).write(1, 0, 80 * MIB).bitmap("b0", 65536);
    let source = source.write(2, 90 * MIB, MIB).bitmap("b1", 4096).write(3, MIB, 512).done();
    let out = make(&scratch, "small/out", 96 * MIB).done();
    let (send, receive) = ("--disk vda=a.qcow2", "--in-place --disk vda=small/out unix:socket");
    let (sent, received) = both_until(&scratch, send, receive, || small.resize("size=40m"));
    has_no_room(&sent, received, "small/out");
    is_refused(both(&scratch, send, receive), "small");
    small.resize(ROOM);
    assert_eq!(done(both(&scratch, send, receive))["status"], "completed");
    same_content((&source, "qcow2"), (&out, "qcow2"));
    // Clusters that were taken and could not be written are given back.
    check_is_clean(&out);
    same_bitmaps(&source, &out);
    assert_eq!(names_in(&scratch.path("small")), [".out.bitferry-receipt", "out"]);
}
