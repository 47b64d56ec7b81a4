//! Transfers that are cut off, by a kill or a power failure, with journals that are whole, torn or
//! forged: what comes out in the end is the source, and what was synced is not moved again.

use std::sync::Arc;

use format_spec::content_hash::leaf;
use format_spec::native::journal::JournalRecord;
use format_spec::native::units::{UnitNodes, ZeroUnits};
use mig_core::block::ExtentKind;
use proptest::prelude::*;
use qcow2_file::create::{CreateOptions, NewImage};
use qcow2_file::storage::{Fault, Operation, OperationKind};
use qcow2_file::{Chain, Image, Layer, Memory, Storage};

use super::*;
use crate::device::{ChainSource, NewImageSink};
use crate::journal::{Found, Identity, Journal, replay};
use crate::ledger::UNIT_BYTES;
use crate::memory::MemoryDisk;
use crate::monitor::Unwatched;
use crate::recheck::{Recheck, clear_unknown, recheck};

const SIZE: u64 = 9 * UNIT_BYTES + 512 * 77;

fn identity() -> Identity {
    Identity { session: [1; 16], size: SIZE, target: "qcow2".into() }
}

fn source(patches: &[(u64, u64, u8)]) -> MemoryDisk {
    let mut disk = MemoryDisk::new(SIZE);
    for (at, len, byte) in patches {
        let at = at * 512;
        disk.fill(at, (len * 512).min(SIZE - at), *byte, ExtentKind::Data);
    }
    disk
}

/// What lies about when a process is gone.
struct Left {
    image: Memory,
    journal: Memory,
}

fn shape(cluster_bits: u32) -> CreateOptions {
    CreateOptions { cluster_bits, ..CreateOptions::new(SIZE) }
}

fn storage(memory: &Arc<Memory>) -> Arc<dyn Storage> {
    memory.clone()
}

/// What a failed attempt leaves: the image when it began, what was done to it, both files now.
struct Failed {
    base: Memory,
    log: Vec<Operation>,
    image: Arc<Memory>,
    journal: Arc<Memory>,
}

/// One attempt. `Ok` holds the finished image and how many bytes were kept.
fn attempt(
    source: &MemoryDisk,
    cluster_bits: u32,
    left: Option<Left>,
    fail_after: u64,
) -> Result<(Arc<Memory>, Transferred), Box<Failed>> {
    let options = shape(cluster_bits);
    let resumed = left.and_then(|left| {
        let (image, journal) = (Arc::new(left.image), Arc::new(left.journal));
        let found = match replay(&*journal, &identity()).unwrap() {
            Found::Journal(found) => *found,
            _ => return None,
        };
        let writer = NewImage::reopen(storage(&image), &options).ok()?;
        let journal_writer = Journal::resume(storage(&journal), found).unwrap();
        Some((image, journal, writer, journal_writer))
    });
    let (image, journal, writer, journal_writer) = resumed.unwrap_or_else(|| {
        let (image, journal) = (Arc::new(Memory::new()), Arc::new(Memory::new()));
        let writer = NewImage::create(storage(&image), &options).unwrap();
        let journal_writer = Journal::start(storage(&journal), identity()).unwrap();
        (image, journal, writer, journal_writer)
    });
    let keeper = Keeper::new(journal_writer).unwrap().every(2 * UNIT_BYTES);
    let sink = NewImageSink(&writer);
    let base = image.snapshot();
    image.start_log();
    image.inject(Fault::new(OperationKind::Write, fail_after, 5));
    let go = || {
        keeper.with_claims(|claims| {
            let disk =
                Recheck { disk: &sink, source: Some(source), workers: 2, monitor: &Unwatched };
            recheck(disk, claims)?;
            clear_unknown(&sink, claims)
        })?;
        let options = TransferOptions { keeper: Some(&keeper), workers: 2, ..Default::default() };
        transfer(source, &sink, &options, &Unwatched)
    };
    match go() {
        Ok(moved) => {
            image.clear_faults();
            writer.finish(&[]).unwrap();
            Ok((image, moved))
        }
        Err(_) => {
            image.clear_faults();
            Err(Box::new(Failed { base, log: image.take_log(), image, journal }))
        }
    }
}

/// What a power failure leaves of an image whose last attempt began at `base`.
fn cut(base: &Memory, log: &[Operation], mut seed: u64) -> Memory {
    let state = base.snapshot();
    let synced = log.iter().rposition(|o| o.kind == OperationKind::Sync).map_or(0, |at| at + 1);
    for (at, operation) in log.iter().enumerate() {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        if at < synced || seed >> 63 == 0 {
            state.apply(operation);
        }
    }
    state
}

/// Things that happen to a journal.
fn forge(journal: &Memory, how: u8, at: u64) {
    let len = journal.len().unwrap();
    let mut record = Vec::new();
    match how {
        1 => journal.set_len(at % len).unwrap(),
        2 => journal.write_at(&[0xa5; 3], at % len).unwrap(),
        3 => {
            let nodes = [leaf(&at.to_le_bytes()), leaf(b"a lie")];
            JournalRecord::Units(UnitNodes { first: at % 8, nodes: &nodes }).encode(&mut record);
        }
        4 => {
            JournalRecord::Zeroes(ZeroUnits { first: at % 8, count: 2 }).encode(&mut record);
        }
        _ => {}
    }
    journal.write_at(&record, len).unwrap();
}

fn is_the_source(image: Arc<Memory>, source: &MemoryDisk) {
    let layer = Layer::Qcow2(Box::new(Image::open(image, None).unwrap()));
    let chain = Chain::from_layers(vec![layer]).unwrap();
    let mut bytes = vec![0xee; source.content().len()];
    ChainSource(&chain).read_at(&mut bytes, 0).unwrap();
    assert!(bytes == source.content());
}

fn patches() -> impl Strategy<Value = Vec<(u64, u64, u8)>> {
    proptest::collection::vec((0..SIZE / 512, 1..4000u64, any::<u8>()), 1..9)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_cut_and_forged_the_source_comes_out(
        before in patches(),
        later in patches(),
        changes in any::<bool>(),
        cuts in proptest::collection::vec((0..60u64, any::<u64>(), 0..5u8), 1..4),
        cluster_bits in prop_oneof![Just(9u32), Just(16), Just(21)],
    ) {
        let mut disk = source(&before);
        let mut left = None;
        for (fail_after, seed, how) in cuts {
            match attempt(&disk, cluster_bits, left.take(), fail_after) {
                Ok((image, _)) => {
                    is_the_source(image, &disk);
                    return Ok(());
                }
                Err(failed) => {
                    let Failed { base, log, image, journal } = *failed;
                    // A kill leaves what was written; a power failure, what was synced and more.
                    let is_whole = seed % 2 == 0;
                    let image = if is_whole { image.snapshot() } else { cut(&base, &log, seed) };
                    forge(&journal, how, seed >> 8);
                    left = Some(Left { image, journal: journal.snapshot() });
                }
            }
        }
        if changes {
            // Another source than the journal speaks of.
            disk = source(&later);
        }
        let Ok((image, moved)) = attempt(&disk, cluster_bits, left, u64::MAX) else {
            panic!("nothing fails any more");
        };
        is_the_source(image, &disk);
        let root = crate::content_hash(&disk, 1, &Unwatched).unwrap();
        prop_assert_eq!(moved.content_hash, Some(root));
    }
}

#[test]
fn what_was_synced_is_not_moved_again() {
    let disk = source(&[(0, SIZE / 512, 7)]);
    // Nine MiB in 64 KiB clusters: some units in, the file fails.
    let Err(failed) = attempt(&disk, 16, None, 6) else { panic!("it fails") };
    let left = Left { image: failed.image.snapshot(), journal: failed.journal.snapshot() };
    let (image, moved) = attempt(&disk, 16, Some(left), u64::MAX).ok().unwrap();
    assert!(moved.bytes_kept >= 2 * UNIT_BYTES, "{moved:?}");
    assert_eq!(moved.bytes_kept + moved.bytes_data, SIZE);
    is_the_source(image, &disk);
}
