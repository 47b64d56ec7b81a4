//! Cuts the power at every write of every change of bitmaps, and holds what is then on disk against
//! invariant 1: a bitmap is never present and stale, and the image is never corrupt.
//!
//! What was synced is on disk. Of what came after, any part may be, down to the sector.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use std::sync::Arc;

use qcow2_file::bitmaps::{
    BitmapEditor, Bitmaps, Bits, MergeSource, PersistentBitmap, Severity, State, check,
};
use qcow2_file::create::{Backing, CreateOptions, NewImage};
use qcow2_file::edit::Allocator;
use qcow2_file::preflight::read_header;
use qcow2_file::storage::{Operation, OperationKind};
use qcow2_file::{Guard, GuestOffset, Memory, Storage};

const SIZE: u64 = 8 << 20;
const SECTOR: usize = 512;

/// xorshift64*: the same states in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

fn bits(granularity_bits: u8, ranges: &[(u64, u64)]) -> Bits {
    let mut bits = Bits::for_disk(SIZE, granularity_bits);
    ranges.iter().for_each(|&(start, end)| bits.set_range(start..end));
    bits
}

fn bitmap(name: &str, granularity_bits: u8, is_enabled: bool, bits: Bits) -> PersistentBitmap {
    PersistentBitmap { name: name.into(), granularity_bits, is_enabled, bits }
}

/// An image with three bitmaps in small clusters, so that tables have several entries.
fn image(backing_name_len: usize) -> Memory {
    image_with(
        backing_name_len,
        &[
            bitmap("fine", 9, true, bits(9, &[(3, 9), (5000, 9000), (16000, 16384)])),
            bitmap("frozen", 9, false, bits(9, &[(1, 2), (4096, 8192)])),
            bitmap("coarse", 16, true, bits(16, &[(0, 1), (100, 128)])),
        ],
    )
}

fn image_with(backing_name_len: usize, bitmaps: &[PersistentBitmap]) -> Memory {
    let memory = Arc::new(Memory::new());
    let mut options = CreateOptions::new(SIZE);
    options.cluster_bits = if backing_name_len > 0 { 11 } else { 9 };
    options.backing = (backing_name_len > 0).then(|| Backing {
        name: "b".repeat(backing_name_len).into(),
        format: Some("raw".into()),
        reader: None,
    });
    let new = NewImage::create(memory.clone(), &options).unwrap();
    new.write_at(&[1; 4096], GuestOffset(0)).unwrap();
    new.finish(bitmaps).unwrap();
    memory.snapshot()
}

/// Everything consistent in the image, by name.
type Seen = Vec<(String, u8, bool, Bits)>;

fn seen(memory: &Arc<Memory>) -> Seen {
    let file: Arc<dyn Storage> = memory.clone();
    let header = read_header(&*file).expect("the header is whole");
    let report = check(&file, &header).unwrap();
    assert!(report.worst() < Some(Severity::Corrupt), "{report:?}");
    let Some(bitmaps) = Bitmaps::open(file, &header).expect("the directory is whole") else {
        return Vec::new();
    };
    let usable = bitmaps.list().iter().filter(|e| e.state == State::Consistent);
    let load = |e: &qcow2_file::bitmaps::Entry| {
        let bits = bitmaps.load(e.name()).unwrap();
        (e.name().to_owned(), e.granularity_bits(), e.is_enabled(), bits)
    };
    usable.map(load).collect()
}

/// Calls `judge` with every state that a cut could leave, and whether it is a plain prefix of the
/// log, which is what a killed process leaves.
fn at_every_cut(base: &Memory, log: &[Operation], mut judge: impl FnMut(usize, Arc<Memory>)) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut synced = 0;
    for cut in 0..=log.len() {
        if cut > 0 && log[cut - 1].kind == OperationKind::Sync {
            synced = cut;
        }
        // 0: a kill, 1: nothing unsynced arrived, others: any sectors of it did.
        for variant in 0..6 {
            let state = base.snapshot();
            log[..synced].iter().for_each(|o| state.apply(o));
            for operation in &log[synced..cut] {
                match (variant, operation.kind) {
                    (1, _) => {}
                    (0, _) => state.apply(operation),
                    (_, OperationKind::Write) => tear(&state, operation, &mut random),
                    (_, _) if random.next() & 1 == 0 => state.apply(operation),
                    _ => {}
                }
            }
            judge(cut, Arc::new(state));
        }
    }
}

fn tear(state: &Memory, write: &Operation, random: &mut Random) {
    let mut at = write.offset;
    let mut rest = write.data.as_slice();
    while !rest.is_empty() {
        let in_sector = at as usize % SECTOR;
        let (piece, tail) = rest.split_at((SECTOR - in_sector).min(rest.len()));
        if random.next() & 1 == 0 {
            state.write_at(piece, at).unwrap();
        }
        at += piece.len() as u64;
        rest = tail;
    }
}

/// Makes a change and holds every cut against "all old or all new".
fn edit_is_atomic(backing_name_len: usize, edit: impl Fn(&mut BitmapEditor)) {
    edit_of_is_atomic(&image(backing_name_len), edit);
}

fn edit_of_is_atomic(base: &Memory, edit: impl Fn(&mut BitmapEditor)) {
    let memory = Arc::new(base.snapshot());
    memory.start_log();
    let mut editor = BitmapEditor::open(memory.clone()).unwrap();
    edit(&mut editor);
    editor.commit().unwrap();
    let log = memory.take_log();
    let (old, new) = (seen(&Arc::new(base.snapshot())), seen(&memory));
    assert_ne!(old, new);
    let backing = read_header(base).unwrap().backing_file;
    at_every_cut(base, &log, |cut, state| {
        let now = seen(&state);
        assert!(now == old || now == new, "cut at {cut}: {now:?}");
        assert_eq!(read_header(&*state).unwrap().backing_file, backing, "cut at {cut}");
        // The next change works on whatever the cut left.
        if cut % 3 == 0 {
            let mut editor = BitmapEditor::open(state.clone()).unwrap();
            editor.add_empty("next", 16, true).unwrap();
            editor.commit().unwrap();
            assert_eq!(seen(&state).len(), now.len() + 1);
        }
    });
}

type Edit = Box<dyn Fn(&mut BitmapEditor)>;

#[test]
fn every_edit_is_old_or_new_at_every_cut() {
    let more = bits(9, &[(77, 8000)]);
    let edits: Vec<Edit> = vec![
        Box::new(|e| e.add_empty("added", 12, true).unwrap()),
        Box::new(|e| e.add(bitmap("added", 10, false, bits(10, &[(5, 4000)]))).unwrap()),
        Box::new(|e| e.remove("fine").unwrap()),
        Box::new(|e| ["fine", "frozen", "coarse"].iter().for_each(|n| e.remove(n).unwrap())),
        Box::new(|e| e.clear("fine").unwrap()),
        Box::new(|e| e.set_enabled("fine", false).unwrap()),
        Box::new(|e| e.rename("coarse", "a much longer name than it had").unwrap()),
        Box::new(move |e| {
            let sources = [
                MergeSource::Named("frozen"),
                MergeSource::Bits { bits: &more, granularity_bits: 9 },
            ];
            e.merge("coarse", &sources).unwrap();
            e.remove("frozen").unwrap();
        }),
    ];
    for edit in edits {
        edit_is_atomic(0, edit);
    }
}

#[test]
fn a_backing_name_survives_every_cut_wherever_it_stands() {
    for len in [1, 5, 40, 200, 400] {
        edit_is_atomic(len, |e| {
            e.remove("fine").unwrap();
            e.remove("frozen").unwrap();
            e.remove("coarse").unwrap();
        });
        edit_is_atomic(len, |e| e.clear("fine").unwrap());
        edit_of_is_atomic(&image_with(len, &[]), |e| e.add_empty("first", 9, true).unwrap());
    }
}

#[test]
fn a_guard_never_leaves_a_bitmap_present_and_stale() {
    let base = image(0);
    let memory = Arc::new(base.snapshot());
    let old = seen(&Arc::new(base.snapshot()));
    memory.start_log();
    let guard = Guard::take(memory.clone()).unwrap();
    // The guest's data: any write that the guard covers. The first data cluster of this image.
    let data_at = 512 * 200;
    memory.write_at(&[0xee; 512], data_at).unwrap();
    guard.record_write(7_000_000, 1000);
    guard.add(bitmap("added", 16, true, bits(16, &[(1, 2)]))).unwrap();
    memory.write_at(&[0xdd; 512], data_at).unwrap();
    guard.record_write(1 << 20, 1);
    let header = read_header(&*memory).unwrap();
    let mut allocator = Allocator::open(memory.clone(), &header).unwrap();
    guard.finish(&mut allocator).unwrap();
    let log = memory.take_log();
    let new = seen(&memory);
    let expected = |old: &Seen| {
        let mut all = old.clone();
        for (name, granularity_bits, _, bits) in &mut all {
            if name != "frozen" {
                let g = *granularity_bits;
                bits.set_range(7_000_000 >> g..(7_000_999 >> g) + 1);
                bits.set_range((1 << 20) >> g..((1 << 20) >> g) + 1);
            }
        }
        all.push(("added".into(), 16, true, bits(16, &[(1, 2), (16, 17)])));
        all
    };
    assert_eq!(new, expected(&old));
    let first_guest_write = log.iter().position(|o| o.data == [0xee; 512]).unwrap();
    let frozen: Seen = old.iter().filter(|b| b.0 == "frozen").cloned().collect();
    at_every_cut(&base, &log, |cut, state| {
        let now = seen(&state);
        if cut <= first_guest_write {
            assert!(now.iter().all(|b| old.contains(b)), "cut at {cut}: {now:?}");
        } else {
            assert!(now == frozen || now == new, "cut at {cut}: {now:?}");
        }
    });
}

#[test]
fn a_guard_that_saw_no_write_only_clears_its_flags() {
    let base = image(0);
    let memory = Arc::new(base.snapshot());
    let old = seen(&Arc::new(base.snapshot()));
    let guard = Guard::take(memory.clone()).unwrap();
    assert_eq!(seen(&memory).len(), 1);
    let header = read_header(&*memory).unwrap();
    memory.start_log();
    guard.finish(&mut Allocator::open(memory.clone(), &header).unwrap()).unwrap();
    let log = memory.take_log();
    assert_eq!(seen(&memory), old);
    assert_eq!(log.iter().filter(|o| o.kind == OperationKind::Write).count(), 1);
    // Dropped instead of finished: nothing comes back.
    drop(Guard::take(memory.clone()).unwrap());
    assert_eq!(seen(&memory).len(), 1);
    let guard = Guard::take(memory.clone()).unwrap();
    guard.finish(&mut Allocator::open(memory.clone(), &header).unwrap()).unwrap();
    assert_eq!(seen(&memory).len(), 1);
}

#[test]
fn a_foreign_writer_may_clear_the_autoclear_bit_under_a_guard() {
    let memory = Arc::new(image(0));
    let guard = Guard::take(memory.clone()).unwrap();
    Guard::invalidate(&*memory).unwrap();
    assert!(seen(&memory).is_empty());
    guard.record_write(0, 1 << 20);
    let header = read_header(&*memory).unwrap();
    guard.finish(&mut Allocator::open(memory.clone(), &header).unwrap()).unwrap();
    let now = seen(&memory);
    assert_eq!(now.len(), 3);
    assert!(now.iter().find(|b| b.0 == "fine").unwrap().3.get(100));
}

#[test]
fn a_failure_anywhere_leaves_old_or_new() {
    let base = image(0);
    let old = seen(&Arc::new(base.snapshot()));
    let change = |memory: &Arc<Memory>| {
        let mut editor = BitmapEditor::open(memory.clone())?;
        editor.clear("fine")?;
        editor.commit()
    };
    let memory = Arc::new(base.snapshot());
    change(&memory).unwrap();
    let new = seen(&memory);
    for kind in [OperationKind::Write, OperationKind::Sync, OperationKind::Read] {
        for after in 0.. {
            let memory = Arc::new(base.snapshot());
            memory.inject(qcow2_file::storage::Fault::new(kind, after, 28));
            let result = change(&memory);
            memory.clear_faults();
            let now = seen(&memory);
            assert!(now == old || now == new, "{kind:?} {after}");
            if result.is_ok() {
                assert_eq!(now, new);
                break;
            }
        }
    }
}
