//! `qcow2_file::check` against `qemu-img check`: clean, leaking and corrupt images.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::path::Path;
use std::sync::Arc;

use bitferry_tests::peer::{Peer, require_all};
use bitferry_tests::random::{Random, seed};
use bitferry_tests::scratch::Scratch;
use bitferry_tests::{image, qemu};
use qcow2_file::check::{CheckReport, FindingKind, check, reclaim};
use qcow2_file::layout::header::Header;
use qcow2_file::preflight::read_header;
use qcow2_file::{Access, HostFile, Storage};

fn has_qemu() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo])
}

fn checked(path: &Path) -> Result<CheckReport, String> {
    let file: Arc<dyn Storage> =
        Arc::new(HostFile::open(path, Access::Read).map_err(|e| e.to_string())?);
    let mut bytes = vec![0; 2 << 20];
    file.read_at(&mut bytes, 0).map_err(|e| e.to_string())?;
    let header = Header::decode(&bytes).map_err(|e| e.to_string())?;
    check(&file, &header).map_err(|e| format!("{e}: {:?}", std::error::Error::source(&e)))
}

/// Checks with both and compares the verdicts.
#[track_caller]
fn agree(path: &Path) -> CheckReport {
    let theirs = qemu::check(path);
    let ours = checked(path).unwrap();
    assert_eq!(ours.leaks, theirs.leaks, "{}: {:?}", path.display(), ours.findings);
    assert_eq!(ours.is_corrupt(), theirs.corruptions > 0, "{:?} {theirs:?}", ours.findings);
    ours
}

/// Kinds of images: name, creation options, whether compressed clusters and snapshots are
/// possible.
const KINDS: &[(&str, &[&str], bool)] = &[
    ("v2", &["compat=0.10"], true),
    ("v3", &[], true),
    ("small-clusters", &["cluster_size=512"], true),
    ("large-clusters", &["cluster_size=2M"], true),
    ("refcount-1", &["refcount_bits=1"], false),
    ("refcount-2", &["refcount_bits=2"], false),
    ("refcount-64", &["refcount_bits=64", "cluster_size=4k"], true),
    ("extended", &["extended_l2=on"], true),
    ("zstd", &["compression_type=zstd"], true),
    ("preallocated", &["preallocation=metadata"], false),
    ("lazy", &["lazy_refcounts=on"], true),
];

fn make(scratch: &Scratch, kind: usize) -> std::path::PathBuf {
    let (name, options, can_share) = KINDS[kind];
    let mut maker = image::make(scratch, &format!("{name}.qcow2"), 24 << 20);
    for option in options {
        maker = maker.option(*option);
    }
    maker = maker.write(1, 0, 3 << 20).write(2, 9 << 20, 100_000 / 512 * 512);
    if can_share {
        maker = maker.io("write -c -P 5 16M 2M").io("write -c -P 6 20M 2M");
        maker = maker.snapshot("s1").write(3, 1 << 20, 1 << 20).snapshot("s2");
    }
    maker = maker.write(4, 4 << 20, 512).io("write -z 5M 2M").io("discard 0 2M");
    if name != "v2" {
        maker = maker.bitmap("b0", 65536).disabled_bitmap("b1", 512).write(9, 6 << 20, 1 << 20);
    }
    maker.done()
}

#[test]
fn healthy_images_are_clean() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    for kind in 0..KINDS.len() {
        let path = make(&scratch, kind);
        let report = agree(&path);
        assert!(report.is_clean(), "{}: {:?}", path.display(), report.findings);
    }
    let raw = image::make(&scratch, "raw-data.qcow2", 4 << 20);
    let raw = raw.option(format!("data_file={}", scratch.path("d.raw").display()));
    let raw = raw.option("data_file_raw=on").write(1, 0, 1 << 20).bitmap("b", 65536).done();
    assert!(agree(&raw).is_clean());
    let other = image::make(&scratch, "data.qcow2", 4 << 20);
    let other = other.option(format!("data_file={}", scratch.path("e.raw").display()));
    let other = other.write(1, 0, 1 << 20).io("write -z 2M 1M").io("discard 0 64k").done();
    assert!(agree(&other).is_clean());
}

/// Changes random words of the tables and compares the verdicts wherever QEMU gives one.
#[test]
fn damaged_images_are_seen_as_qemu_sees_them() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let mut random = Random::new(seed(), "check");
    let healthy: Vec<_> = (0..KINDS.len()).map(|kind| make(&scratch, kind)).collect();
    for round in 0..60 {
        let path = scratch.path("damaged.qcow2");
        std::fs::copy(&healthy[round % KINDS.len()], &path).unwrap();
        let bytes = image::Bytes::of(&path);
        let l1 = bytes.be64(40);
        let l2 = bytes.be64(l1) & 0x00ff_ffff_ffff_fe00;
        let refcount_table = bytes.be64(48);
        let block = bytes.be64(refcount_table);
        let table = *random.pick(&[l1, l2, l2, refcount_table, block, block]);
        let at = table + random.below(32) * 8;
        let old = bytes.be64(at);
        let new = match random.below(4) {
            0 => 0,
            1 => old ^ (1 << random.below(64)),
            2 => old.wrapping_add(1 << bytes.be32(20)),
            _ => random.next() & 0x8000_0000_0fff_ffff,
        };
        bytes.put64(at, new);
        let run = qemu::qemu_img("check").args(["--output=json"]).arg(&path);
        let output = run.output();
        if output.code() == Some(1) {
            continue;
        }
        let text = output.text();
        let theirs: serde_json::Value = serde_json::from_str(&text).unwrap();
        let number = |key: &str| theirs[key].as_u64().unwrap_or(0);
        let ours = checked(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let what = format!(
            "{} {at:#x}: {old:#x} -> {new:#x}\n{text}{}\n{:#?}",
            KINDS[round % KINDS.len()].0,
            output.complaint(),
            ours.findings
        );
        // Ours is stricter, never laxer.
        if number("corruptions") > 0 || number("check-errors") > 0 {
            assert!(ours.is_corrupt(), "{what}");
        } else if !ours.is_corrupt() {
            assert_eq!(ours.leaks, number("leaks"), "{what}");
        } else {
            let strict = |f: &qcow2_file::check::Finding| {
                !matches!(f.kind, FindingKind::Refcount | FindingKind::PastEnd)
            };
            assert!(ours.findings.iter().any(strict), "{what}");
        }
    }
}

#[test]
fn leaks_are_counted() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let path = image::make(&scratch, "leak.qcow2", 8 << 20).write(1, 0, 1 << 20).done();
    let bytes = image::Bytes::of(&path);
    let l2 = bytes.be64(bytes.be64(40)) & 0x00ff_ffff_ffff_fe00;
    bytes.put64(l2, 0).put64(l2 + 8, 0).put64(l2 + 40, 0);
    let report = agree(&path);
    assert_eq!((report.leaks, report.corruptions), (3, 0));
    // A dropped bitmaps bit leaks all of the bitmap.
    let path = image::make(&scratch, "bitmap.qcow2", 8 << 20).bitmap("b", 65536);
    let path = path.write(1, 0, 1 << 20).done();
    image::Bytes::of(&path).put64(88, 0);
    assert_eq!(agree(&path).leaks, 3);
}

#[test]
fn counts_that_are_too_high_are_lowered_where_flags_say_so() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let maker = image::make(&scratch, "shared.qcow2", 8 << 20).write(1, 0, 256 << 10);
    let path = maker.snapshot("s").write(2, 0, 65536).write(3, 1 << 20, 128 << 10).done();
    let bytes = image::Bytes::of(&path);
    let offset = 0x00ff_ffff_ffff_fe00;
    let (active, block) = (bytes.be64(bytes.be64(40)) & offset, bytes.be64(bytes.be64(48)));
    let (head, word) = (bytes.be64(64), |at: u64| bytes.be64(at) & offset);
    let old = word(word(word(head)));
    // One that only the snapshot has, and one that both have.
    for (cluster, count) in [(old >> 16, 2), (word(active + 8) >> 16, 3)] {
        bytes.put16(block + cluster * 2, count);
    }
    assert_eq!(agree(&path).leaks, 2);
    let reclaimed = |path: &Path| {
        let file: Arc<dyn Storage> = Arc::new(HostFile::open(path, Access::ReadWrite).unwrap());
        reclaim(&file, &read_header(&*file).unwrap()).unwrap()
    };
    assert_eq!(reclaimed(&path), 2);
    qemu::check_is_clean(&path);
    // One that the active image alone has, and does not say so.
    let entry = active + 16 * 8;
    bytes.put64(entry, word(entry)).put16(block + (word(entry) >> 16) * 2, 2);
    assert_eq!((agree(&path).leaks, reclaimed(&path), agree(&path).leaks), (1, 0, 1));
}

#[test]
fn overlaps_with_matching_counts_are_seen() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let path = image::make(&scratch, "l1.qcow2", 8 << 20).write(1, 0, 65536).done();
    let bytes = image::Bytes::of(&path);
    let l1 = bytes.be64(40);
    let l2 = bytes.be64(l1) & 0x00ff_ffff_ffff_fe00;
    let block = bytes.be64(bytes.be64(48));
    // The second guest cluster is the L1 table, counted twice and without the COPIED flag.
    bytes.put64(l2 + 8, l1).put16(block + (l1 >> 16) * 2, 2);
    let report = checked(&path).unwrap();
    let found = &report.findings[0];
    assert_eq!(found.kind, FindingKind::Overlap);
    assert_eq!((found.what.offset, found.what.field), (l2 + 8, "l2_entry"));
}
