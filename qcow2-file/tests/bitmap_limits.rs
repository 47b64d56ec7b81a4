//! Bitmaps at the limits of the format: cost follows what is set, not what could be.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::sync::Arc;

use qcow2_file::bitmaps::{BitmapEditor, Bitmaps, Bits, PersistentBitmap, check};
use qcow2_file::create::{CreateOptions, NewImage};
use qcow2_file::edit::Allocator;
use qcow2_file::preflight::read_header;
use qcow2_file::{Guard, Memory, Storage};

fn image(size: u64, bitmaps: &[PersistentBitmap]) -> Arc<dyn Storage> {
    let memory = Arc::new(Memory::new());
    let mut options = CreateOptions::new(size);
    options.cluster_bits = if size < 1 << 40 { 9 } else { 16 };
    let new = NewImage::create(memory.clone(), &options).unwrap();
    new.finish(bitmaps).unwrap();
    memory
}

fn open(file: &Arc<dyn Storage>) -> Bitmaps {
    Bitmaps::open(file.clone(), &read_header(&**file).unwrap()).unwrap().unwrap()
}

#[test]
fn as_many_bitmaps_as_the_format_allows() {
    let bits = Bits::for_disk(1 << 20, 16);
    let new = |i: u32| PersistentBitmap {
        name: format!("bitmap-{i}"),
        granularity_bits: 16,
        is_enabled: i.is_multiple_of(2),
        bits: bits.clone(),
    };
    let all: Vec<_> = (0..65535).map(new).collect();
    let file = image(1 << 20, &all);
    assert_eq!(open(&file).list().len(), 65535);
    assert!(check(&file, &read_header(&*file).unwrap()).unwrap().findings.is_empty());
    let mut editor = BitmapEditor::open(file.clone()).unwrap();
    assert!(editor.add_empty("one more", 16, true).is_err());
    editor.remove("bitmap-7").unwrap();
    editor.add_empty("one more", 16, true).unwrap();
    editor.commit().unwrap();
    let guard = Guard::take(file.clone()).unwrap();
    guard.record_write(0, 1);
    let header = read_header(&*file).unwrap();
    guard.finish(&mut Allocator::open(file.clone(), &header).unwrap()).unwrap();
    let bitmaps = open(&file);
    let dirty = |name: &str| bitmaps.count_dirty(name).unwrap();
    assert_eq!((dirty("one more"), dirty("bitmap-8"), dirty("bitmap-9")), (1, 1, 0));
}

#[test]
fn large_disks_cost_what_is_written() {
    let size = 16 << 40;
    let mut bits = Bits::for_disk(size, 16);
    bits.set_range(1_000_000..1_000_001);
    let bitmap = |i| PersistentBitmap {
        name: format!("{i}"),
        granularity_bits: 16,
        is_enabled: true,
        bits: bits.clone(),
    };
    // The largest bitmap that the format allows, besides.
    let fine = PersistentBitmap {
        name: "fine".into(),
        granularity_bits: 12,
        is_enabled: true,
        bits: Bits::for_disk(size, 12),
    };
    let all: Vec<_> = (0..64).map(bitmap).chain([fine]).collect();
    let file = image(size, &all);
    let before = file.len().unwrap();
    // A cluster of bits and one of a table for each, where the bits of all would be 2 GiB.
    assert!(before < 16 << 20, "{before}");
    for entry in open(&file).list() {
        let loaded = open(&file).load(entry.name()).unwrap();
        assert_eq!(loaded.held_bytes(), 4096 * u64::from(entry.name() != "fine"));
    }
    let guard = Guard::take(file.clone()).unwrap();
    guard.record_write(8 << 40, 1 << 20);
    guard.record_write(size - 1, 1);
    let header = read_header(&*file).unwrap();
    guard.finish(&mut Allocator::open(file.clone(), &header).unwrap()).unwrap();
    let grown = file.len().unwrap() - before;
    assert!(grown < 16 << 20, "{grown}");
    let bitmaps = open(&file);
    assert_eq!(bitmaps.count_dirty("3").unwrap(), 1 + 16 + 1);
    assert_eq!(bitmaps.count_dirty("fine").unwrap(), 256 + 1);
    let mut last = [0; 8];
    bitmaps.read_bits("fine", (512 << 20) - 8, &mut last).unwrap();
    assert_eq!(last, (1u64 << 63).to_le_bytes());
}
