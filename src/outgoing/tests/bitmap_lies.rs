//! Sources that lie about bitmaps, and destinations: the other side names the disk, the bitmap and
//! both values.

use format_spec::Reader;
use format_spec::content_hash::{BitmapDigest, ContentHash};
use format_spec::native::answer::{Answer, Ready};
use format_spec::native::block::{
    BitmapCreate, BitmapSeal, BitmapShape, BitmapUpdate, BitmapVersion, BlockRecord, Content, Disk,
    DiskId, Piece, Pieces, Run,
};
use format_spec::native::control::Control;

use super::guest::{Paused, Peer, acknowledge, send_to};
use super::lies::{D, SIZE, Script, create, lie, seal, vda, zeroes};
use super::*;

const LABEL: &str = "bitmap \"b\" of disk \"vda\"";

fn changed(change: fn(&mut BitmapCreate<'static>)) -> BlockRecord<'static> {
    let BlockRecord::BitmapCreate(mut record) = create(0, 1, 512) else { panic!() };
    change(&mut record);
    BlockRecord::BitmapCreate(record)
}

fn sealed(generation: u32, digest: Option<BitmapDigest>) -> BlockRecord<'static> {
    let version = BitmapVersion { bitmap: 0, generation };
    BlockRecord::BitmapSeal(BitmapSeal { version, digest })
}

fn pieces(bytes: &[u8]) -> Pieces<'_> {
    Pieces::decode(Reader::new(bytes, 0)).unwrap()
}

/// A piece of bitmap 0, in a run of a disk.
fn piece(disk: DiskId, generation: u32, index: u64, bits: &[u8]) -> Script {
    let version = BitmapVersion { bitmap: 0, generation };
    let mut bytes = Vec::new();
    Piece { version, index, bits }.encode(&mut bytes);
    let run = Run { disk, pieces: pieces(&bytes), content: Content::None };
    let (vda, created) = (vda(), create(0, 1, 512));
    let vdb = BlockRecord::Disk(Disk { disk: DiskId(1), keeps_rest: false, size: SIZE, name: "b" });
    Script::main().block(&[vda, vdb, created, BlockRecord::Run(run)])
}

/// Each is said with these words.
#[track_caller]
fn says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert!(said.contains("offset"), "{said}");
}

#[test]
fn of_the_shape() {
    // 1 MiB and a sector: 2049 granules of 512 bytes.
    for (record, words) in [
        (changed(|c| c.shape.bits += 1), ["2050", "2049"]),
        (changed(|c| c.shape = BitmapShape { granularity: 1024, bits: 2049 }), ["2049", "1025"]),
        (changed(|c| c.shape.granularity = 1000), ["1000", "512 to 2147483648"]),
        (changed(|c| c.shape.granularity = 0), ["is 0", "512 to 2147483648"]),
        (changed(|c| c.is_persistent = false), ["not kept", "a file has no other"]),
        (changed(|c| c.version.generation = 2), ["generation 2", "1 is next"]),
    ] {
        let said = lie(Script::main().block(&[vda(), record]));
        says(&said, &[LABEL, words[0], words[1]]);
    }
}

#[test]
fn of_what_there_is() {
    let made = || create(0, 1, 512);
    let remove = || BlockRecord::BitmapRemove(BitmapVersion { bitmap: 0, generation: 1 });
    let update = |generation, is_persistent| {
        let version = BitmapVersion { bitmap: 0, generation };
        BlockRecord::BitmapUpdate(BitmapUpdate { version, is_enabled: true, is_persistent })
    };
    for (records, words) in [
        (vec![made(), create(1, 1, 512)], vec![LABEL, "exists", "number, 1"]),
        (vec![made(), create(0, 2, 512)], vec![LABEL, "exists"]),
        (vec![made(), remove(), create(0, 4, 512)], vec![LABEL, "generation 4", "2 is next"]),
        (vec![made(), sealed(2, None)], vec![LABEL, "has generation 1", "generation 2"]),
        (vec![made(), remove(), remove()], vec![LABEL, "removed as generation 1"]),
        (vec![made(), update(3, true)], vec![LABEL, "has generation 1", "generation 3"]),
        (vec![made(), update(1, false)], vec![LABEL, "flags"]),
        (vec![made(), sealed(1, None), sealed(1, None)], vec![LABEL, "sealed twice"]),
        (vec![sealed(1, None)], vec!["bitmap number 0"]),
    ] {
        let records: Vec<_> = [vda()].into_iter().chain(records).collect();
        says(&lie(Script::main().block(&records)), &words);
    }
}

#[test]
fn of_pieces() {
    // 33 words: 264 bytes, in one piece.
    for (script, words) in [
        (piece(D, 1, 1, &[1; 264]), ["piece 1", "has 1 pieces"]),
        (piece(D, 1, u64::MAX, &[1; 8]), ["piece 18446744073709551615", "has 1 pieces"]),
        (piece(D, 1, 0, &[1; 256]), ["256 bytes", "not 264"]),
        (piece(D, 1, 0, &[1; 1024]), ["1024 bytes", "not 264"]),
        (piece(D, 2, 0, &[1; 264]), ["has generation 1", "generation 2"]),
        (piece(DiskId(1), 1, 0, &[1; 264]), ["is disk 0", "with disk 1"]),
    ] {
        let said = lie(script);
        says(&said, &[LABEL, words[0], words[1]]);
    }
    let script = Script::main().block(&[vda(), create(0, 1, 512), sealed(1, None)]);
    let mut bytes = Vec::new();
    let version = BitmapVersion { bitmap: 0, generation: 1 };
    Piece { version, index: 0, bits: &[0; 264] }.encode(&mut bytes);
    let run = Run { disk: D, pieces: pieces(&bytes), content: Content::None };
    let said = lie(script.block(&[BlockRecord::Run(run)]));
    says(&said, &[LABEL, "piece 0", "after its seal"]);
}

#[test]
fn of_what_they_hold() {
    let digest = BitmapDigest([0x5a; 32]);
    let said = lie(Script::main().block(&[vda(), create(0, 1, 512), sealed(1, Some(digest))]));
    let empty = format_spec::content_hash::bitmap_digest(512, 2049, &[0; 264]).unwrap().to_string();
    says(&said, &[LABEL, &digest.to_string(), &empty]);
    let left = Script::main().block(&[vda(), create(0, 1, 512), zeroes(0, SIZE), seal()]);
    let said = lie(left.barrier(1).control(&[Control::Prepare(SESSION)]));
    assert!(said.contains(LABEL) && said.contains("is not sealed"), "{said}");
}

#[test]
fn a_destination_that_reads_something_else_is_told_what_it_should_be() {
    let cargo = Cargo::small();
    let bitmap = (BitmapVersion { bitmap: 0, generation: 1 }, BitmapDigest([9; 32]));
    let disk = (DiskId(1), ContentHash([8; 32]));
    let wrong = [
        (
            vec![],
            vec![bitmap],
            "bitmap \"fine\" of disk \"vda\" was sent as bf1b:",
            bitmap.1.to_string(),
        ),
        (vec![disk; 2], vec![], "disk \"vda\" was sent as bf1:", disk.1.to_string()),
        (vec![], vec![], "READY does not name", String::new()),
    ];
    for (disks, bitmaps, sent, read) in wrong {
        let on = |control: &Control| match control {
            Control::Prepare(session) => {
                let (disks, bitmaps) = (disks.clone(), bitmaps.clone());
                vec![Answer::Ready(Ready { session: *session, disks, bitmaps })]
            }
            other => acknowledge(other),
        };
        let peer = Peer { state: SessionState::Fresh, first: &[], on: &on };
        let timing = Timing { linger: Duration::from_millis(100), ..timing() };
        let options = OutgoingOptions { timing, ..OutgoingOptions::new(SESSION, &Unwatched) };
        let error =
            send_to(&peer, cargo.handlers(true), &mut Paused::default(), &options).unwrap_err();
        let said = error.to_string();
        assert!(matches!(error, Error::Mismatch { .. }), "{said}");
        assert!(said.contains(sent) && said.contains(&read), "{said}");
    }
}
