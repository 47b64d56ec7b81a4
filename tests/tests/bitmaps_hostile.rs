//! Bitmaps extensions, directories and tables that lie: a typed error with offset and field, in
//! bounded time and memory, and nothing is written. QEMU's verdict stands beside ours.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitferry_tests::image::{Bytes, make};
use bitferry_tests::random::{Random, seed};
use bitferry_tests::{Peer, Scratch, qemu, require_all};
use qcow2_file::bitmaps::{
    BitmapEditor, Bitmaps, Defect, Finding, RepairOptions, Severity, State, check, repair, strip,
};
use qcow2_file::preflight::read_header;
use qcow2_file::{Access, Error, Guard, HostFile, Result, Storage};

const MIB: u64 = 1 << 20;
const BITMAPS: u32 = 0x2385_2875;

/// An image with two bitmaps and where their parts are.
struct Sample {
    path: PathBuf,
    bytes: Bytes,
    /// Body of the extension.
    extension: u64,
    directory: u64,
    /// The second entry.
    second: u64,
    /// Table of the first bitmap.
    table: u64,
    /// First data cluster of the first bitmap.
    data: u64,
}

fn sample(scratch: &Scratch) -> Sample {
    let path = scratch.path("a");
    let _ = std::fs::remove_file(&path);
    // At this granularity the first bitmap takes three clusters of data; the last is used in part.
    let image = make(scratch, "a", 600 * MIB + 512).bitmap("first", 512).bitmap("second", 65536);
    let image = image.write(1, 0, 3 * MIB).write(2, 600 * MIB, 512).done();
    let bytes = Bytes::of(&image);
    let (extension, _) = bytes.extension(BITMAPS).unwrap();
    let directory = bytes.be64(extension + 16);
    let second = directory + 32;
    let table = bytes.be64(directory);
    let data = bytes.be64(table);
    Sample { path, bytes, extension, directory, second, table, data }
}

fn file(path: &Path) -> Arc<dyn Storage> {
    Arc::new(HostFile::open(path, Access::ReadWrite).unwrap())
}

/// Everything that reads bitmaps, until something fails.
fn read_all(path: &Path) -> Result<()> {
    let file = file(path);
    let header = read_header(&*file)?;
    let Some(bitmaps) = Bitmaps::open(file, &header)? else { return Ok(()) };
    for entry in bitmaps.list().iter().filter(|e| e.state == State::Consistent) {
        bitmaps.load(entry.name())?;
        bitmaps.count_dirty(entry.name())?;
        bitmaps.stored_bytes(entry.name())?;
    }
    Ok(())
}

fn findings(path: &Path) -> Vec<Finding> {
    let file = file(path);
    let header = read_header(&*file).unwrap();
    check(&file, &header).unwrap().findings
}

fn qemu_opens(path: &Path) -> bool {
    qemu::qemu_img("info").args(["-f", "qcow2"]).arg(path).works()
}

/// What breaks, how, the field and the offset named, and whether QEMU opens the image all the same.
type Recipe = (&'static str, fn(&Sample), &'static str, fn(&Sample) -> u64, bool);

/// Rules of the format that make the directory or a bitmap unreadable.
const BROKEN: &[Recipe] = &[
    ("no bitmaps", |s| set32(s, s.extension, 0), "nb_bitmaps", |s| s.extension, false),
    ("65536 bitmaps", |s| set32(s, s.extension, 65536), "nb_bitmaps", |s| s.extension, false),
    (
        "reserved field",
        |s| set32(s, s.extension + 4, 1),
        "bitmaps extension reserved",
        |s| s.extension + 4,
        false,
    ),
    (
        "directory of 2^60 bytes",
        |s| set64(s, s.extension + 8, 1 << 60),
        "bitmap_directory_size",
        |s| s.extension + 8,
        false,
    ),
    (
        "directory misaligned",
        |s| set64(s, s.extension + 16, s.directory + 512),
        "bitmap_directory_offset",
        |s| s.extension + 16,
        false,
    ),
    (
        "directory in the header",
        |s| set64(s, s.extension + 16, 0),
        "bitmap_directory_offset",
        |s| s.extension + 16,
        false,
    ),
    (
        "directory past the end",
        |s| set64(s, s.extension + 16, 1 << 50),
        "bitmap_directory_offset",
        |s| s.extension + 16,
        false,
    ),
    (
        "one bitmap too many",
        |s| set32(s, s.extension, 3),
        "bitmap_directory_size",
        |s| s.extension + 8,
        false,
    ),
    ("one bitmap too few", |s| set32(s, s.extension, 1), "bitmap directory", |s| s.second, false),
    (
        "directory a word short",
        |s| set64(s, s.extension + 8, 56),
        "bitmap name",
        |s| s.second + 24,
        false,
    ),
    (
        "directory a word long",
        |s| set64(s, s.extension + 8, 72),
        "bitmap_directory_offset",
        |s| s.extension + 16,
        false,
    ),
    ("empty name", |s| set16(s, s.second + 18, 0), "bitmap name_size", |s| s.second + 18, false),
    (
        "name of 1024",
        |s| set16(s, s.second + 18, 1024),
        "bitmap name_size",
        |s| s.second + 18,
        false,
    ),
    ("name past the end", |s| set16(s, s.second + 18, 40), "bitmap name", |s| s.second + 24, false),
    ("name not UTF-8", |s| put(s, s.second + 24, &[0xff]), "bitmap name", |s| s.second + 24, true),
    ("name with NUL", |s| put(s, s.second + 25, &[0]), "bitmap name", |s| s.second + 24, true),
    (
        "extra data of 4 GiB",
        |s| set32(s, s.second + 20, u32::MAX),
        "bitmap extra data",
        |s| s.second + 24,
        false,
    ),
    (
        "two names equal",
        |s| {
            set16(s, s.second + 18, 5);
            put(s, s.second + 24, b"first\0\0\0");
        },
        "bitmap name",
        |s| s.second + 24,
        false,
    ),
    ("no table", |s| set64(s, s.second, 0), "bitmap_table_offset", |s| s.second, false),
    (
        "table misaligned",
        |s| set64(s, s.second, s.table + 8),
        "bitmap_table_offset",
        |s| s.second,
        false,
    ),
    (
        "table past the end",
        |s| set64(s, s.second, 1 << 50),
        "bitmap_table_offset",
        |s| s.second,
        true,
    ),
    (
        "table offset of 2^63",
        |s| set64(s, s.second, 1 << 63),
        "bitmap_table_offset",
        |s| s.second,
        false,
    ),
    ("table shared", |s| set64(s, s.second, s.table), "bitmap_table_offset", |s| s.second, true),
    (
        "table in the directory",
        |s| set64(s, s.second, s.directory),
        "bitmap_table_offset",
        |s| s.second,
        true,
    ),
    ("empty table", |s| set32(s, s.second + 8, 0), "bitmap_table_size", |s| s.second + 8, false),
    ("table too long", |s| set32(s, s.second + 8, 2), "bitmap_table_size", |s| s.second + 8, false),
    (
        "table too short",
        |s| set32(s, s.directory + 8, 2),
        "bitmap_table_size",
        |s| s.directory + 8,
        false,
    ),
    (
        "more than 512 MiB",
        |s| {
            set32(s, s.second + 8, 8193);
            set32(s, s.second + 12, 3);
        },
        "bitmap_table_size",
        |s| s.second + 8,
        false,
    ),
    (
        "granularity of 2^64",
        |s| put(s, s.second + 17, &[64]),
        "granularity_bits",
        |s| s.second + 17,
        false,
    ),
    (
        "table entry reserved bits",
        |s| set64(s, s.table, s.data | 4),
        "bitmap table entry",
        |s| s.table,
        false,
    ),
    (
        "table entry high bits",
        |s| set64(s, s.table, s.data | 1 << 60),
        "bitmap table entry",
        |s| s.table,
        false,
    ),
    (
        "all ones and an offset",
        |s| set64(s, s.table, s.data | 1),
        "bitmap table entry",
        |s| s.table,
        false,
    ),
    (
        "data misaligned",
        |s| set64(s, s.table, s.data + 512),
        "bitmap table entry",
        |s| s.table,
        false,
    ),
    (
        "data past the end",
        |s| set64(s, s.table + 8, 1 << 50),
        "bitmap table entry",
        |s| s.table + 8,
        true,
    ),
];

fn put(s: &Sample, at: u64, bytes: &[u8]) {
    s.bytes.put(at, bytes);
}

fn set16(s: &Sample, at: u64, value: u16) {
    s.bytes.put16(at, value);
}

fn set32(s: &Sample, at: u64, value: u32) {
    s.bytes.put32(at, value);
}

fn set64(s: &Sample, at: u64, value: u64) {
    s.bytes.put64(at, value);
}

#[test]
fn every_broken_rule_is_named_and_nothing_is_written() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let mut wrong = Vec::new();
    for (what, break_it, field, at, qemu_opens_it) in BROKEN {
        let s = sample(&scratch);
        break_it(&s);
        let before = std::fs::read(&s.path).unwrap();
        match read_all(&s.path) {
            Err(Error::Malformed { what: m, .. }) if (m.field, m.offset) == (*field, at(&s)) => {}
            other => wrong.push(format!("{what}: {other:?}, expected {field} at {}", at(&s))),
        }
        if qemu_opens(&s.path) != *qemu_opens_it {
            wrong.push(format!("{what}: QEMU opens it: {}", !qemu_opens_it));
        }
        let editor = BitmapEditor::open(file(&s.path)).and_then(|mut e| {
            e.remove("first")?;
            e.commit()
        });
        if editor.is_ok() {
            wrong.push(format!("{what}: edited"));
        }
        // Opening for guest writes may mark bitmaps whose tables are broken; a broken directory is
        // refused.
        if *field != "bitmap table entry" && Guard::take(file(&s.path)).is_ok() {
            wrong.push(format!("{what}: guarded"));
        }
        if std::fs::read(&s.path).unwrap() != before {
            wrong.push(format!("{what}: written"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_check_reports_everything_and_repair_keeps_what_is_sound() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let may_drop = RepairOptions { may_remove_inconsistent: false, may_drop_broken: true };
    for (what, break_it, field, at, _) in BROKEN {
        let s = sample(&scratch);
        break_it(&s);
        // The header itself is broken: nothing here can help.
        if read_header(&*file(&s.path)).is_err() {
            continue;
        }
        let found = findings(&s.path);
        let is_it = |f: &Finding| match &f.defect {
            Defect::Malformed(m) => (m.field, m.offset) == (*field, at(&s)),
            _ => false,
        };
        assert!(found.iter().any(is_it), "{what}: {found:?}");
        let file = file(&s.path);
        assert!(repair(&file, RepairOptions::default()).unwrap().is_nothing(), "{what}");
        let repaired = repair(&file, may_drop).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        assert!(!repaired.has_leaked, "{what}: {repaired:?}");
        qemu::check_is_clean(&s.path);
        assert!(findings(&s.path).is_empty(), "{what}");
        read_all(&s.path).unwrap();
        if *field == "bitmap table entry" {
            assert_eq!(repaired.broken_dropped, ["first"], "{what}");
            let header = read_header(&*file).unwrap();
            let left = Bitmaps::open(file.clone(), &header).unwrap().unwrap();
            assert_eq!(left.list().len(), 1);
            left.load("second").unwrap();
        }
    }
    // Several at once.
    let s = sample(&scratch);
    set64(&s, s.table, s.data | 4);
    set64(&s, s.table + 8, 1 << 50);
    set32(&s, s.second + 8, 7);
    put(&s, s.second + 12, &[0, 0, 0, 3]);
    put(&s, s.directory + 29, &[1]);
    let found = findings(&s.path);
    assert_eq!(found.len(), 4, "{found:?}");
}

#[test]
fn refcounts_overlaps_and_tails_are_found() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let s = sample(&scratch);
    let last = s.bytes.be64(s.table + 16);
    // 600 MiB and one sector: the last bit is bit 1228800.
    s.bytes.put(last + 65535, &[0x80]);
    let found = findings(&s.path);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(
        (&found[0].defect, found[0].defect.severity()),
        (&Defect::TailBits, Severity::Harmless)
    );
    read_all(&s.path).unwrap();
    assert_eq!(repair(&file(&s.path), RepairOptions::default()).unwrap().tails_cleared, ["first"]);
    assert!(findings(&s.path).is_empty());
    qemu::check_is_clean(&s.path);

    let s = sample(&scratch);
    set64(&s, s.table + 8, s.data);
    let overlap = "names a cluster that holds other bitmap data";
    assert!(findings(&s.path).iter().any(|f| f.to_string().contains(overlap)));
    let s = sample(&scratch);
    set64(&s, s.table + 8, s.table);
    let overlap = "names a cluster that holds a bitmap table or the directory";
    assert!(findings(&s.path).iter().any(|f| f.to_string().contains(overlap)));

    let s = sample(&scratch);
    let block = s.bytes.be64(s.bytes.be64(48));
    s.bytes.put16(block + 2 * (s.data >> 16), 0);
    let found = findings(&s.path);
    assert!(matches!(found[0].defect, Defect::Refcount { refcount: 0, .. }), "{found:?}");
    assert!(qemu::check(&s.path).corruptions > 0);
    let before = std::fs::read(&s.path).unwrap();
    let mut editor = BitmapEditor::open(file(&s.path)).unwrap();
    editor.remove("first").unwrap();
    assert!(editor.commit().is_err());
    assert!(std::fs::read(&s.path).unwrap() == before);
    let options = RepairOptions { may_remove_inconsistent: false, may_drop_broken: true };
    assert_eq!(repair(&file(&s.path), options).unwrap().broken_dropped, ["first"]);
    assert_eq!(qemu::check(&s.path).corruptions, 0);
}

type Change = (&'static str, fn(&Sample));

#[test]
fn what_the_spec_allows_is_kept_as_it_is() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let changes: [Change; 3] = [
        ("type", |s| put(s, s.second + 16, &[7])),
        ("flags", |s| put(s, s.second + 12, &[0x80, 0, 0, 0])),
        ("granularity", |s| put(s, s.second + 17, &[40])),
    ];
    for (what, change) in changes {
        let s = sample(&scratch);
        change(&s);
        let entry: [u8; 32] = s.bytes.get(s.second);
        let file = file(&s.path);
        let header = read_header(&*file).unwrap();
        let bitmaps = Bitmaps::open(file.clone(), &header).unwrap().unwrap();
        assert!(matches!(bitmaps.list()[1].state, State::Unknown(_)), "{what}");
        assert!(bitmaps.load("second").is_err());
        bitmaps.load("first").unwrap();
        let mut editor = BitmapEditor::open(file.clone()).unwrap();
        assert!(editor.clear("second").is_err() && editor.set_enabled("second", false).is_err());
        editor.clear("first").unwrap();
        editor.commit().unwrap();
        let header = read_header(&*file).unwrap();
        let directory = header.bitmaps().unwrap().directory_offset;
        assert_eq!(s.bytes.get::<32>(directory + 32), entry, "{what}");
        let mut editor = BitmapEditor::open(file.clone()).unwrap();
        editor.remove("second").unwrap();
        editor.commit().unwrap();
        qemu::check_is_clean(&s.path);
    }
}

#[test]
fn random_damage_never_panics_and_strip_always_helps() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let mut random = Random::new(seed(), "bitmap damage");
    let s = sample(&scratch);
    let sound = std::fs::read(&s.path).unwrap();
    for round in 0..300 {
        std::fs::write(&s.path, &sound).unwrap();
        for _ in 0..=random.below(3) {
            let area = *random.pick(&[(s.extension, 24), (s.directory, 64), (s.table, 24)]);
            let value = if random.one_in(2) { random.next() } else { 1 << random.below(64) };
            let bytes = value.to_be_bytes();
            let len = 1 + random.below(8);
            s.bytes.put(
                area.0 + random.below(area.1 - len + 1),
                &bytes[..usize::try_from(len).unwrap()],
            );
        }
        let _ = read_all(&s.path);
        let file = file(&s.path);
        if let Ok(header) = read_header(&*file) {
            check(&file, &header).unwrap();
        }
        strip(&file).unwrap_or_else(|e| panic!("round {round}: {e:?}"));
        let header = read_header(&*file).unwrap();
        assert!(header.bitmaps().is_none());
        assert_eq!(qcow2_file::check::check(&file, &header).unwrap().leaks, 0, "round {round}");
        if round % 30 == 0 {
            qemu::check_is_clean(&s.path);
        }
    }
}
