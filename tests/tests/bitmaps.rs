//! Persistent bitmaps held against QEMU: what it wrote is read, what we write it reads.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bitferry_tests::image::{Bytes, make};
use bitferry_tests::qmp::Qemu;
use bitferry_tests::random::{Random, seed};
use bitferry_tests::{Peer, Scratch, qemu, require_all};
use qcow2_file::bitmaps::{
    BitmapEditor, Bitmaps, Bits, Defect, MergeSource, PersistentBitmap, RepairOptions, State,
    check, clear_unfinished, repair, stale_extension, strip,
};
use qcow2_file::edit::Allocator;
use qcow2_file::layout::header::incompatible;
use qcow2_file::preflight::read_header;
use qcow2_file::{Access, Error, Guard, HostFile, Storage};

const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;

fn tools() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

fn writable(path: &Path) -> Arc<dyn Storage> {
    Arc::new(HostFile::open(path, Access::ReadWrite).unwrap())
}

fn bitmaps(path: &Path) -> Bitmaps {
    let file: Arc<dyn Storage> = Arc::new(HostFile::open(path, Access::Read).unwrap());
    let header = read_header(&*file).unwrap();
    Bitmaps::open(file, &header).unwrap().expect("has bitmaps")
}

/// Dirty byte ranges as we read them.
fn ranges(path: &Path, name: &str, size: u64) -> Vec<Range<u64>> {
    let bitmaps = bitmaps(path);
    let bits = bitmaps.load(name).unwrap();
    assert_eq!(bitmaps.count_dirty(name).unwrap(), bits.count());
    byte_ranges(&bits, bitmaps.find(name).unwrap().granularity_bits(), size)
}

fn byte_ranges(bits: &Bits, granularity_bits: u8, size: u64) -> Vec<Range<u64>> {
    let scale = |g: u64| (g << granularity_bits).min(size);
    bits.runs().map(|r| scale(r.start)..scale(r.end)).collect()
}

fn edit(path: &Path, change: impl FnOnce(&mut BitmapEditor)) {
    let mut editor = BitmapEditor::open(writable(path)).unwrap();
    change(&mut editor);
    editor.commit().unwrap();
}

#[track_caller]
fn agrees_with_qemu(path: &Path, name: &str, size: u64) {
    assert_eq!(ranges(path, name, size), qemu::dirty_ranges(path, name).unwrap(), "{name}");
}

/// Writes at random places of an image, in one run of `qemu-io`.
fn scatter(path: &Path, size: u64, random: &mut Random) {
    let command = |_| {
        let at = random.below(size / 512) * 512;
        let len = ((1 + random.below(300)) * 512).min(size - at);
        format!("write -P 1 {at} {len}")
    };
    qemu::qemu_io(path, "qcow2", (0..30).map(command));
}

#[test]
fn bitmaps_of_every_cluster_size_go_both_ways() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let mut random = Random::new(seed(), "bitmaps");
    for (cluster, granularity, size) in [
        (512, 512, 33 * MIB + 512),
        (4096, 512, 70 * MIB + 1536),
        (65536, 65536, 257 * MIB),
        (65536, 512, 300 * MIB + 512),
        (2 * MIB, MIB, 1024 * MIB + 512),
    ] {
        let image = make(&scratch, &format!("{cluster}-{granularity}"), size)
            .option(format!("cluster_size={cluster}"))
            .bitmap("theirs", granularity)
            .disabled_bitmap("off", granularity)
            .done();
        scatter(&image, size, &mut random);
        agrees_with_qemu(&image, "theirs", size);
        assert!(ranges(&image, "off", size).is_empty());

        let granularity_bits = granularity.ilog2() as u8;
        let mut bits = Bits::for_disk(size, granularity_bits);
        bits.set_range(bits.len() - 1..bits.len());
        bits.set_range(0..1);
        bits.set_range(bits.len() / 3..bits.len() / 2);
        edit(&image, |e| {
            let name = "ours";
            let bits = bits.clone();
            let new =
                PersistentBitmap { name: name.into(), granularity_bits, is_enabled: true, bits };
            e.add(new).unwrap();
            e.merge("off", &[MergeSource::Named("theirs"), MergeSource::Named("ours")]).unwrap();
        });
        qemu::check_is_clean(&image);
        for name in ["theirs", "off", "ours"] {
            agrees_with_qemu(&image, name, size);
        }
        assert_eq!(ranges(&image, "ours", size), byte_ranges(&bits, granularity_bits, size));

        // QEMU records on top of what we wrote, and stores it again.
        scatter(&image, size, &mut random);
        for name in ["theirs", "ours"] {
            agrees_with_qemu(&image, name, size);
        }
        qemu::check_is_clean(&image);
        let mut piece = [0; 24];
        bitmaps(&image).read_bits("ours", 8, &mut piece).unwrap();
        let mut same = [0; 24];
        bitmaps(&image).load("ours").unwrap().read_bytes(8, &mut same);
        assert_eq!(piece, same);
    }
}

#[test]
fn every_edit_is_what_qemu_would_have_done() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let size = 100 * MIB + 512;
    let image = make(&scratch, "a", size).bitmap("a", 65536).bitmap("b", 4096).bitmap("c", MIB);
    let image = image.write(1, 10 * MIB, 3 * MIB).write(2, 100 * MIB, 512).done();
    let other = scratch.path("other");
    std::fs::copy(&image, &other).unwrap();
    edit(&image, |e| {
        e.clear("a").unwrap();
        e.merge("a", &[MergeSource::Named("b")]).unwrap();
        e.set_enabled("b", false).unwrap();
        e.remove("c").unwrap();
        e.add_empty("d", 9, true).unwrap();
        e.merge("d", &[MergeSource::Named("b")]).unwrap();
        e.rename("d", "é: another, longer name").unwrap();
    });
    let script = [
        "bitmap --clear F a",
        "bitmap --merge b F a",
        "bitmap --disable F b",
        "bitmap --remove F c",
        "bitmap --add -g 512 F d",
        "bitmap --merge b F d",
    ];
    for line in script {
        let words: Vec<&str> = line.split(' ').collect();
        let words = words.iter().map(|w| if *w == "F" { other.to_str().unwrap() } else { w });
        let mut words = words.collect::<Vec<_>>().into_iter();
        qemu::qemu_img(words.next().unwrap()).args(words).ok();
    }
    qemu::check_is_clean(&image);
    let flags =
        |path: &Path| qemu::info(path, "qcow2")["format-specific"]["data"]["bitmaps"].clone();
    let (ours, mut theirs) = (flags(&image), flags(&other));
    theirs[2]["name"] = "é: another, longer name".into();
    assert_eq!(ours, theirs);
    for (ours, theirs) in [("a", "a"), ("b", "b"), ("é: another, longer name", "d")] {
        agrees_with_qemu(&image, ours, size);
        assert_eq!(ranges(&image, ours, size), ranges(&other, theirs, size));
    }
    edit(&image, |e| {
        ["a", "b", "é: another, longer name"].iter().for_each(|n| e.remove(n).unwrap())
    });
    assert!(flags(&image).is_null());
    qemu::check_is_clean(&image);
    assert!(!strip(&writable(&other)).unwrap());
    assert!(flags(&other).is_null());
    qemu::check_is_clean(&other);
}

#[test]
fn qemus_own_hash_of_our_bits_is_the_same() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::Qemu10]) {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a", 64 * MIB + 512).bitmap("a", 512).bitmap("fresh", 65536);
    let image = image.write(1, 3 * MIB, 5 * MIB).write(1, 64 * MIB, 512).done();
    edit(&image, |e| {
        for (from, to) in [("a", "a2"), ("fresh", "fresh2")] {
            let bits = e.load(from).unwrap();
            let granularity_bits = if from == "a" { 9 } else { 16 };
            e.add(PersistentBitmap { name: to.into(), granularity_bits, is_enabled: false, bits })
                .unwrap();
        }
    });
    let mut qemu = Qemu::block_only(Peer::Qemu10);
    qemu.open("n", &image, false).unwrap();
    assert_eq!(qemu.bitmap_hash("n", "a"), qemu.bitmap_hash("n", "a2"));
    assert_eq!(qemu.bitmap_hash("n", "fresh"), qemu.bitmap_hash("n", "fresh2"));
    assert_ne!(qemu.bitmap_hash("n", "a"), qemu.bitmap_hash("n", "fresh"));
    assert!(qemu.quit().status.success());
}

/// Both ends of the range of QEMUs load what we write, agree about its bits, record on top of them
/// and store them again.
#[test]
fn two_qemus_go_on_with_what_we_wrote() {
    if !tools() || !require_all(&[Peer::Qemu10, Peer::Qemu72]) {
        return;
    }
    let scratch = Scratch::new();
    for (cluster, granularity_bits, size) in [
        (512, 9, 9 * MIB + 512),
        (65536, 16, 257 * MIB),
        (65536, 12, 70 * MIB + 1536),
        (2 * MIB, 20, 600 * MIB),
    ] {
        let image = make(&scratch, &format!("{cluster}-{granularity_bits}"), size)
            .option(format!("cluster_size={cluster}"))
            .done();
        let mut bits = Bits::for_disk(size, granularity_bits);
        bits.set_range(0..1);
        bits.set_range(bits.len() / 3..bits.len() / 2);
        bits.set_range(bits.len() - 1..bits.len());
        edit(&image, |e| {
            for (name, is_enabled) in [("on", true), ("off", false)] {
                let (name, bits) = (name.into(), bits.clone());
                e.add(PersistentBitmap { name, granularity_bits, is_enabled, bits }).unwrap();
            }
            e.add_empty("empty", granularity_bits, true).unwrap();
        });
        let names = ["empty", "off", "on"];
        let mut seen: Vec<Vec<String>> = Vec::new();
        for which in [Peer::Qemu72, Peer::Qemu10] {
            let mut qemu = Qemu::block_only(which);
            qemu.open("n", &image, false).unwrap();
            seen.push(names.map(|name| qemu.bitmap_hash("n", name)).to_vec());
            assert!(qemu.quit().status.success());
        }
        assert_eq!(seen[0], seen[1], "7.2 and 10 at {cluster}");
        for (n, which) in (0..).zip([Peer::Qemu72, Peer::Qemu10]) {
            let mut qemu = Qemu::block_only(which);
            qemu.open("n", &image, true).unwrap_or_else(|e| panic!("{}: {e}", which.name()));
            let listed = qemu.bitmaps("n");
            let mut found: Vec<&str> = listed.iter().filter_map(|b| b["name"].as_str()).collect();
            found.sort_unstable();
            assert_eq!(found, names, "{}", which.name());
            assert!(listed.iter().all(|b| b["persistent"] == true && b["inconsistent"] != true));
            qemu.io("n", &format!("write -P 7 {} 512", (n + 1) * MIB));
            assert!(qemu.quit().status.success());
            qemu::check_is_clean(&image);
        }
        let written: Vec<u64> = [MIB, 2 * MIB].iter().map(|at| at >> granularity_bits).collect();
        let mut expected = Bits::for_disk(size, granularity_bits);
        written.iter().for_each(|g| expected.set_range(*g..*g + 1));
        assert_eq!(bitmaps(&image).load("empty").unwrap(), expected, "{cluster}");
        assert_eq!(bitmaps(&image).load("off").unwrap(), bits, "{cluster}");
        written.iter().for_each(|g| bits.set_range(*g..*g + 1));
        assert_eq!(bitmaps(&image).load("on").unwrap(), bits, "{cluster}");
    }
}

#[test]
fn a_killed_qemu_leaves_bitmaps_that_can_only_be_removed() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::Qemu10]) {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a", 16 * MIB).bitmap("a", 65536).bitmap("b", 65536).done();
    let mut qemu = Qemu::block_only(Peer::Qemu10);
    qemu.open("n", &image, true).unwrap();
    qemu.io("n", "write -P 7 1M 64k");
    qemu.kill();
    let listed = bitmaps(&image);
    assert!(listed.list().iter().all(|e| e.state == State::Inconsistent));
    assert!(matches!(listed.load("a"), Err(Error::Condition { .. })));
    let file = writable(&image);
    let report = check(&file, &read_header(&*file).unwrap()).unwrap();
    assert!(report.findings.iter().all(|f| f.defect == Defect::InUse), "{report:?}");
    let mut editor = BitmapEditor::open(file.clone()).unwrap();
    for result in [editor.clear("a"), editor.set_enabled("a", false), editor.rename("a", "c")] {
        assert!(matches!(result, Err(Error::Condition { .. })));
    }
    editor.remove("a").unwrap();
    editor.commit().unwrap();
    qemu::check_is_clean(&image);
    assert!(repair(&file, RepairOptions::default()).unwrap().is_nothing());
    let options = RepairOptions { may_remove_inconsistent: true, may_drop_broken: false };
    assert_eq!(repair(&file, options).unwrap().removed, ["b"]);
    qemu::check_is_clean(&image);
    assert!(check(&file, &read_header(&*file).unwrap()).unwrap().findings.is_empty());
}

#[test]
fn a_guard_is_what_qemu_would_be() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let size = 64 * MIB;
    let image = make(&scratch, "a", size).bitmap("on", 65536).disabled_bitmap("off", 65536);
    let image = image.write(1, 0, 8 * MIB).done();
    let file = writable(&image);
    let guard = Guard::take(file.clone()).unwrap();
    let info = qemu::info(&image, "qcow2");
    let seen = &info["format-specific"]["data"]["bitmaps"];
    assert_eq!(seen[0]["flags"], serde_json::json!(["in-use", "auto"]));
    assert_eq!(seen[1]["flags"], serde_json::json!([]));
    assert!(qemu::dirty_ranges(&image, "on").is_err());
    // A raw write to a cluster that is allocated: what any foreign writer does.
    guard.record_write(5 * MIB, 512);
    guard.record_write(40 * MIB - 1, 2);
    assert_eq!(guard.load("on").unwrap().count(), 128 + 2);
    let mut allocator = Allocator::open(file.clone(), &read_header(&*file).unwrap()).unwrap();
    guard.finish(&mut allocator).unwrap();
    qemu::check_is_clean(&image);
    let expected = [0..8 * MIB, 40 * MIB - 64 * KIB..40 * MIB + 64 * KIB];
    assert_eq!(qemu::dirty_ranges(&image, "on").unwrap(), expected);
    // Invalidated: QEMU ignores them, and so do we.
    Guard::invalidate(&*file).unwrap();
    assert!(qemu::info(&image, "qcow2")["format-specific"]["data"]["bitmaps"].is_null());
    let header = read_header(&*file).unwrap();
    assert_eq!(stale_extension(&header).unwrap().count, 2);
    let repaired = repair(&file, RepairOptions::default()).unwrap();
    assert_eq!((repaired.stale_dropped, repaired.has_leaked), (2, false));
    qemu::check_is_clean(&image);
}

#[test]
fn what_must_not_be_written_is_not() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a", 16 * MIB).bitmap("a", 65536).done();
    let bytes = Bytes::of(&image);
    for bit in [incompatible::DIRTY, incompatible::CORRUPT, 1 << 40] {
        bytes.put64(72, bit);
        let before = std::fs::read(&image).unwrap();
        let refused = |e: &Error| matches!(e, Error::Condition { .. } | Error::Unsupported { .. });
        assert!(refused(&BitmapEditor::open(writable(&image)).unwrap_err()));
        assert!(refused(&Guard::take(writable(&image)).unwrap_err()));
        assert!(refused(&strip(&writable(&image)).unwrap_err()));
        assert!(refused(&repair(&writable(&image), RepairOptions::default()).unwrap_err()));
        assert!(std::fs::read(&image).unwrap() == before);
    }
    bytes.put64(72, incompatible::UNFINISHED_COPY);
    assert!(clear_unfinished(&*writable(&image)).unwrap());
    assert!(!clear_unfinished(&*writable(&image)).unwrap());
    qemu::check_is_clean(&image);

    let old = make(&scratch, "v2", 16 * MIB).option("compat=0.10").done();
    let mut editor = BitmapEditor::open(writable(&old)).unwrap();
    assert!(matches!(editor.add_empty("a", 16, true), Err(Error::Refused { .. })));
    let mut editor = BitmapEditor::open(writable(&image)).unwrap();
    for (name, bits) in [("", 16), ("a", 16), ("b", 8), ("b", 32), ("b\0", 16)] {
        let result = editor.add_empty(name, bits, true);
        assert!(matches!(result, Err(Error::Bitmap { .. })), "{name:?} {bits}");
    }
    assert!(editor.add_empty(&"n".repeat(1024), 16, true).is_err());
    editor.add_empty(&"n".repeat(1023), 16, true).unwrap();
    editor.commit().unwrap();
    qemu::check_is_clean(&image);

    let huge = make(&scratch, "huge", 4 << 40).done();
    let mut editor = BitmapEditor::open(writable(&huge)).unwrap();
    assert!(matches!(editor.add_empty("a", 9, true), Err(Error::Bitmap { .. })));
    editor.add_empty("a", 10, true).unwrap();
    editor.commit().unwrap();
    qemu::check_is_clean(&huge);
    agrees_with_qemu(&huge, "a", 4 << 40);
}
