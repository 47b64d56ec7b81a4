//! Native records: what is written is read, what is cut or flipped is refused.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use format_spec::content_hash::{BitmapDigest, ContentHash};
use format_spec::native::block::*;
use format_spec::native::frame::{self, HEADER_BYTES, Header, MAX_BODY, Record};
use format_spec::native::hello::*;
use format_spec::{Blame, Malformed, Problem, Reader};
use proptest::collection::vec;
use proptest::prelude::*;

const LEAF: u64 = 65536;

/// Owns what a record borrows.
#[derive(Debug, Clone)]
enum Owned {
    End,
    Disk(u32, bool, u64, String),
    Run(u32, RunContent, Vec<(u32, u32, u64, Vec<u8>)>),
    DiskSeal(u32, Option<[u8; 32]>),
    Create((u32, u32), u32, (u32, u64), (bool, bool), String),
    Update((u32, u32), (bool, bool)),
    Remove((u32, u32)),
    Seal((u32, u32), Option<[u8; 32]>),
    DiskContent(u32, u64),
}

#[derive(Debug, Clone)]
enum RunContent {
    None,
    Data(u64, Vec<u8>),
    Zeroes(u64, u64),
}

fn version((bitmap, generation): (u32, u32)) -> BitmapVersion {
    BitmapVersion { bitmap, generation }
}

impl Owned {
    fn encode(&self) -> Vec<u8> {
        let mut pieces = Vec::new();
        if let Self::Run(_, _, list) = self {
            for (bitmap, generation, index, bits) in list {
                let version = version((*bitmap, *generation));
                Piece { version, index: *index, bits }.encode(&mut pieces);
            }
        }
        let record = match self {
            Self::End => BlockRecord::End,
            Self::Disk(disk, keeps_rest, size, name) => {
                let (disk, keeps_rest, size) = (DiskId(*disk), *keeps_rest, *size);
                BlockRecord::Disk(Disk { disk, keeps_rest, size, name })
            }
            Self::Run(disk, content, _) => BlockRecord::Run(Run {
                disk: DiskId(*disk),
                content: match content {
                    RunContent::None => Content::None,
                    RunContent::Data(offset, bytes) => Content::Data { offset: *offset, bytes },
                    RunContent::Zeroes(offset, len) => {
                        Content::Zeroes { offset: *offset, len: *len }
                    }
                },
                pieces: Pieces::decode(Reader::new(&pieces, 0)).unwrap(),
            }),
            Self::DiskSeal(disk, hash) => {
                BlockRecord::DiskSeal(DiskSeal { disk: DiskId(*disk), hash: hash.map(ContentHash) })
            }
            Self::Create(v, disk, (granularity, bits), (is_enabled, is_persistent), name) => {
                BlockRecord::BitmapCreate(BitmapCreate {
                    version: version(*v),
                    disk: DiskId(*disk),
                    shape: BitmapShape { granularity: *granularity, bits: *bits },
                    is_enabled: *is_enabled,
                    is_persistent: *is_persistent,
                    name,
                })
            }
            Self::Update(v, (is_enabled, is_persistent)) => {
                let (is_enabled, is_persistent) = (*is_enabled, *is_persistent);
                BlockRecord::BitmapUpdate(BitmapUpdate {
                    version: version(*v),
                    is_enabled,
                    is_persistent,
                })
            }
            Self::Remove(v) => BlockRecord::BitmapRemove(version(*v)),
            Self::Seal(v, digest) => BlockRecord::BitmapSeal(BitmapSeal {
                version: version(*v),
                digest: digest.map(BitmapDigest),
            }),
            Self::DiskContent(disk, bytes) => {
                BlockRecord::DiskContent(DiskContent { disk: DiskId(*disk), bytes: *bytes })
            }
        };
        let mut out = Vec::new();
        record.encode(&mut out);
        // What was written reads as what was meant.
        assert_eq!(decode_block(&out).unwrap(), Some(record));
        out
    }
}

fn decode_block(bytes: &[u8]) -> Result<Option<BlockRecord<'_>>, Malformed> {
    let mut reader = Reader::new(bytes, 0);
    let record = Record::decode(&mut reader)?;
    reader.finish("record")?;
    BlockRecord::decode(&record)
}

fn names(max: usize) -> impl Strategy<Value = String> {
    vec(proptest::char::range('\u{1}', '\u{2ff}'), 1..max / 2).prop_map(|c| c.into_iter().collect())
}

fn versions() -> impl Strategy<Value = (u32, u32)> {
    (any::<u32>(), 1u32..)
}

fn pieces(min: usize) -> impl Strategy<Value = Vec<(u32, u32, u64, Vec<u8>)>> {
    let bits = (0usize..129).prop_flat_map(|words| vec(any::<u8>(), words * 8));
    vec((any::<u32>(), 1u32.., any::<u64>(), bits), min..4)
}

fn contents() -> impl Strategy<Value = RunContent> {
    let data = (0u64..1 << 40, 1usize..5)
        .prop_flat_map(|(leaf, sectors)| (Just(leaf * LEAF), vec(any::<u8>(), sectors * 512)));
    prop_oneof![
        data.prop_map(|(offset, bytes)| RunContent::Data(offset, bytes)),
        (0u64..1 << 40, 1u64..1 << 50).prop_map(|(l, s)| RunContent::Zeroes(l * LEAF, s * 512)),
    ]
}

fn block_records() -> impl Strategy<Value = Owned> {
    prop_oneof![
        Just(Owned::End),
        (any::<u32>(), any::<bool>(), 0..=1u64 << 54, names(MAX_DISK_NAME))
            .prop_map(|(d, k, sectors, n)| Owned::Disk(d, k, sectors * 512, n)),
        (any::<u32>(), contents(), pieces(0)).prop_map(|(d, c, p)| Owned::Run(d, c, p)),
        (any::<u32>(), pieces(1)).prop_map(|(d, p)| Owned::Run(d, RunContent::None, p)),
        (any::<u32>(), any::<Option<[u8; 32]>>()).prop_map(|(d, h)| Owned::DiskSeal(d, h)),
        (versions(), any::<u32>(), (9u32..32, any::<u64>()), any::<(bool, bool)>(), names(1023))
            .prop_map(|(v, d, (g, b), f, n)| Owned::Create(v, d, (1 << g, b), f, n)),
        (versions(), any::<(bool, bool)>()).prop_map(|(v, f)| Owned::Update(v, f)),
        versions().prop_map(Owned::Remove),
        (versions(), any::<Option<[u8; 32]>>()).prop_map(|(v, h)| Owned::Seal(v, h)),
        any::<(u32, u64)>().prop_map(|(disk, bytes)| Owned::DiskContent(disk, bytes)),
    ]
}

fn hellos() -> impl Strategy<Value = Hello> {
    let id = any::<[u8; 16]>;
    let blames = (1u16..8).prop_map(|code| blame_from(code).unwrap());
    let states = prop_oneof![
        Just(SessionState::Fresh),
        Just(SessionState::Resumable),
        Just(SessionState::Ready),
        Just(SessionState::Committed)
    ];
    prop_oneof![
        (id(), any::<bool>(), any::<(u64, u64)>(), 1..=MAX_CHANNELS, names(255)).prop_map(
            |(session, is_one_way, (features, mask), channels, program)| {
                let required = features & mask;
                Hello::Offer(Offer { session, is_one_way, features, required, channels, program })
            }
        ),
        (id(), id(), states, any::<u64>(), 1..=MAX_CHANNELS, names(255)).prop_map(
            |(session, ticket, state, features, channels, program)| {
                Hello::Choice(Choice { session, ticket, state, features, channels, program })
            }
        ),
        (blames, names(1024)).prop_map(|(blame, text)| Hello::Refusal(Refusal { blame, text })),
        (id(), id(), 1..=MAX_CHANNELS).prop_map(|(session, ticket, channel)| Hello::Join(Join {
            session,
            ticket,
            channel
        })),
    ]
}

fn decode_hello(bytes: &[u8]) -> Result<Hello, Malformed> {
    let mut reader = Reader::new(bytes, 0);
    let header = decode_prefix(reader.array("hello")?)?;
    Hello::decode(header, reader.take_rest())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn block_records_survive(record in block_records(), cut: prop::sample::Index, bit in 0u8..8) {
        let bytes = record.encode();
        let at = cut.index(bytes.len());
        prop_assert!(decode_block(&bytes[..at]).is_err(), "cut at {at}");
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << bit;
        prop_assert!(decode_block(&flipped).is_err(), "flip at {at}");
        let mut longer = bytes;
        longer.push(0);
        prop_assert!(decode_block(&longer).is_err());
    }

    #[test]
    fn a_lie_below_the_checksum_is_an_error_or_a_value(
        record in block_records(), at: prop::sample::Index, byte: u8,
    ) {
        let bytes = record.encode();
        let mut reader = Reader::new(&bytes, 0);
        let record = Record::decode(&mut reader).unwrap();
        let mut body = record.body.to_vec();
        if body.is_empty() {
            return Ok(());
        }
        let at = at.index(body.len().min(64));
        body[at] = byte;
        let mut lie = Vec::new();
        frame::encode(record.header.kind, &[&body], &mut lie);
        if let Ok(Some(value)) = decode_block(&lie) {
            let mut again = Vec::new();
            value.encode(&mut again);
            prop_assert_eq!(again, lie);
        }
    }

    #[test]
    fn hellos_survive(hello in hellos(), cut: prop::sample::Index, bit in 0u8..8) {
        let bytes = hello.encode();
        prop_assert!(bytes.len() <= PREFIX_BYTES + MAX_HELLO + 4);
        prop_assert_eq!(decode_hello(&bytes).unwrap(), hello);
        let at = cut.index(bytes.len());
        prop_assert!(decode_hello(&bytes[..at]).is_err(), "cut at {at}");
        let mut flipped = bytes;
        flipped[at] ^= 1 << bit;
        prop_assert!(decode_hello(&flipped).is_err(), "flip at {at}");
    }
}

#[test]
fn every_cut_and_every_flip_of_a_small_record_is_refused() {
    let pieces = vec![(7, 1, 0, vec![1, 0, 0, 0, 0, 0, 0, 0])];
    for record in [
        Owned::End,
        Owned::Disk(1, true, 4096, "vda".into()),
        Owned::Run(1, RunContent::Data(LEAF, vec![3; 512]), pieces.clone()),
        Owned::Run(1, RunContent::Zeroes(0, 1 << 40), vec![]),
        Owned::Run(1, RunContent::None, pieces),
        Owned::Create((7, 1), 1, (65536, 64), (true, true), "bm".into()),
        Owned::Seal((7, 1), Some([9; 32])),
        Owned::DiskContent(3, 1 << 40),
    ] {
        let bytes = record.encode();
        for at in 0..bytes.len() {
            assert!(decode_block(&bytes[..at]).is_err(), "{record:?} cut at {at}");
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                assert!(decode_block(&flipped).is_err(), "{record:?} flipped at {at}");
            }
        }
    }
}

/// A run with these head fields and this much after them.
fn run_with(flags: u32, offset: u64, len: u64, pieces_len: u32, rest: &[u8]) -> Vec<u8> {
    let mut body = 1u32.to_be_bytes().to_vec();
    body.extend(flags.to_be_bytes());
    body.extend(offset.to_be_bytes());
    body.extend(len.to_be_bytes());
    body.extend(pieces_len.to_be_bytes());
    body.extend([0; 4]);
    body.extend(rest);
    let mut out = Vec::new();
    frame::encode(RUN, &[&body], &mut out);
    out
}

#[test]
fn the_truth_table_of_runs_holds() {
    let mut piece = Vec::new();
    Piece { version: version((1, 1)), index: 0, bits: &[0; 8] }.encode(&mut piece);
    let p = piece.len() as u32;
    let with = |data: &[u8]| [&piece[..], data].concat();
    let data = vec![1; 512];
    let ok = |bytes: &[u8]| assert!(decode_block(bytes).is_ok(), "{:?}", decode_block(bytes));
    ok(&run_with(HAS_BLOCK, 0, 512, 0, &data));
    ok(&run_with(ZERO_BLOCK, 0, 512, 0, &[]));
    ok(&run_with(HAS_BLOCK | HAS_BITMAPS, 0, 512, p, &with(&data)));
    ok(&run_with(ZERO_BLOCK | HAS_BITMAPS, 0, 512, p, &piece));
    ok(&run_with(HAS_BITMAPS, 0, 0, p, &piece));

    let bad = |bytes: &[u8], field: &str| {
        let error = decode_block(bytes).unwrap_err();
        assert_eq!(error.field, field, "{error}");
    };
    bad(&run_with(0, 0, 512, 0, &data), "run flags");
    bad(&run_with(0, 0, 0, 0, &[]), "run flags");
    bad(&run_with(HAS_BLOCK | ZERO_BLOCK, 0, 512, 0, &data), "run flags");
    bad(&run_with(7, 0, 512, p, &with(&data)), "run flags");
    bad(&run_with(8, 0, 512, 0, &data), "run flags");
    bad(&run_with(HAS_BLOCK | HAS_BITMAPS, 0, 512, 0, &data), "run length of pieces");
    bad(&run_with(HAS_BLOCK, 0, 512, p, &with(&data)), "run length of pieces");
    bad(&run_with(HAS_BITMAPS, 0, 512, p, &piece), "run offset");
    bad(&run_with(HAS_BITMAPS, LEAF, 0, p, &piece), "run offset");
    bad(&run_with(HAS_BITMAPS, 0, 0, p + 1, &with(&[0])), "bitmap number");
    bad(&run_with(HAS_BITMAPS, 0, 0, u32::MAX, &piece), "run pieces");
    bad(&run_with(HAS_BLOCK, 512, 512, 0, &data), "run offset");
    bad(&run_with(HAS_BLOCK, 0, 511, 0, &data[..511]), "run length");
    bad(&run_with(HAS_BLOCK, 0, 0, 0, &[]), "run length");
    bad(&run_with(ZERO_BLOCK, 0, 0, 0, &[]), "run length");
    bad(&run_with(ZERO_BLOCK, 1 << 63, 512, 0, &[]), "run length");
    bad(&run_with(ZERO_BLOCK, u64::MAX - LEAF + 1, LEAF, 0, &[]), "run length");
    bad(&run_with(HAS_BLOCK, 0, u64::MAX, 0, &data), "run length");
    bad(&run_with(HAS_BLOCK, 0, (2 << 20) + 512, 0, &data), "run length");
    bad(&run_with(HAS_BLOCK, 0, 1024, 0, &data), "run content");
    bad(&run_with(HAS_BLOCK, 0, 512, 0, &[1; 513]), "record");
    let mut long = piece.clone();
    long[19] = 9;
    long.push(0);
    bad(&run_with(HAS_BITMAPS, 0, 0, p + 1, &long), "piece length");
    long[16] = 0xff;
    bad(&run_with(HAS_BITMAPS, 0, 0, p + 1, &long), "piece length");
}

#[test]
fn ranges_and_pieces_are_held_against_the_disk() {
    let size = 3 * LEAF + 512;
    let zeroes = |offset, len| Content::Zeroes { offset, len }.check(size);
    assert_eq!(zeroes(0, size), Ok(()));
    assert_eq!(zeroes(LEAF, 2 * LEAF), Ok(()));
    assert_eq!(zeroes(3 * LEAF, 512), Ok(()));
    assert_eq!(zeroes(0, 512), Err(Problem::Misaligned { value: 512, align: LEAF }));
    let beyond = size + 512;
    let problem = Problem::OutOfRange { value: beyond, min: 0, max: size };
    assert_eq!(zeroes(3 * LEAF, 1024), Err(problem));

    let shape = BitmapShape::of_disk(1 << 40, 65536);
    assert_eq!((shape.bits, shape.byte_len(), shape.piece_count()), (1 << 24, 2 << 20, 2048));
    assert_eq!(shape.piece_start(3), 3 * 8192 * 65536);
    let odd = BitmapShape::of_disk(600 << 20, 512);
    assert_eq!(odd.byte_len(), 153_600);
    assert_eq!(
        (odd.piece_len(149), odd.piece_len(150), odd.piece_len(u64::MAX)),
        (Some(1024), None, None)
    );
    let tail = BitmapShape { granularity: 512, bits: 8193 };
    assert_eq!(
        (tail.piece_len(0), tail.piece_len(1), tail.piece_len(2)),
        (Some(1024), Some(8), None)
    );
    let piece = |index, bits| tail.check(&Piece { version: version((1, 1)), index, bits });
    assert_eq!(piece(1, &[0; 8]), Ok(()));
    assert_eq!(piece(1, &[]), Ok(()));
    assert_eq!(piece(1, &[0; 16]), Err(Problem::Mismatch { value: 16, expected: 8 }));
    assert_eq!(piece(2, &[]), Err(Problem::OutOfRange { value: 2, min: 0, max: 1 }));
    assert_eq!(BitmapShape::of_disk(0, 512).piece_count(), 0);
}

#[test]
fn bitmaps_with_impossible_values_are_refused() {
    let create = |granularity: u32, bits: u64, name: &[u8]| {
        let mut body = Vec::new();
        [1, 1, 1, granularity].iter().for_each(|n: &u32| body.extend(n.to_be_bytes()));
        body.extend(bits.to_be_bytes());
        body.extend(1u32.to_be_bytes());
        body.extend((name.len() as u16).to_be_bytes());
        body.extend(name);
        let mut out = Vec::new();
        frame::encode(BITMAP_CREATE, &[&body], &mut out);
        decode_block(&out).map(|_| ()).map_err(|e| e.field)
    };
    assert_eq!(create(65536, 1, b"b"), Ok(()));
    assert_eq!(create(1 << 31, 1, &[b'x'; 1023]), Ok(()));
    for granularity in [0, 1, 256, 1000, (1 << 31) + 512] {
        assert_eq!(create(granularity, 1, b"b"), Err("bitmap granularity"));
    }
    for name in [&b""[..], b"a\0b", b"\xff", &[b'x'; 1024]] {
        assert_eq!(create(512, 1, name), Err("bitmap name"));
    }
    let shape = BitmapShape { granularity: 512, bits: 3 };
    let of = |shape| BitmapCreate {
        version: version((1, 1)),
        disk: DiskId(1),
        shape,
        is_enabled: true,
        is_persistent: true,
        name: "b",
    };
    assert_eq!(of(shape).check(1025), Ok(()));
    assert_eq!(of(shape).check(1024), Err(Problem::Mismatch { value: 3, expected: 2 }));
}

#[test]
fn a_length_meets_its_limit_before_it_is_used() {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&(MAX_BODY as u32 + 1).to_be_bytes());
    header[5] = 2;
    header[7] = 1;
    // With a wrong checksum the length is not even looked at.
    assert_eq!(Header::decode(&header, 5).unwrap_err().field, "record header checksum");
    let crc = crc32c::crc32c(&header[..8]);
    header[8..].copy_from_slice(&crc.to_be_bytes());
    let error = Header::decode(&header, 5).unwrap_err();
    assert_eq!((error.field, error.offset), ("record length", 5));

    let full = Header { body_len: MAX_BODY, kind: RUN, flags: frame::CHECKSUM };
    assert_eq!(Header::decode(&full.encode(), 0).unwrap(), full);
    assert_eq!(full.rest_len(), MAX_BODY + 4);
    let end = Header { body_len: 1, kind: frame::END, flags: 0 };
    assert_eq!(Header::decode(&end.encode(), 0).unwrap_err().field, "length of the END record");
    let flags = Header { body_len: 0, kind: RUN, flags: 4 };
    assert_eq!(Header::decode(&flags.encode(), 0).unwrap_err().field, "record flags");
}

#[test]
fn unknown_records_are_skipped_only_when_optional() {
    let decode = |kind| {
        let mut out = Vec::new();
        frame::encode(kind, &[b"whatever"], &mut out);
        decode_block(&out).map(|r| r.is_none()).map_err(|e| e.to_string())
    };
    assert_eq!(decode(frame::OPTIONAL | 77), Ok(true));
    let text = "record type at offset 4 is 0x4d, which is not known here";
    assert_eq!(decode(77), Err(text.to_owned()));
    // A known record without a checksum is not trusted.
    let header = Header { body_len: 8, kind: BITMAP_REMOVE, flags: 0 };
    let bytes = [&header.encode()[..], &[0, 0, 0, 1, 0, 0, 0, 1]].concat();
    assert_eq!(decode_block(&bytes).unwrap_err().field, "record checksum");
    let header = Header { body_len: 0, kind: BITMAP_REMOVE, flags: 3 };
    let bytes = [&header.encode()[..], &[0; 4]].concat();
    assert_eq!(decode_block(&bytes).unwrap_err().field, "record body");
}

#[test]
fn a_head_and_content_written_apart_are_one_record() {
    let content = vec![5; 2 << 20];
    let run = Run::data(DiskId(3), 4 * LEAF, &content);
    let mut head = Vec::new();
    run.encode_body_head(&mut head);
    assert_eq!(head.len(), RUN_HEAD_BYTES);
    let mut bytes = Vec::new();
    frame::encode(RUN, &[&head, &content], &mut bytes);
    assert_eq!(decode_block(&bytes).unwrap(), Some(BlockRecord::Run(run)));
    assert_eq!(Run::room_for_pieces(2 << 20), (64 << 10) - RUN_HEAD_BYTES);
}

#[test]
fn hellos_of_others_are_refused_by_name() {
    let offer = Offer {
        session: [1; 16],
        is_one_way: false,
        features: MULTI_CHANNEL | ZSTD | 1 << 60,
        required: ZSTD,
        channels: 4,
        program: "bitferry 0".into(),
    };
    let bytes = Hello::Offer(offer.clone()).encode();
    let mut qemu = bytes.clone();
    qemu[..4].copy_from_slice(b"QEVM");
    assert_eq!(decode_hello(&qemu).unwrap_err().field, "hello magic");
    let mut newer = bytes.clone();
    newer[7] = 2;
    assert_eq!(decode_hello(&newer).unwrap_err().field, "hello version");
    let mut huge = bytes;
    let header = Header { body_len: MAX_HELLO + 1, kind: OFFER, flags: frame::CHECKSUM };
    huge[8..20].copy_from_slice(&header.encode());
    assert_eq!(decode_hello(&huge).unwrap_err().field, "hello length");

    let choice = Choice {
        session: [1; 16],
        ticket: [2; 16],
        state: SessionState::Fresh,
        features: MULTI_CHANNEL | ZSTD,
        channels: 4,
        program: String::new(),
    };
    assert!(offer.accepts(&choice).is_ok());
    let refused = |change: fn(&mut Choice)| {
        let mut choice = choice.clone();
        change(&mut choice);
        offer.accepts(&choice).unwrap_err().field
    };
    assert_eq!(refused(|c| c.session = [2; 16]), "session");
    assert_eq!(refused(|c| c.features = MULTI_CHANNEL), "features chosen");
    assert_eq!(refused(|c| c.features |= ZLIB), "features chosen");
    assert_eq!(refused(|c| c.channels = 5), "connections granted");
    assert_eq!(refused(|c| c.features = ZSTD), "connections granted");
    let both = Offer { features: offer.features | ZLIB, ..offer.clone() };
    assert!(both.accepts(&choice).is_ok());
    let chosen = Choice { features: MULTI_CHANNEL | ZSTD | ZLIB, ..choice.clone() };
    assert_eq!(both.accepts(&chosen).unwrap_err().field, "features chosen");
    // Longer than it may be, a text is cut at a character.
    let refusal = Refusal { blame: Blame::Device, text: "é".repeat(600) };
    let Hello::Refusal(read) = decode_hello(&Hello::Refusal(refusal).encode()).unwrap() else {
        panic!("not a refusal")
    };
    assert_eq!(read.text, "é".repeat(512));
}
