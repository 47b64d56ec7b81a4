//! Records that drive a session and outlive it: control, answers, journals and receipts.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use format_spec::content_hash::{BitmapDigest, ContentHash};
use format_spec::native::answer::{Answer, Published, PublishedBitmap, READY, Ready};
use format_spec::native::block::{BitmapVersion, BlockRecord, Content, DiskId, Piece, Pieces, Run};
use format_spec::native::control::{BARRIER, Control};
use format_spec::native::frame::{self, Record};
use format_spec::native::journal::*;
use format_spec::native::units::{UnitNodes, ZeroUnits};
use format_spec::{Blame, Malformed, Reader};

fn record(bytes: &[u8]) -> Result<Record<'_>, Malformed> {
    let mut reader = Reader::new(bytes, 0);
    let record = Record::decode(&mut reader)?;
    reader.finish("record")?;
    Ok(record)
}

/// Round trip, every cut, every flip; then every byte of the body changed under a right checksum:
/// an error, or a value that is written and read again as itself.
macro_rules! check_record {
    ($type:ident, $value:expr) => {{
        let value = $value;
        let mut bytes = Vec::new();
        value.encode(&mut bytes);
        assert_eq!($type::decode(&record(&bytes).unwrap()).unwrap().as_ref(), Some(&value));
        for at in 0..bytes.len() {
            assert!(record(&bytes[..at]).is_err(), "{value:?} cut at {at}");
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            assert!(record(&flipped).is_err(), "{value:?} flipped at {at}");
        }
        let whole = record(&bytes).unwrap();
        for at in 0..whole.body.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut body = whole.body.to_vec();
                body[at] ^= change;
                let mut lie = Vec::new();
                frame::encode(whole.header.kind, &[&body], &mut lie);
                let lie = record(&lie).unwrap();
                if let Ok(Some(read)) = $type::decode(&lie) {
                    let mut again = Vec::new();
                    read.encode(&mut again);
                    let again = record(&again).unwrap();
                    assert_eq!($type::decode(&again).unwrap(), Some(read));
                }
            }
            let mut short = Vec::new();
            frame::encode(whole.header.kind, &[&whole.body[..at]], &mut short);
            let short = record(&short).unwrap();
            if let Ok(Some(read)) = $type::decode(&short) {
                assert_ne!(read, value, "cut at {at}");
            }
        }
    }};
}

#[test]
fn control_records_survive() {
    check_record!(Control, Control::End);
    check_record!(Control, Control::Barrier { number: 3, is_durable: true });
    check_record!(Control, Control::Prepare([4; 16]));
    check_record!(Control, Control::Commit([5; 16]));
    check_record!(Control, Control::Abort { blame: Blame::WouldLose, text: "no".into() });
    let mut zero = Vec::new();
    frame::encode(BARRIER, &[&[0; 12]], &mut zero);
    assert_eq!(Control::decode(&record(&zero).unwrap()).unwrap_err().field, "barrier number");
}

#[test]
fn answers_survive() {
    let nodes = [[1; 32], [0; 32], [2; 32]];
    let version = BitmapVersion { bitmap: 9, generation: 2 };
    check_record!(Answer, Answer::Ack(7));
    check_record!(Answer, Answer::Have(DiskId(1), UnitNodes { first: 8, nodes: &nodes }));
    check_record!(Answer, Answer::HaveZeroes(DiskId(1), ZeroUnits { first: 8, count: 1 << 40 }));
    check_record!(Answer, Answer::HaveDone(DiskId(2)));
    check_record!(Answer, Answer::HaveBitmap(version, vec![]));
    check_record!(Answer, Answer::HaveBitmap(version, vec![(0, [1; 32]), (7, [2; 32])]));
    check_record!(Answer, Answer::Committed([6; 16]));
    let bitmap = |name: &str, sent_as: &str| PublishedBitmap {
        name: name.to_owned(),
        sent_as: sent_as.to_owned(),
        digest: BitmapDigest([7; 32]),
    };
    let content = Some(ContentHash([3; 32]));
    for (content, is_unchanged, bitmaps) in
        [(content, true, vec![]), (None, false, vec![bitmap("b", "b"), bitmap("new", "old")])]
    {
        let (name, size, is_bitmaps_alone) = ("vda".to_owned(), 512, !is_unchanged);
        let published = Published { name, size, content, is_unchanged, is_bitmaps_alone, bitmaps };
        check_record!(Answer, Answer::Published(published));
    }
    check_record!(
        Answer,
        Answer::Ready(Ready {
            session: [1; 16],
            disks: vec![(DiskId(1), ContentHash([3; 32])), (DiskId(2), ContentHash([4; 32]))],
            bitmaps: vec![(version, BitmapDigest([5; 32]))],
        })
    );
    for offset in [None, Some(1234)] {
        let text = "disk vda is too small".to_owned();
        check_record!(Answer, Answer::Failed { blame: Blame::PeerFeatures, offset, text });
    }
}

#[test]
fn counts_of_a_peer_cost_nothing() {
    let mut body = vec![0; 16];
    body.extend(u32::MAX.to_be_bytes());
    body.extend([0; 72]);
    let mut lie = Vec::new();
    frame::encode(READY, &[&body], &mut lie);
    let error = Answer::decode(&record(&lie).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "number of disks at offset 28 is 4294967295, outside 0 to 2");
}

#[test]
fn journal_records_survive() {
    let nodes = [[1; 32], [0; 32]];
    let mut pieces = Vec::new();
    let version = BitmapVersion { bitmap: 1, generation: 1 };
    Piece { version, index: 4, bits: &[8; 16] }.encode(&mut pieces);
    let pieces = Pieces::decode(Reader::new(&pieces, 0)).unwrap();
    let run = Run { disk: DiskId(1), content: Content::None, pieces };
    check_record!(
        JournalRecord,
        JournalRecord::Session {
            session: [1; 16],
            size: 1 << 40,
            target: "qcow2 cluster_size=65536".into(),
        }
    );
    check_record!(JournalRecord, JournalRecord::Units(UnitNodes { first: 0, nodes: &nodes }));
    check_record!(JournalRecord, JournalRecord::Zeroes(ZeroUnits { first: 3, count: 9 }));
    check_record!(JournalRecord, JournalRecord::Image(b"whatever"));
    for stamps in [vec![], vec![[5; 16], [6; 16]]] {
        let root = ContentHash([8; 32]);
        check_record!(JournalRecord, JournalRecord::Prepared { root, stamps });
    }
    check_record!(JournalRecord, JournalRecord::Commit([4; 16]));
    check_record!(JournalRecord, JournalRecord::Bitmap(BlockRecord::Run(run)));
    check_record!(JournalRecord, JournalRecord::Bitmap(BlockRecord::BitmapRemove(version)));
    for hash in [Some(ContentHash([2; 32])), None] {
        let (session, size, stamp, target) = ([1; 16], 512, [7; 16], "raw".to_owned());
        let is_bitmaps_alone = hash.is_none();
        let receipt =
            JournalRecord::Receipt { session, size, is_bitmaps_alone, hash, stamp, target };
        check_record!(JournalRecord, receipt);
    }
    check_record!(
        JournalRecord,
        JournalRecord::ReceiptBitmap {
            granularity: 65536,
            is_enabled: true,
            is_persistent: false,
            digest: BitmapDigest([3; 32]),
            name: "nightly",
        }
    );
}

#[test]
fn a_journal_holds_no_content_and_ends_where_it_is_torn() {
    let mut bytes = Vec::new();
    BlockRecord::Run(Run::zeroes(DiskId(1), 0, 512)).encode(&mut bytes);
    assert_eq!(JournalRecord::decode(&record(&bytes).unwrap()).unwrap_err().field, "run");

    let mut journal = Vec::new();
    encode_start(JOURNAL_MAGIC, &mut journal);
    for first in 0..3 {
        JournalRecord::Zeroes(ZeroUnits { first, count: 1 }).encode(&mut journal);
    }
    let records = |bytes: &[u8]| {
        let mut reader = Reader::new(bytes, 0);
        decode_start(&mut reader, JOURNAL_MAGIC)?;
        let mut count = 0;
        while let Ok(record) = Record::decode(&mut reader) {
            JournalRecord::decode(&record)?;
            count += 1;
        }
        Ok::<_, Malformed>(count)
    };
    let one = (journal.len() - 8) / 3;
    for len in 0..=journal.len() {
        let expected = len.checked_sub(8).map(|rest| rest / one);
        assert_eq!(records(&journal[..len]).ok(), expected, "{len} bytes");
    }
    assert!(decode_start(&mut Reader::new(&journal, 0), RECEIPT_MAGIC).is_err());
    journal[7] = 2;
    assert_eq!(records(&journal).unwrap_err().field, "version");
}

#[test]
fn units_stay_inside_the_largest_disk() {
    let decode = |first: u64, count: u64| {
        let mut bytes = Vec::new();
        JournalRecord::Zeroes(ZeroUnits { first, count }).encode(&mut bytes);
        JournalRecord::decode(&record(&bytes).unwrap()).map(|_| ()).map_err(|e| e.field)
    };
    assert_eq!(decode(0, 1 << 43), Ok(()));
    assert_eq!(decode(1, 1 << 43), Err("last unit"));
    assert_eq!(decode(u64::MAX, u64::MAX), Err("last unit"));
    assert_eq!(decode(0, 0), Err("number of units"));
}
