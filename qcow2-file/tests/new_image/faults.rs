//! Every operation on the file fails once: there is an error, and never a valid header.

use std::sync::Arc;

use qcow2_file::bitmaps::{Bits, PersistentBitmap};
use qcow2_file::create::{CreateOptions, NewImage};
use qcow2_file::layout::header::{CompressionType, Header};
use qcow2_file::storage::{Fault, OperationKind};
use qcow2_file::{GuestOffset, Memory, Result, Storage};

use crate::workload::{Random, packed};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const SIZE: u64 = 3 << 20;

/// A little of everything, on small clusters, so that tables are spilled too.
fn make(file: &Arc<Memory>) -> Result<()> {
    let overwrite = file.len().unwrap() != 0;
    let options = CreateOptions { cluster_bits: 9, overwrite, ..CreateOptions::new(SIZE) };
    let image = NewImage::create(Arc::clone(file) as Arc<dyn Storage>, &options)?;
    let mut random = Random::new(1);
    image.write_at(&random.bytes(40000), GuestOffset(700))?;
    image.write_zeroes(GuestOffset(3000), 9000)?;
    let content = [3; 512];
    for i in 0..40 {
        let bytes = packed(&content, CompressionType::Zlib);
        let at = GuestOffset((1 << 20) + i * 512);
        assert!(image.write_compressed(at, CompressionType::Zlib, 512, &bytes)?);
    }
    image.write_at(&[9; 100], GuestOffset((1 << 20) + 5000))?;
    image.write_at(&random.bytes(100), GuestOffset(3100))?;
    image.flush()?;
    image.discard(GuestOffset(20000), 10000)?;
    let mut bits = Bits::for_disk(SIZE, 9);
    bits.set_range(3..700);
    let bitmap = PersistentBitmap { name: "b".into(), granularity_bits: 9, is_enabled: true, bits };
    image.finish(&[bitmap])
}

fn has_header(file: &Memory) -> bool {
    let mut start = [0; 512];
    file.read_at(&mut start, 0).unwrap();
    Header::decode(&start).is_ok()
}

#[test]
fn an_error_leaves_no_header() {
    let kinds = [
        OperationKind::Read,
        OperationKind::Write,
        OperationKind::WriteZeroes,
        OperationKind::SetLen,
        OperationKind::Sync,
    ];
    for kind in kinds {
        for (errno, torn_bytes, is_lasting) in
            [(EIO, 0, false), (ENOSPC, 0, true), (EIO, 200, false)]
        {
            let mut failures = 0;
            loop {
                let file = Arc::new(Memory::new());
                file.inject(Fault { kind, after: failures, errno, torn_bytes, is_lasting });
                let result = make(&file);
                file.clear_faults();
                if result.is_ok() {
                    assert!(has_header(&file));
                    break;
                }
                assert!(!has_header(&file), "{kind:?} {failures} {torn_bytes} {is_lasting}");
                failures += 1;
            }
            assert!(failures > 0, "{kind:?} is never done");
        }
    }
}

#[test]
fn nothing_is_accepted_after_an_error() {
    let file = Arc::new(Memory::new());
    let options = CreateOptions::new(SIZE);
    let image = NewImage::create(Arc::clone(&file) as Arc<dyn Storage>, &options).unwrap();
    file.inject(Fault {
        kind: OperationKind::Write,
        after: 0,
        errno: ENOSPC,
        torn_bytes: 0,
        is_lasting: false,
    });
    assert!(image.write_at(&[1; 4096], GuestOffset(0)).is_err());
    assert!(image.write_at(&[1; 4096], GuestOffset(0)).is_err());
    assert!(image.finish(&[]).is_err());
    assert!(!has_header(&file));
}

/// An image that is to be overwritten is gone, durably, before anything else is written.
#[test]
fn an_overwritten_image_is_cleared_first() {
    let old = Arc::new(Memory::new());
    make(&old).unwrap();
    let mut failures = 0;
    loop {
        let file = Arc::new(old.snapshot());
        file.start_log();
        file.inject(Fault::new(OperationKind::Write, failures, EIO));
        let result = make(&file);
        file.clear_faults();
        if result.is_ok() {
            break;
        }
        assert!(!has_header(&file), "{failures}");
        let kinds: Vec<_> = file.take_log().iter().map(|o| o.kind).take(3).collect();
        assert!(kinds.starts_with(&[OperationKind::WriteZeroes, OperationKind::Sync]), "{kinds:?}");
        failures += 7;
    }
}

/// What is written before the header never touches its cluster, and a sync stands between.
#[test]
fn the_header_is_written_last_and_alone() {
    let file = Arc::new(Memory::new());
    file.start_log();
    make(&file).unwrap();
    let log = file.take_log();
    let header = log.iter().position(|o| o.kind == OperationKind::Write && o.offset < 512);
    let header = header.unwrap();
    assert_eq!(log[header - 1].kind, OperationKind::Sync);
    let after: Vec<_> = log[header + 1..].iter().map(|o| o.kind).collect();
    assert_eq!(after, vec![OperationKind::Sync]);
}
