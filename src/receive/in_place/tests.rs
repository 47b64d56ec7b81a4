//! Existing images through the contract of a destination.

use std::path::Path;

use bitmap_mig::Bitmap;
use block_mig::Unwatched;
use format_spec::content_hash::{ContentHash, subtree};
use mig_core::block::is_zero;
use qcow2_file::bitmaps::Bits;

use super::*;
use crate::copy::{Existing, Format, TargetOptions};
use crate::disk::{Disk, Request};
use crate::incoming::Sealed;
use crate::options::DiskOption;

const MIB: usize = 1 << 20;
const SIZE: usize = 5 * MIB + 512;

fn image(path: &Path, format: Format) {
    std::fs::File::create(path).unwrap().set_len(SIZE as u64).unwrap();
    if format == Format::Qcow2 {
        let raw = path.with_extension("raw");
        std::fs::rename(path, &raw).unwrap();
        let options = crate::copy::CopyOptions {
            source: raw,
            source_format: Some(Format::Raw),
            destination: path.to_owned(),
            target_format: Some(Format::Qcow2),
            target: TargetOptions { cluster_size: Some(1 << 12), ..TargetOptions::default() },
            ..crate::copy::CopyOptions::default()
        };
        crate::copy::run(&options, &crate::Silent).unwrap();
    }
}

fn open(path: &Path, format: Format) -> InPlace {
    let id = "vda".to_owned();
    let disk = DiskOption { id, path: path.to_owned(), format: Some(format), is_readonly: false };
    let existing = Existing::InPlace;
    let options = ReceiveOptions { disks: vec![disk], existing, ..ReceiveOptions::default() };
    InPlace::open(&options, &crate::Silent, Arc::new(crate::Silent)).unwrap()
}

/// Writes units as the engine does.
fn send(place: &dyn Place, bytes: &mut [u8], units: &[usize], byte: u8) {
    for unit in units {
        let range = unit * MIB..bytes.len().min((unit + 1) * MIB);
        let guest = range.start as u64..range.end as u64;
        bytes[range.clone()].fill(byte);
        place.begin(guest.clone()).unwrap();
        place.sink().write_at(&bytes[range.clone()], guest.start).unwrap();
        let node = subtree(4, &bytes[range], &is_zero);
        place.arrived(guest, *unit as u64, &[node]).unwrap();
    }
    place.settled();
    place.durable().unwrap();
}

fn sealed(path: &Path, bytes: &[u8]) -> Sealed {
    let model = path.with_extension("model");
    std::fs::write(&model, bytes).unwrap();
    let chain = qcow2_file::Opener::new().format(Some(qcow2_file::Format::Raw)).open(&model);
    let chain = chain.unwrap();
    let content: ContentHash =
        block_mig::content_hash(&block_mig::device::ChainSource(&chain), 1, &Unwatched).unwrap();
    Sealed { content: Some(content), bitmaps: Vec::new() }
}

fn place(destination: &InPlace, session: SessionId, state: SessionState) -> Arc<dyn Place> {
    assert_eq!(destination.begin(session).unwrap(), state);
    let wanted = Wanted { name: "vda", size: SIZE as u64, keeps_rest: false };
    destination.place(&wanted).unwrap()
}

#[test]
fn an_image_is_gone_on_with_and_found_complete() {
    for format in [Format::Raw, Format::Qcow2] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        image(&path, format);
        let mut bytes = vec![0; SIZE];
        let destination = open(&path, format);
        let first = place(&destination, [1; 16], SessionState::Fresh);
        send(&*first, &mut bytes, &[0, 2, 5], 1);
        drop(first);
        destination.abort(Fate::Kept);
        drop(destination);
        // Another session has nothing of it; and does not disturb it by asking.
        assert_eq!(open(&path, format).begin([2; 16]).unwrap(), SessionState::Fresh);
        let destination = open(&path, format);
        let second = place(&destination, [1; 16], SessionState::Resumable);
        let mut units = Vec::new();
        let mut tell = |have| {
            if let mig_core::section::Have::Units(first, nodes) = have {
                units.extend(first..first + nodes.len() as u64);
            }
            Ok(())
        };
        second.have(&mut tell).unwrap();
        assert_eq!(units, [0, 2, 5], "{format}");
        send(&*second, &mut bytes, &[1, 2], 2);
        second.prepare(&sealed(&path, &bytes)).unwrap().unwrap();
        drop(second);
        destination.commit().unwrap();
        drop(destination);
        let destination = open(&path, format);
        assert_eq!(destination.begin([1; 16]).unwrap(), SessionState::Committed);
        // Who writes to it next takes its word away.
        drop(place(&destination, [3; 16], SessionState::Fresh));
        destination.abort(Fate::Dropped);
        drop(destination);
        assert_eq!(open(&path, format).begin([1; 16]).unwrap(), SessionState::Fresh);
    }
}

#[test]
fn a_write_that_nobody_meant_is_noticed() {
    for format in [Format::Raw, Format::Qcow2] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        image(&path, format);
        let mut bytes = vec![0; SIZE];
        let destination = open(&path, format);
        let place = place(&destination, [1; 16], SessionState::Fresh);
        send(&*place, &mut bytes, &[0, 1, 2, 3, 4, 5], 1);
        place.sink().write_at(&[7], 3 * MIB as u64 + 9).unwrap();
        let error = crate::report::error_chain(&place.prepare(&sealed(&path, &bytes)).unwrap_err());
        assert!(error.contains("was read"), "{error}");
    }
}

/// The runs of a bitmap of an image that may be unfinished; `None` where it cannot be trusted.
fn runs(path: &Path, name: &str) -> Option<Vec<(u64, u64)>> {
    let request = Request { accepts_unfinished: true, ..Request::new(path, Some(Format::Qcow2)) };
    let disk = Disk::open(&request, &crate::Silent).unwrap();
    let loaded = bitmap_mig::load(disk.bitmaps.directory().unwrap(), name).ok()?;
    Some(loaded.bits.runs().map(|run| (run.start, run.end)).collect())
}

#[test]
fn its_own_bitmaps_outlive_attempts_that_fail() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    image(&path, Format::Qcow2);
    for name in ["own", "sent"] {
        let (name, granularity) = (name.to_owned(), MIB as u64);
        let add = crate::bitmap::Edit::Add { name, granularity, is_enabled: true };
        crate::bitmap::edit(&path, &[add]).unwrap();
    }
    let mut bytes = vec![0; SIZE];
    let sent = |bytes: &[u8]| {
        let mut bits = Bits::for_disk(SIZE as u64, 20);
        bits.set_range(3..4);
        let bitmap = Bitmap { name: "sent".into(), granularity_bits: 20, is_enabled: true, bits };
        Sealed { bitmaps: vec![bitmap], ..sealed(&path, bytes) }
    };
    let mut attempt = |units: &[usize], state, fate| {
        let destination = open(&path, Format::Qcow2);
        let place = place(&destination, [1; 16], state);
        place.have(&mut |_| Ok(())).unwrap();
        send(&*place, &mut bytes, units, 1);
        if fate != Some(Fate::Kept) {
            place.prepare(&sent(&bytes)).unwrap().unwrap();
        }
        drop(place);
        match fate {
            Some(fate) => destination.abort(fate),
            None => destination.commit().unwrap(),
        }
        destination.take_invalidated("vda")
    };
    attempt(&[0, 2], SessionState::Fresh, Some(Fate::Kept));
    assert_eq!(runs(&path, "own"), Some(vec![(0, 1), (2, 3)]));
    // What was ready is not any more: nothing of it is there, and what was to go still is.
    attempt(&[1], SessionState::Resumable, Some(Fate::Revoked));
    assert_eq!(runs(&path, "own"), Some(vec![(0, 3)]));
    assert_eq!(runs(&path, "sent"), Some(vec![(0, 3)]));
    assert!(attempt(&[5], SessionState::Resumable, None).is_empty());
    assert_eq!(runs(&path, "own"), Some(vec![(0, 3), (5, 6)]));
    assert_eq!(runs(&path, "sent"), Some(vec![(3, 4)]));
}
