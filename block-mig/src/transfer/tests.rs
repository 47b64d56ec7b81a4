use super::*;
use crate::memory::MemoryDisk;
use crate::{Unwatched, content_hash, fingerprint_of, first_difference};
use mig_core::block::{BlockSource, ExtentKind};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn options(workers: usize) -> TransferOptions<'static> {
    TransferOptions { workers, ..TransferOptions::default() }
}

/// Data, stored zeroes, holes and compressed clusters, and an odd end.
fn source() -> MemoryDisk {
    let mut disk = MemoryDisk::new(9 * MIB + 512 * 7);
    disk.fill(0, MIB, 0x11, ExtentKind::Data);
    disk.fill(MIB, 2 * MIB, 0, ExtentKind::Data);
    disk.fill(4 * MIB + 512, 512, 0x22, ExtentKind::Data);
    disk.fill(5 * MIB, 5 * 65536, 0x33, ExtentKind::Compressed);
    disk.fill(6 * MIB, MIB, 0, ExtentKind::Zero);
    disk.fill(9 * MIB + 512, 512 * 6, 0x44, ExtentKind::Data);
    disk
}

#[test]
fn content_and_hash_are_equal_everywhere() {
    let source = source();
    for workers in [1, 4] {
        for sink in [
            MemoryDisk::new(BlockSource::size(&source)),
            MemoryDisk::dirty(BlockSource::size(&source)),
        ] {
            let moved = transfer(&source, &sink, &options(workers), &Unwatched).unwrap();
            assert_eq!(sink.content(), source.content());
            assert_eq!(moved.content_hash, Some(content_hash(&sink, 2, &Unwatched).unwrap()));
            assert_eq!(moved.bytes_data + moved.bytes_zero, BlockSource::size(&source));
            assert_eq!(moved.decompressed, 5 * 65536);
            assert_eq!(first_difference(&source, &sink, 2, &Unwatched).unwrap(), None);
        }
    }
}

#[test]
fn a_fingerprint_tells_what_reads_back_from_what_does_not() {
    let source = source();
    let mut sink = MemoryDisk::new(BlockSource::size(&source));
    let options = TransferOptions { fingerprint: Some([5; 16]), ..options(2) };
    let sent = transfer(&source, &sink, &options, &Unwatched).unwrap().fingerprint.unwrap();
    let read = |sink: &MemoryDisk| fingerprint_of(sink, sent.seed, 2, &Unwatched).unwrap();
    assert_eq!(read(&sink), sent);
    let last = BlockSource::size(&source) - 512;
    sink.fill(last, 1, 0x45, ExtentKind::Data);
    assert_ne!(read(&sink), sent);
    sink.fill(last, 1, 0x44, ExtentKind::Data);
    // Also what no longer reads as zero where nothing was sent.
    sink.fill(3 * MIB, 1, 1, ExtentKind::Data);
    assert_ne!(read(&sink), sent);
}

#[test]
fn zeroes_are_left_out_only_where_zero_is_read() {
    let source = source();
    let fresh = MemoryDisk::new(BlockSource::size(&source));
    transfer(&source, &fresh, &options(1), &Unwatched).unwrap();
    assert_eq!(fresh.writes().1, 0);
    let dirty = MemoryDisk::dirty(BlockSource::size(&source));
    transfer(&source, &dirty, &options(1), &Unwatched).unwrap();
    assert!(dirty.writes().1 > 0);
}

#[test]
fn compressed_clusters_are_passed_on_as_they_are() {
    let source = source();
    let mut sink = MemoryDisk::new(BlockSource::size(&source));
    sink.takes_compressed = true;
    let moved = transfer(&source, &sink, &options(2), &Unwatched).unwrap();
    assert_eq!(
        sink.packed().into_iter().collect::<Vec<_>>(),
        (0..5).map(|n| (5 * MIB + n * 65536, 65536)).collect::<Vec<_>>()
    );
    assert_eq!((moved.passed_on, moved.decompressed), (5 * 65536, 0));
    assert_eq!(sink.content(), source.content());
    assert_eq!(moved.content_hash, Some(content_hash(&source, 1, &Unwatched).unwrap()));
}

#[test]
fn above_a_backing_file_holes_are_left_alone() {
    let source = source();
    let sink = MemoryDisk::dirty(BlockSource::size(&source));
    let options = TransferOptions { scope: Scope::Above, ..options(2) };
    let moved = transfer(&source, &sink, &options, &Unwatched).unwrap();
    assert_eq!(moved.content_hash, None);
    let content = sink.content();
    assert!(content[4 << 20..(4 << 20) + 512].iter().all(|b| *b == 0xee));
    assert!(content[6 << 20..7 << 20].iter().all(|b| *b == 0));
    assert!(content[7 << 20..9 << 20].iter().all(|b| *b == 0xee));
}

#[test]
fn a_failing_disk_is_named() {
    let mut source = source();
    let mut sink = MemoryDisk::new(BlockSource::size(&source));
    sink.bad = Some(MIB - 5);
    let outcome = transfer(&source, &sink, &options(3), &Unwatched);
    assert!(matches!(outcome, Err(Error::Sink(_))));
    source.bad = Some(4 * MIB + 600);
    let sink = MemoryDisk::new(BlockSource::size(&source));
    assert!(matches!(transfer(&source, &sink, &options(3), &Unwatched), Err(Error::Source(_))));
}

#[test]
fn a_smaller_destination_is_refused() {
    let outcome = transfer(&source(), &MemoryDisk::new(MIB), &options(1), &Unwatched);
    assert!(matches!(outcome, Err(Error::Size { .. })));
}

#[test]
fn the_first_difference_is_the_first() {
    let a = source();
    for at in [0, 3 * MIB + 77, 5 * MIB + 3, 9 * MIB + 512 * 7 - 1] {
        let mut b = source();
        for later in [at, at + MIB, at + 3 * MIB] {
            if later < BlockSource::size(&b) {
                let byte = !b.content()[usize::try_from(later).unwrap()];
                b.fill(later, 1, byte, ExtentKind::Data);
            }
        }
        let found = first_difference(&a, &b, 3, &Unwatched).unwrap();
        assert_eq!(found.map(|d| d.offset), Some(at));
    }
}

#[test]
fn a_longer_disk_differs_only_by_its_content() {
    let a = MemoryDisk::new(MIB);
    let mut b = MemoryDisk::new(3 * MIB);
    assert_eq!(first_difference(&a, &b, 1, &Unwatched).unwrap(), None);
    b.fill(2 * MIB + 9, 1, 1, ExtentKind::Data);
    let found = first_difference(&b, &a, 1, &Unwatched).unwrap();
    assert_eq!(found.map(|d| d.offset), Some(2 * MIB + 9));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_layout_arrives(
        fills in proptest::collection::vec((0u64..9000, 1u64..400, 0u8..3, 0u8..4), 0..20),
        workers in 1usize..4, fresh: bool,
    ) {
        let kinds = [ExtentKind::Data, ExtentKind::Compressed, ExtentKind::Zero, ExtentKind::Hole];
        let mut source = MemoryDisk::new(9600 * 512);
        for (at, len, byte, kind) in fills {
            let kind = kinds[kind as usize];
            // Compressed clusters of the test disk are whole and even.
            let (at, len) = if kind == ExtentKind::Compressed {
                (at * 512 / 65536 * 65536, 65536)
            } else {
                (at * 512, len * 512)
            };
            let byte = if kind.reads_as_zero() { 0 } else { byte };
            source.fill(at, len, byte, kind);
        }
        let size = BlockSource::size(&source);
        let sink = if fresh { MemoryDisk::new(size) } else { MemoryDisk::dirty(size) };
        let moved = transfer(&source, &sink, &options(workers), &Unwatched).unwrap();
        prop_assert_eq!(sink.content(), source.content());
        prop_assert_eq!(moved.content_hash, Some(content_hash(&sink, 2, &Unwatched).unwrap()));
    }
}
