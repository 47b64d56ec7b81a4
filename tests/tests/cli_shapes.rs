//! `send` that does not send all: bitmaps without contents, to a destination that has those by
//! another way, and what stands above a backing file, to one that has a copy of that.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitferry_tests::image::{Bytes, make};
use bitferry_tests::migration::{both, command, done, listening};
use bitferry_tests::qemu::{check_is_clean, dirty_ranges, map, qemu_img, qemu_io, same_content};
use bitferry_tests::random::{Random, seed};
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, json, require_all};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

fn has_peers() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

/// Runs both sides to their ends.
fn migrate(scratch: &Scratch, source: &str, destination: &str) -> (Output, Output) {
    both(scratch, source, &format!("{destination} tcp:127.0.0.1:0"))
}

/// [`migrate`], which has to succeed: both summaries.
#[track_caller]
fn migrated(scratch: &Scratch, source: &str, destination: &str) -> (Value, Value) {
    done(scratch, source, &format!("{destination} tcp:127.0.0.1:0"))
}

fn ranges(image: &Path, bitmap: &str) -> Vec<Range<u64>> {
    dirty_ranges(image, bitmap).unwrap_or_else(|output| panic!("{output}"))
}

/// A source with two bitmaps, and a mirror of its content that has other bitmaps: one of the same
/// name and one of its own.
fn mirrored(scratch: &Scratch, size: u64) -> (PathBuf, PathBuf) {
    let source = make(scratch, "source", size)
        .write(1, 0, 8 * MIB)
        .bitmap("b0", 65536)
        .write(2, 20 * MIB, MIB)
        .bitmap("b1", 4096)
        .write(3, 40 * MIB, 8192)
        .done();
    let mirror = scratch.path("mirror");
    qemu_img("convert").words("-f qcow2 -O qcow2").arg(&source).arg(&mirror).ok();
    for name in ["b0", "own"] {
        qemu_img("bitmap").words("--add -g 65536").arg(&mirror).arg(name).ok();
    }
    // Content that is there already, so that the bitmaps differ and the content does not.
    qemu_io(&mirror, "qcow2", [format!("write -P 1 {MIB} {MIB}")]);
    (source, mirror)
}

#[test]
fn bitmaps_without_blocks_arrive_in_a_mirror_and_its_content_stays() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mirror) = mirrored(&scratch, SIZE);
    let (before, own) = (map(&mirror, "qcow2"), ranges(&mirror, "own"));
    let (sent, received) =
        migrated(&scratch, "--no-blocks --disk vda=source", "--in-place --disk vda=mirror");
    for summary in [&sent, &received] {
        let disk = &summary["disks"][0];
        // Nobody has looked at the content, and nobody says so.
        assert_eq!((&disk["verified"], &disk["content-hash"]), (&"no".into(), &Value::Null));
        assert_eq!((&disk["bytes-data"], &disk["bytes-zero"]), (&0.into(), &0.into()), "{disk}");
        assert!(disk["not-carried"][0].as_str().is_some_and(|s| s.starts_with("content")));
        assert_eq!(disk["bitmaps"].as_array().map(Vec::len), Some(2), "{disk}");
        for bitmap in disk["bitmaps"].as_array().expect("bitmaps") {
            assert_eq!(bitmap["outcome"], "preserved", "{disk}");
        }
    }
    assert!(sent["wire-bytes"].as_u64().is_some_and(|bytes| bytes < 64 << 10), "{sent}");
    check_is_clean(&mirror);
    assert_eq!(map(&mirror, "qcow2"), before, "no cluster of the guest has moved");
    for name in ["b0", "b1"] {
        assert_eq!(ranges(&mirror, name), ranges(&source, name), "{name}");
    }
    assert_eq!(ranges(&mirror, "own"), own);
    let hashes = |name| json::document(&command(&scratch, "hash --json").arg(name).ok());
    let (here, there) = (hashes("source"), hashes("mirror"));
    for bitmap in here["bitmaps"].as_array().expect("bitmaps") {
        assert!(there["bitmaps"].as_array().expect("bitmaps").contains(bitmap), "{there}");
    }
    incremental(&scratch, &mirror);
}

/// A backup of before `b0` began, brought up to date by `b0` as it arrived and went on.
#[track_caller]
fn incremental(scratch: &Scratch, mirror: &Path) {
    qemu_io(mirror, "qcow2", [format!("write -P 9 {} {}", 50 * MIB, 2 * MIB)]);
    let backup = make(scratch, "backup", SIZE).format("raw").write(1, 0, 8 * MIB).done();
    let content = scratch.path("content");
    qemu_img("convert").words("-f qcow2 -O raw").arg(mirror).arg(&content).ok();
    let (from, to) = (std::fs::File::open(&content).unwrap(), std::fs::File::options());
    let to = to.clone().write(true).open(&backup).expect("the backup");
    for range in ranges(mirror, "b0") {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).expect("small")];
        from.read_exact_at(&mut bytes, range.start).expect("read");
        to.write_all_at(&bytes, range.start).expect("write");
    }
    same_content((&backup, "raw"), (mirror, "qcow2"));
}

#[test]
fn bitmaps_without_blocks_are_refused_where_the_disk_is_another() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    mirrored(&scratch, SIZE);
    make(&scratch, "small", SIZE - 512).bitmap("b0", 65536).done();
    make(&scratch, "raw", SIZE).format("raw").done();
    make(&scratch, "old", SIZE).option("compat=0.10").done();
    let before = |name: &str| std::fs::read(scratch.path(name)).expect("an image");
    for (destination, says) in [
        ("--in-place --disk vda=small", "bytes and the source's disk"),
        ("--in-place --disk vda=raw,format=raw", "bitmap"),
        ("--in-place --disk vda=old", "bitmap"),
        ("--disk vda=new", "--in-place"),
        ("--force --disk vda=small", "--in-place"),
    ] {
        let name = ["small", "raw", "old"].into_iter().find(|name| destination.contains(name));
        let image = name.map(before);
        let (sent, received) = migrate(&scratch, "--no-blocks --disk vda=source", destination);
        assert!(sent.code() != Some(0) && received.code() != Some(0), "{destination}: {sent}");
        assert!(received.complaint().contains(says), "{destination}: {received}");
        assert!(name.map(before) == image, "{destination}: it was written to");
    }
    assert!(!scratch.path("new").exists());
    // One whose content never arrived whole does not become valid by its bitmaps.
    let sent = "--bitmaps none --disk vda=source";
    let receive = command(&scratch, "receive --json --in-place --disk vda=mirror tcp:127.0.0.1:0");
    let receive = receive.spawn();
    let send = command(&scratch, &format!("send {sent} --bandwidth 2M")).arg(listening(&receive));
    let send = send.spawn();
    let begun = Instant::now();
    // The mark of what is not complete.
    while Bytes::of(&scratch.path("mirror")).get::<1>(72)[0] & 0x40 == 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing arrives");
    }
    receive.kill();
    send.kill();
    let (_, received) =
        migrate(&scratch, "--no-blocks --disk vda=source", "--in-place --disk vda=mirror");
    assert!(received.complaint().contains("interrupted in-place copy"), "{received}");
}

#[test]
fn a_file_carries_bitmaps_without_blocks() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let (source, mirror) = mirrored(&scratch, SIZE);
    command(&scratch, "send --no-blocks --disk vda=source file:stream").ok();
    let shown = command(&scratch, "inspect stream").ok();
    assert!(shown.contains("what is not sent stays"), "{shown}");
    let receive = "receive --json --in-place --disk vda=mirror file:stream";
    command(&scratch, receive).ok();
    // Whoever asks again hears that it is done, even if the guest has gone on since.
    qemu_img("bitmap").words("--clear").arg(&mirror).arg("b0").ok();
    let again = json::summary(&command(&scratch, receive).output().expect_exit(Exit::Done));
    assert_eq!(again["status"], "already-complete", "{again}");
    assert_eq!(ranges(&mirror, "b0"), []);
    command(&scratch, &receive.replace("receive", "receive --fresh")).ok();
    for name in ["b0", "b1"] {
        assert_eq!(ranges(&mirror, name), ranges(&source, name), "{name}");
    }
    same_content((&source, "qcow2"), (&mirror, "qcow2"));
}

#[test]
fn bitmaps_move_from_one_overlay_of_a_shared_disk_to_another() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    mirrored(&scratch, SIZE);
    // The raw disk is shared; each host has an overlay of its own for the bitmaps.
    let overlay = "copy --bitmaps none -o data_file=disk.raw,data_file_raw=on source";
    command(&scratch, &format!("{overlay} there")).ok();
    std::fs::copy(scratch.path("there"), scratch.path("here")).expect("copy");
    command(&scratch, "bitmap add --granularity 4K here b0").ok();
    let qemu_io = Run::new(Peer::QemuIo.find().expect("qemu-io"));
    qemu_io.args(["-c", "write -P 6 3M 1M", "here"]).dir(scratch.dir()).ok();
    let shared = "--in-place --allow-backing --disk vda=there";
    // The source opens neither the disk nor asks to.
    migrated(&scratch, "--no-blocks --disk vda=here", shared);
    qemu_img("check").words("-f qcow2 there").dir(scratch.dir()).ok();
    let dump = |image| command(&scratch, &format!("bitmap dump --json {image} b0")).ok();
    assert_eq!(dump("here"), dump("there"));
    assert!(dump("there").contains("1048576"), "{}", dump("there"));
    let compared = command(&scratch, "compare --allow-backing here there").output();
    compared.expect_exit(Exit::Done);
}

#[test]
fn a_kill_leaves_the_old_bitmaps_or_the_new_ones() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    // Large bitmaps: what is written takes a while.
    let size = 1 << 40;
    let source = make(&scratch, "source", size).bitmap("b0", 4096).write(1, 0, MIB).done();
    let old = make(&scratch, "old", size).bitmap("b0", 65536).write(1, 0, MIB);
    let old = old.write(2, 2 * MIB, MIB).done();
    let mirror = scratch.path("mirror");
    let (new, before) = (ranges(&source, "b0"), ranges(&old, "b0"));
    let mut random = Random::new(seed(), "kill where bitmaps arrive");
    let mut whole = None;
    let mut seen = [0; 2];
    for round in 0..12 {
        std::fs::copy(&old, &mirror).expect("copy");
        let _ = std::fs::remove_file(scratch.path(".mirror.bitferry-receipt"));
        let receive = "receive --json --in-place --disk vda=mirror tcp:127.0.0.1:0";
        let receive = command(&scratch, receive).spawn();
        let send = command(&scratch, "send --no-blocks --disk vda=source").arg(listening(&receive));
        let (begun, send) = (Instant::now(), send.spawn());
        match whole {
            None => {
                receive.wait().expect_exit(Exit::Done);
                whole = Some(begun.elapsed());
            }
            Some(whole) => {
                // The first kill of all comes before there can be anything.
                let part = if round == 1 { 0 } else { random.below(1100) };
                std::thread::sleep(whole.mul_f64(part as f64 / 1000.0));
                receive.kill();
            }
        }
        send.wait().expect_no_crash();
        let found = ranges(&mirror, "b0");
        assert!(found == new || found == before, "{found:?}");
        seen[usize::from(found == new)] += 1;
        assert_eq!(bitferry_tests::qemu::check(&mirror).corruptions, 0);
        migrated(&scratch, "--no-blocks --disk vda=source", "--in-place --disk vda=mirror");
        assert_eq!(ranges(&mirror, "b0"), new);
    }
    assert!(seen[0] > 0 && seen[1] > 0, "no kill hit the middle: {seen:?}");
}

/// A base, and an overlay on it that hides some of it by content, and some by zeroes. The
/// destination's copy of the base has another name and format.
fn on_a_base(scratch: &Scratch, clusters: &str) -> (PathBuf, PathBuf) {
    let base = make(scratch, "base", SIZE).write(1, 0, 16 * MIB).write(2, 30 * MIB, MIB).done();
    let copy = scratch.path("there.raw");
    qemu_img("convert").words("-f qcow2 -O raw").arg(&base).arg(&copy).ok();
    let top = make(scratch, "top", SIZE).backing("base", "qcow2").option(clusters);
    let top = top
        .write(3, MIB + 65536, 3 * 65536)
        .bitmap("b0", 65536)
        .io(format!("write -z {} {}", 4 * MIB + 131_072, 65536))
        .io(format!("write -z {} {}", 8 * MIB, 3 * MIB))
        .io(format!("write -P 0 {} 65536", 12 * MIB))
        .io(format!("write -z {} 65536", 50 * MIB))
        .write(4, 60 * MIB + 512, 1024);
    (top.done(), copy)
}

/// Bytes of the guest that the top layer holds itself.
fn held(image: &Path) -> u64 {
    let held = map(image, "qcow2").into_iter().filter(|part| part["depth"] == 0);
    let held = held.filter(|part| part["present"] == true);
    held.map(|part| part["length"].as_u64().expect("a number")).sum()
}

const SEND: &str = "--shared-base --allow-backing --disk vda=top";
const RECEIVE: &str = "--backing there.raw,format=raw --disk vda=copy";

#[test]
fn what_stands_above_a_base_arrives_on_another_copy_of_it() {
    if !has_peers() {
        return;
    }
    for clusters in ["cluster_size=64K", "cluster_size=4K", "extended_l2=on,cluster_size=128K"] {
        let scratch = Scratch::new();
        let (top, base) = on_a_base(&scratch, clusters);
        let copy = scratch.path("copy");
        let untouched = std::fs::read(&base).expect("the base");
        let (sent, received) = migrated(&scratch, SEND, RECEIVE);
        for summary in [&sent, &received] {
            let disk = &summary["disks"][0];
            assert_eq!(disk["verified"], "yes", "{disk}");
            assert!(disk["bytes-data"].as_u64().is_some_and(|n| n <= 5 * 65536), "{disk}");
        }
        let (here, there) = (&sent["disks"][0], &received["disks"][0]);
        assert_eq!(here["content-hash"], there["content-hash"]);
        assert!(sent["wire-bytes"].as_u64().is_some_and(|bytes| bytes < MIB), "{sent}");
        check_is_clean(&copy);
        let info = bitferry_tests::qemu::info(&copy, "qcow2");
        assert_eq!(info["backing-filename"], "there.raw", "{info}");
        assert_eq!(info["backing-filename-format"], "raw", "{info}");
        same_content((&top, "qcow2"), (&copy, "qcow2"));
        assert_eq!(ranges(&copy, "b0"), ranges(&top, "b0"));
        assert_eq!(std::fs::read(&base).expect("the base"), untouched);
        // Leaves are sent whole: with clusters of that size nothing is added.
        let (ours, theirs) = (held(&copy), held(&top));
        assert!(ours >= theirs, "{clusters}: zeroes above the base are kept");
        if clusters == "cluster_size=64K" {
            assert_eq!(ours, theirs, "{clusters}");
            let hashes =
                json::document(&command(&scratch, "hash --json --allow-backing copy").ok());
            assert_eq!(hashes["content-hash"], here["content-hash"]);
        }
    }
}

#[test]
fn a_file_carries_what_stands_above_a_base() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let (top, _) = on_a_base(&scratch, "cluster_size=64K");
    command(&scratch, &format!("send {SEND} file:stream")).ok();
    let shown = command(&scratch, "inspect stream").ok();
    assert!(shown.contains("what is not sent stays") && shown.contains("zero"), "{shown}");
    assert!(std::fs::metadata(scratch.path("stream")).expect("a file").len() < MIB);
    command(&scratch, &format!("receive {RECEIVE} file:stream")).ok();
    same_content((&top, "qcow2"), (&scratch.path("copy"), "qcow2"));
    assert_eq!(ranges(&scratch.path("copy"), "b0"), ranges(&top, "b0"));
}

#[test]
fn a_base_that_reads_otherwise_is_found_out() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let (_, base) = on_a_base(&scratch, "cluster_size=64K");
    qemu_io(&base, "raw", [format!("write -P 7 {} 512", 31 * MIB - 512)]);
    let (sent, received) = migrate(&scratch, SEND, RECEIVE);
    received.expect_exit(Exit::Different);
    sent.expect_exit(Exit::Different);
    assert!(!scratch.path("copy").exists());
    // Nobody looks where nobody wants the proof; not even at the base.
    let unproved = format!("--no-verify {SEND}");
    let (sent, _) = migrated(&scratch, &unproved, &format!("--no-verify {RECEIVE}"));
    assert_eq!(sent["disks"][0]["verified"], "no");
    check_is_clean(&scratch.path("copy"));
}

#[test]
fn what_stands_above_a_base_needs_one_at_both_ends() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let (top, _) = on_a_base(&scratch, "cluster_size=64K");
    make(&scratch, "whole", SIZE).write(1, 0, 65536).done();
    std::fs::copy(&top, scratch.path("other")).expect("copy");
    for (source, destination, says) in [
        (SEND, "--disk vda=copy", "--backing"),
        (SEND, "--in-place --allow-backing --disk vda=other", "--backing"),
        ("--allow-backing --disk vda=top", RECEIVE, "--shared-base"),
        ("--no-blocks --disk vda=whole", RECEIVE, ""),
    ] {
        let (sent, received) = migrate(&scratch, source, destination);
        if says.is_empty() {
            // Nothing of a disk above a base is an image of nothing on it.
            assert_eq!((sent.code(), received.code()), (Some(0), Some(0)), "{received}");
            continue;
        }
        received.expect_exit(Exit::Transport);
        assert!(sent.complaint().contains(says), "{source}, {destination}: {sent}");
        assert!(!scratch.path("copy").exists(), "{destination}");
    }
    same_content((&top, "qcow2"), (&scratch.path("other"), "qcow2"));
    check_is_clean(&scratch.path("other"));
    for words in [
        "send --shared-base --disk vda=whole unix:s",
        "send --shared-base --flatten --disk vda=top unix:s",
        "send --shared-base --allow-backing --no-blocks --disk vda=top unix:s",
        "send --backing base --disk vda=top unix:s",
        "receive --flatten --disk vda=x unix:s",
        "receive --in-place --backing base --disk vda=top unix:s",
        "receive --backing base --disk vda=x,format=raw unix:s",
        "receive --backing base --disk vda=x --disk vdb=y unix:s",
        "receive --backing vdc=base --disk vda=x --disk vdb=y unix:s",
        "receive --dialect qemu --backing base --disk vda=x unix:s",
    ] {
        let output = command(&scratch, words).output().expect_exit(Exit::Usage);
        assert!(output.complaint().len() > 20, "{words}: {output}");
    }
    // The chain below is opened only where that is allowed.
    let closed = command(&scratch, "send --shared-base --disk vda=top unix:s").output();
    assert!(closed.complaint().contains("--allow-backing"), "{closed}");
}

#[test]
fn disks_with_and_without_a_base_go_together() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let (top, _) = on_a_base(&scratch, "cluster_size=64K");
    let whole = make(&scratch, "whole", SIZE).write(5, MIB, MIB).bitmap("b1", 65536).done();
    let (sent, _) = migrated(
        &scratch,
        &format!("{SEND} --disk vdb=whole --channels 3 --compress zstd"),
        "--backing vda=there.raw,format=raw --disk vda=copy --disk vdb=out",
    );
    assert_eq!(sent["disks"][1]["verified"], "yes", "{sent}");
    same_content((&top, "qcow2"), (&scratch.path("copy"), "qcow2"));
    bitferry_tests::qemu::same_disk(&whole, &scratch.path("out"), &["b1"]);
}

#[test]
fn what_arrived_above_a_base_is_not_sent_again() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let (top, _) = on_a_base(&scratch, "cluster_size=64K");
    qemu_io(&top, "qcow2", ["write -P 8 16M 24M"]);
    let receiver = command(&scratch, &format!("receive --json {RECEIVE} unix:s")).spawn();
    listening(&receiver);
    let sender = command(&scratch, &format!("send --json --bandwidth 8M {SEND} unix:s")).spawn();
    let (begun, part) = (Instant::now(), scratch.path(".copy.bitferry-part"));
    while !part.exists() || bitferry_tests::qemu::allocated_bytes(&part) < 20 * MIB {
        assert!(begun.elapsed() < Duration::from_secs(60), "it does not arrive");
        std::thread::sleep(Duration::from_millis(20));
    }
    sender.kill();
    receiver.wait().expect_exit(Exit::Transport);
    let (sent, _) = done(&scratch, SEND, &format!("{RECEIVE} unix:s"));
    assert!(sent["wire-bytes"].as_u64() < Some(14 * MIB) && sent["resumed"] == true, "{sent}");
    same_content((&top, "qcow2"), (&scratch.path("copy"), "qcow2"));
    assert_eq!(ranges(&scratch.path("copy"), "b0"), ranges(&top, "b0"));
}

#[test]
fn what_stands_above_a_base_is_cut_off_and_gone_on_with() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let (top, _) = on_a_base(&scratch, "cluster_size=64K");
    qemu_io(&top, "qcow2", ["write -P 8 16M 24M"]);
    let copy = scratch.path("copy");
    let start = || {
        let _ = std::fs::remove_file(scratch.path("socket"));
        let receive = command(&scratch, &format!("receive --json {RECEIVE} unix:socket")).spawn();
        listening(&receive);
        // Slow enough to be cut.
        let line = format!("send --json --bandwidth 80M {SEND} unix:socket");
        (Instant::now(), receive, command(&scratch, &line).spawn())
    };
    let is_absent_or_whole = |said: &Output| {
        if copy.exists() {
            check_is_clean(&copy);
            same_content((&top, "qcow2"), (&copy, "qcow2"));
            assert_eq!(ranges(&copy, "b0"), ranges(&top, "b0"), "{said}");
        }
        copy.exists()
    };
    let (begun, receive, send) = start();
    send.wait().expect_exit(Exit::Done);
    assert!(is_absent_or_whole(&receive.wait().expect_exit(Exit::Done)));
    let whole = begun.elapsed();
    let mut random = Random::new(seed(), "cut what stands above a base");
    let (mut already, mut resumed) = (0, 0);
    for round in 0..10 {
        for name in ["copy", ".copy.bitferry-receipt"] {
            let _ = std::fs::remove_file(scratch.path(name));
        }
        let (_, receive, send) = start();
        let moment = whole.mul_f64(random.below(1100) as f64 / 1000.0);
        if round % 2 == 0 {
            receive.ends_within(moment);
            is_absent_or_whole(&receive.kill());
            send.wait().expect_no_crash();
        } else {
            send.ends_within(moment);
            send.kill();
            let ended = receive.ends_within(Duration::from_secs(3));
            is_absent_or_whole(&if ended { receive.wait() } else { receive.kill() });
        }
        let (_, receive, send) = start();
        let sent = send.wait().expect_exit(Exit::Done);
        assert!(is_absent_or_whole(&receive.wait().expect_exit(Exit::Done)), "{sent}");
        let summary = json::summary(&sent);
        already += usize::from(summary["status"] == "already-complete");
        resumed += usize::from(summary["status"] == "completed" && summary["resumed"] == true);
    }
    let (_, receive, send) = start();
    let sent = json::summary(&send.wait().expect_exit(Exit::Done));
    assert_eq!(sent["status"], "already-complete", "{sent}");
    receive.wait().expect_exit(Exit::Done);
    assert!(already < 10 && resumed > 0, "no cut hit the middle: {already}, {resumed}");
    assert!(scratch.names().iter().all(|name| !name.ends_with("-part")));
}
