//! What an editor must refuse, mark, report and survive.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bitferry_tests::image::{self, Bytes};
use bitferry_tests::peer::{Peer, require_all};
use bitferry_tests::qemu;
use bitferry_tests::random::{Random, seed};
use bitferry_tests::scratch::Scratch;
use qcow2_file::check::check;
use qcow2_file::edit::{BitmapPolicy, Editor, EditorOptions, WriteObserver, ZeroMode};
use qcow2_file::limits;
use qcow2_file::preflight::read_header;
use qcow2_file::storage::{Fault, OperationKind};
use qcow2_file::{Access, Condition, Error, GuestOffset, HostFile, LayerKind, Memory, Storage};

fn has_qemu() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

fn open_file(path: &Path) -> Arc<dyn Storage> {
    Arc::new(HostFile::open(path, Access::ReadWrite).unwrap())
}

fn open(path: &Path) -> Result<Editor, Error> {
    Editor::open(open_file(path), EditorOptions::default())
}

fn sample(scratch: &Scratch) -> PathBuf {
    let maker = image::make(scratch, "image.qcow2", 64 << 20).write(1, 0, 1 << 20);
    maker.bitmap("b0", 65536).write(2, 8 << 20, 1 << 20).done()
}

/// An image made wrong by `damage` is refused, and no byte of it changes.
#[track_caller]
fn refused_untouched(damage: impl Fn(&Bytes)) -> String {
    let scratch = Scratch::new();
    let path = sample(&scratch);
    damage(&Bytes::of(&path));
    let before = std::fs::read(&path).unwrap();
    let error = open(&path).expect_err("refused");
    assert!(std::fs::read(&path).unwrap() == before, "{error} came after a write");
    match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[test]
fn what_is_corrupt_is_never_written() {
    if !has_qemu() {
        return;
    }
    let l2 = |b: &Bytes| b.be64(b.be64(40)) & 0x00ff_ffff_ffff_fe00;
    let block = |b: &Bytes| b.be64(b.be64(48));
    let text = refused_untouched(|b| {
        b.put64(b.be64(48), 0);
    });
    assert!(text.contains("refcount_table_entry"), "{text}");
    let text = refused_untouched(|b| {
        b.put64(l2(b) + 8, b.be64(40) | 1 << 63);
    });
    assert!(text.contains("l2_entry"), "{text}");
    let text = refused_untouched(|b| {
        b.put(block(b), &[0; 4096]);
    });
    assert!(text.contains("refcount at offset"), "{text}");
    let text = refused_untouched(|b| {
        b.put64(l2(b), 0x7fff_ffff_0000 | 1 << 63);
    });
    assert!(text.contains("l2_entry"), "{text}");
    let text = refused_untouched(|b| {
        b.put64(b.be64(40), 0x200);
    });
    assert!(text.contains("l1_entry"), "{text}");
    // Incompatible bits: dirty, corrupt, unknown, and ours.
    for (bits, word) in [(1, "closed"), (2, "corrupt"), (1 << 40, "feature"), (1 << 62, "finished")]
    {
        let text = refused_untouched(|b| {
            b.put64(72, bits);
        });
        assert!(text.contains(word), "{text}");
    }
    let text = refused_untouched(|b| {
        b.put32(32, 2);
    });
    assert!(text.contains("LUKS"), "{text}");
}

#[test]
fn a_file_cut_short_is_refused_or_sound() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let path = sample(&scratch);
    let whole = std::fs::read(&path).unwrap();
    let mut random = Random::new(seed(), "cut short");
    for _ in 0..200 {
        let len = random.below(whole.len() as u64 + 1) as usize;
        let memory = Arc::new(Memory::from_bytes(&whole[..len]));
        match Editor::open(memory.clone(), EditorOptions::default()) {
            Ok(editor) => {
                assert!(whole.len() - len < 65536, "cut at {len}");
                editor.write_at(&[7; 300_000], GuestOffset(3)).unwrap();
                editor.close().unwrap();
            }
            Err(_) => assert!(memory.to_bytes() == whole[..len], "cut at {len}"),
        }
    }
}

/// Random damage anywhere in the metadata: refused without a change, or sound before and after.
#[test]
fn damage_is_refused_or_harmless() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let mut random = Random::new(seed(), "damage");
    for options in ["cluster_size=4k", "cluster_size=16k,extended_l2=on", "cluster_size=512"] {
        let maker = image::make(&scratch, "damaged.qcow2", 1 << 20).option(options);
        let maker = maker.write(1, 0, 300_032).io("write -c -P 2 512k 128k").snapshot("s");
        let path = maker.bitmap("b", 4096).write(3, 65536, 65536).done();
        let whole = std::fs::read(&path).unwrap();
        let (mut refused, mut opened) = (0, 0);
        for _ in 0..300 {
            let memory = Arc::new(Memory::from_bytes(&whole));
            for _ in 0..1 + random.below(3) {
                damage(&memory, &mut random);
            }
            let damaged = memory.to_bytes();
            let Ok(editor) = Editor::open(memory.clone(), EditorOptions::default()) else {
                assert!(memory.to_bytes() == damaged, "written to before it was refused");
                refused += 1;
                continue;
            };
            opened += 1;
            // What a compressed cluster holds is found out when it is read.
            let _ = editor.write_at(&[7; 200_000], GuestOffset(10_000));
            // The disk may have become smaller.
            let discarded = editor.discard(GuestOffset(500_000), 200_000);
            let written = editor.write_at(&[8; 4096], GuestOffset(0));
            if editor.virtual_size() >= 1 << 20 {
                discarded.and(written).unwrap();
            }
            editor.close().unwrap();
            sound(&memory);
        }
        assert!(refused > 50 && opened > 5, "{options}: {refused} refused, {opened} opened");
    }
}

fn damage(memory: &Memory, random: &mut Random) {
    let word = |at: u64| {
        let mut bytes = [0; 8];
        memory.read_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let length = memory.len().unwrap();
    let pointer = |at: u64| word(at % length) & 0x00ff_ffff_ffff_fe00;
    let table = match random.below(8) {
        0 => 0,
        1 => word(40),
        2 => pointer(word(40)),
        3 => word(48),
        4 => pointer(word(48)),
        5 => word(64),
        6 => random.below(length),
        _ => word(64) & !4095,
    };
    let at = (table + random.below(64) * 8) % (length - 8);
    let old = word(at);
    let new = match random.below(5) {
        0 => 0,
        1 => old ^ (1 << random.below(64)),
        2 => old.wrapping_add(512 << random.below(8)),
        3 => random.next() & 0xc000_0000_000f_fe00,
        _ => random.next(),
    };
    memory.write_at(&new.to_be_bytes(), at).unwrap();
}

#[test]
fn bitmaps_follow_every_change() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let maker = image::make(&scratch, "image.qcow2", 64 << 20).write(1, 0, 8 << 20);
    let maker = maker.bitmap("on", 65536).disabled_bitmap("off", 65536);
    let path = maker.write(0x71, 1 << 20, 65536).done();
    let editor = open(&path).unwrap();
    let info = qemu::qemu_img("info").args(["-U", "--output=json"]).arg(&path).ok();
    assert!(info.contains("in-use"), "marked before the first write");
    editor.write_at(&[5; 70_000], GuestOffset(40 << 20)).unwrap();
    editor.write_zeroes(GuestOffset(2 << 20), 100, ZeroMode::Free).unwrap();
    editor.discard(GuestOffset(4 << 20), 65536).unwrap();
    editor.discard(GuestOffset((6 << 20) + 1), 10).unwrap();
    assert!(editor.write_at(&[1], GuestOffset(64 << 20)).is_err(), "beyond the end");
    editor.close().unwrap();
    qemu::check_is_clean(&path);
    let dirty = qemu::dirty_ranges(&path, "on").unwrap();
    let m = |n: u64| n << 20;
    let granule = |at: u64, n: u64| at..at + n * 65536;
    let expected =
        [granule(m(1), 1), granule(m(2), 1), granule(m(4), 1), granule(m(6), 1), granule(m(40), 2)];
    assert_eq!(dirty, expected);
    assert_eq!(qemu::dirty_ranges(&path, "off").unwrap(), []);
    // Dropped, not closed: marked as in use for good.
    drop(open(&path).unwrap());
    assert!(qemu::dirty_ranges(&path, "on").is_err());
    assert_eq!(qemu::dirty_ranges(&path, "off").unwrap(), []);
}

#[test]
fn invalidated_bitmaps_are_not_there_for_qemu() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let path = sample(&scratch);
    let options = EditorOptions { bitmaps: BitmapPolicy::Invalidate, ..EditorOptions::default() };
    let editor = Editor::open(open_file(&path), options).unwrap();
    assert!(editor.guard().is_none());
    editor.write_at(&[1; 10], GuestOffset(0)).unwrap();
    editor.close().unwrap();
    assert!(qemu::info(&path, "qcow2")["format-specific"]["data"]["bitmaps"].is_null());
    assert_eq!(qemu::check(&path).corruptions, 0);
}

#[test]
fn an_unfinished_copy_opens_nowhere_else() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let path = sample(&scratch);
    let copying = || EditorOptions { is_in_place_copy: true, ..EditorOptions::default() };
    let editor = Editor::open(open_file(&path), copying()).unwrap();
    assert!(!editor.is_marked());
    let works = || qemu::qemu_img("info").args(["-U"]).arg(&path).works();
    assert!(works(), "nothing was written yet");
    editor.write_at(&[1; 100], GuestOffset(5000)).unwrap();
    assert!(editor.is_marked());
    let output = qemu::qemu_img("info").args(["-U"]).arg(&path).output();
    assert!(output.complaint().contains("bitferry: unfinished in-place copy"), "{output}");
    drop(editor);
    let error = open(&path).unwrap_err();
    let condition = Condition::UnfinishedCopy;
    assert!(
        matches!(&error, Error::Condition { condition: found, .. } if *found == condition),
        "{error}"
    );
    let editor = Editor::open(open_file(&path), copying()).unwrap();
    assert!(editor.is_marked());
    editor.write_at(&[2; 100], GuestOffset(5000)).unwrap();
    editor.close().unwrap();
    assert!(works());
    qemu::check_is_clean(&path);
    // Version 2 has no feature bits.
    let v2 = image::make(&scratch, "v2.qcow2", 1 << 20).option("compat=0.10").done();
    let editor = Editor::open(open_file(&v2), copying()).unwrap();
    editor.write_at(&[1; 100], GuestOffset(0)).unwrap();
    assert!(!editor.is_marked());
    editor.close().unwrap();
    qemu::check_is_clean(&v2);
}

#[test]
fn features_of_others_are_kept_or_cleared_as_the_spec_says() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let data = scratch.path("d.raw");
    let maker = image::make(&scratch, "raw.qcow2", 4 << 20).option("data_file_raw=on");
    let path = maker.option(format!("data_file={}", data.display())).done();
    let bytes = Bytes::of(&path);
    // An autoclear bit and a compatible bit of the future.
    bytes.put64(88, bytes.be64(88) | 1 << 7).put64(80, 1 << 9);
    let options = || EditorOptions { data: Some(open_file(&data)), ..EditorOptions::default() };
    assert!(open(&path).is_err(), "without its data file");
    let editor = Editor::open(open_file(&path), options()).unwrap();
    assert_eq!((bytes.be64(88), bytes.be64(80)), (2, 1 << 9));
    editor.write_at(&[1; 9000], GuestOffset(1000)).unwrap();
    editor.close().unwrap();
    assert_eq!(&std::fs::read(&data).unwrap()[1000..10_000], &[1; 9000]);
    qemu::check_is_clean(&path);
}

#[derive(Debug, Default)]
struct Seen(Mutex<Vec<(u64, u64)>>);

impl WriteObserver for Seen {
    fn wrote(&self, at: GuestOffset, len: u64) {
        self.0.lock().unwrap().push((at.0, len));
    }
}

fn memory_of(path: &Path) -> Arc<Memory> {
    Arc::new(Memory::from_bytes(&std::fs::read(path).unwrap()))
}

#[track_caller]
fn sound(memory: &Memory) -> u64 {
    let file: Arc<dyn Storage> = Arc::new(memory.snapshot());
    let report = check(&file, &read_header(&*file).unwrap()).unwrap();
    assert!(!report.is_corrupt(), "{:?}", report.findings.first());
    report.leaks
}

/// Fails every operation in turn; whatever was being done, the image stays sound, a failed sync or
/// metadata write ends the editor for good, and failed writes are reported like others.
#[test]
fn every_failure_leaves_a_sound_image() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let maker = image::make(&scratch, "image.qcow2", 4 << 20).option("cluster_size=4k");
    let path = maker.write(1, 0, 1 << 20).snapshot("s").bitmap("b", 4096).done();
    let failing = [
        (OperationKind::Write, libc_errno::ENOSPC),
        (OperationKind::Write, libc_errno::EIO),
        (OperationKind::Sync, libc_errno::EIO),
        (OperationKind::WriteZeroes, libc_errno::ENOSPC),
        (OperationKind::Read, libc_errno::EIO),
    ];
    for (kind, errno) in failing {
        for after in 0..24 {
            let memory = memory_of(&path);
            let seen = Arc::new(Seen::default());
            let options = EditorOptions { observer: Some(seen.clone()), ..Default::default() };
            let editor = Editor::open(memory.clone(), options).unwrap();
            memory.inject(Fault { torn_bytes: 600, ..Fault::new(kind, after, errno) });
            let (mut is_failed, mut is_sync_failed) = (false, false);
            for round in 0..6u64 {
                let at = GuestOffset(round * 300_001 % (3 << 20));
                let results = [
                    editor.write_at(&vec![round as u8; 150_000], at),
                    editor.discard(at, 50_000),
                    editor.write_zeroes(at, 20_000, ZeroMode::Keep),
                    editor.sync(),
                ];
                is_failed |= results.iter().any(Result::is_err);
                is_sync_failed |= results[3].is_err();
            }
            assert!(seen.0.lock().unwrap().len() >= 3, "failed writes are told, too");
            if !is_failed {
                assert_ne!(kind, OperationKind::Write, "{after}");
            }
            sound(&memory);
            memory.clear_faults();
            if is_sync_failed {
                assert!(editor.write_at(&[1], GuestOffset(0)).is_err(), "poisoned");
                assert!(editor.sync().is_err(), "poisoned");
                assert!(editor.read_at(&mut [0], GuestOffset(0)).is_err(), "poisoned");
                assert!(editor.close().is_err(), "poisoned");
            }
            sound(&memory);
        }
    }
}

mod libc_errno {
    pub(crate) const EIO: i32 = 5;
    pub(crate) const ENOSPC: i32 = 28;
}

/// No space for data is an error of that write alone.
#[test]
fn no_space_for_data_can_be_tried_again() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let path = image::make(&scratch, "image.qcow2", 4 << 20).write(1, 0, 1 << 20).done();
    let memory = memory_of(&path);
    let editor = Editor::open(memory.clone(), EditorOptions::default()).unwrap();
    memory.inject(Fault::new(OperationKind::Write, 0, libc_errno::ENOSPC));
    let data = vec![9; 500_000];
    let error = editor.write_at(&data, GuestOffset(1 << 20)).unwrap_err();
    assert!(matches!(error, Error::Io { action: "write", .. }), "{error}");
    memory.clear_faults();
    editor.write_at(&data, GuestOffset(1 << 20)).unwrap();
    let mut back = vec![0; data.len()];
    editor.read_at(&mut back, GuestOffset(1 << 20)).unwrap();
    assert!(back == data);
    editor.close().unwrap();
    assert_eq!(sound(&memory), 0, "what the failed write had allocated was given back");
}

/// Two threads in one cluster, one writes and one zeroes: no acknowledged write is lost.
#[test]
fn a_write_beside_a_zero_is_not_lost() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let path = image::make(&scratch, "image.qcow2", 64 << 20).done();
    let editor = open(&path).unwrap();
    let clusters = 1000u64;
    let barrier = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let each = |work: fn(&Editor, u64)| {
            let (barrier, editor) = (&barrier, &editor);
            move || {
                for c in 0..clusters {
                    barrier.wait();
                    work(editor, c << 16);
                }
            }
        };
        scope.spawn(each(|e, at| e.write_at(&[7; 4096], GuestOffset(at)).unwrap()));
        scope.spawn(each(|e, at| {
            e.write_zeroes(GuestOffset(at + 8192), 4096, ZeroMode::Free).unwrap();
        }));
    });
    for c in 0..clusters {
        let mut buf = [0; 4096];
        editor.read_at(&mut buf, GuestOffset(c << 16)).unwrap();
        assert_eq!(buf, [7; 4096], "cluster {c}");
    }
    editor.close().unwrap();
    qemu::check_is_clean(&path);
}

/// The refcount table moves, several times, and is found by QEMU.
#[test]
fn the_refcount_table_grows() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let options = "cluster_size=512,refcount_bits=64";
    let path = image::make(&scratch, "image.qcow2", 12 << 20).option(options).done();
    let bytes = Bytes::of(&path);
    let before = (bytes.be64(48), bytes.be32(56));
    let editor = open(&path).unwrap();
    for i in 0..48u64 {
        editor.write_at(&vec![i as u8 + 1; 256 << 10], GuestOffset(i << 18)).unwrap();
        if i % 7 == 0 {
            editor.sync().unwrap();
        }
    }
    editor.close().unwrap();
    let after = (bytes.be64(48), bytes.be32(56));
    assert!(after.0 != before.0 && after.1 > before.1, "{before:?} {after:?}");
    qemu::check_is_clean(&path);
}

/// Freed room goes back to the file system and is used again.
#[test]
fn freed_clusters_are_reused() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let path = image::make(&scratch, "image.qcow2", 64 << 20).write(1, 0, 32 << 20).done();
    let editor = open(&path).unwrap();
    let length = std::fs::metadata(&path).unwrap().len();
    editor.discard(GuestOffset(0), 16 << 20).unwrap();
    editor.sync().unwrap();
    assert!(qemu::allocated_bytes(&path) < 20 << 20);
    assert_eq!(editor.extent(GuestOffset(0), 1 << 20).unwrap().kind, LayerKind::Unallocated);
    editor.write_at(&vec![3; 16 << 20], GuestOffset(40 << 20)).unwrap();
    editor.close().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), length);
    qemu::check_is_clean(&path);
}

/// More L2 tables than are kept in memory, and more freed clusters than may wait.
#[test]
fn caches_have_bounds() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let maker = image::make(&scratch, "image.qcow2", 512 << 20).option("cluster_size=512");
    let path = maker.done();
    let editor = open(&path).unwrap();
    let span = editor.geometry().l2_span();
    let tables = editor.virtual_size() / span;
    assert!(tables > 3 * limits::MAX_EDITOR_TABLES / 2);
    let byte_of = |n: u64| (n % 251) as u8 + 1;
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let editor = &editor;
            scope.spawn(move || {
                for n in (thread..tables).step_by(2) {
                    editor.write_at(&[byte_of(n); 700], GuestOffset(n * span + 100)).unwrap();
                }
            });
        }
    });
    for n in 0..tables {
        let mut buf = [0; 800];
        editor.read_at(&mut buf, GuestOffset(n * span + 50)).unwrap();
        assert_eq!((buf[49], buf[50], buf[749], buf[750]), (0, byte_of(n), byte_of(n), 0), "{n}");
    }
    let many = limits::MAX_PENDING_FREES * 512 * 3 / 2;
    editor.write_at(&vec![1; many as usize], GuestOffset(0)).unwrap();
    let length = std::fs::metadata(&path).unwrap().len();
    editor.discard(GuestOffset(0), many).unwrap();
    // Nothing asked for a flush, and yet most of the room can be used.
    editor.write_at(&vec![2; many as usize / 2], GuestOffset(256 << 20)).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), length);
    editor.close().unwrap();
    qemu::check_is_clean(&path);
}
