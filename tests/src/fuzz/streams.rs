//! Migration streams, QEMU's and ours.

use format_spec::native::answer::Answer;
use format_spec::native::block::{
    BitmapCreate, BitmapShape, BitmapVersion, BlockRecord, Content, Disk, DiskId, Piece, Pieces,
    Run,
};
use format_spec::native::control::Control;
use format_spec::native::frame::{self, Record};
use format_spec::native::hello::{self, Choice, Hello, Join, Offer, PREFIX_BYTES, SessionState};
use format_spec::native::journal::JournalRecord;
use format_spec::native::units::UnitNodes;
use format_spec::qemu::command::Command;
use format_spec::qemu::configuration::{Configuration, Subsection};
use format_spec::qemu::container::{Element, Section, SectionKind, SectionName};
use format_spec::qemu::reply::Reply;
use format_spec::qemu::stream::{Decoder, Item};
use format_spec::qemu::{MAX_ITEM, Step, block, dirty_bitmap, ram, reply};
use format_spec::{Malformed, Reader, Writer};

/// Takes any bytes apart as a whole stream and writes each item again.
pub fn qemu_stream(bytes: &[u8]) {
    let (again, _) = take_apart(bytes);
    assert!(bytes.starts_with(&again), "an item is not written as it was read");
}

/// Takes a stream apart in reads of sizes that the first byte's many bytes of input say, and as a
/// whole: both must come to the same end.
pub fn load_script(bytes: &[u8]) {
    let Some((count, rest)) = bytes.split_first() else { return };
    let Some((sizes, stream)) = rest.split_at_checked(usize::from(*count)) else { return };
    let mut sizes = sizes.iter().map(|size| usize::from(*size) + 1).chain(std::iter::repeat(777));
    let (whole, whole_end) = take_apart(stream);

    let mut decoder = Decoder::new();
    let mut again = Writer::new();
    let (mut start, mut end) = (0, 0);
    let split_end = loop {
        let is_whole = end == stream.len();
        match decoder.next(&stream[start..end], is_whole) {
            Ok(Step::Item(item, len)) => {
                item.encode(&mut again);
                start += len;
            }
            Ok(Step::Need(needed)) => {
                assert!(needed > end - start, "needs what is there");
                if is_whole {
                    break None;
                }
                end = (end + sizes.next().unwrap_or(1)).min(stream.len());
            }
            Err(error) => break Some(error),
        }
    };
    assert_eq!(again.into_bytes(), whole, "reads change what is read");
    assert_eq!(split_end, whole_end, "reads change how it ends");
}

/// What was decoded, written again, and the error at its end if that is not the end of the input.
fn take_apart(bytes: &[u8]) -> (Vec<u8>, Option<Malformed>) {
    let mut decoder = Decoder::new();
    let mut again = Writer::new();
    let mut rest = bytes;
    loop {
        assert_eq!(decoder.offset(), (bytes.len() - rest.len()) as u64);
        match decoder.next(rest, true) {
            Ok(Step::Item(item, len)) => {
                assert!(len > 0 || item == Item::PackageEnd, "an item of no bytes");
                assert!(!item.to_string().is_empty());
                item.encode(&mut again);
                rest = &rest[len..];
            }
            Ok(Step::Need(needed)) => {
                assert!(needed > rest.len() && needed <= MAX_ITEM, "needs {needed} bytes");
                return (again.into_bytes(), None);
            }
            Err(error) => return (again.into_bytes(), Some(error)),
        }
    }
}

/// Takes any bytes apart as a return path.
pub fn reply_stream(bytes: &[u8]) {
    let mut decoder = reply::Decoder::default();
    let mut again = Writer::new();
    let mut rest = bytes;
    while let Ok(Step::Item(item, len)) = decoder.next(rest) {
        assert!(len > 0 && !item.to_string().is_empty());
        item.encode(&mut again);
        rest = &rest[len..];
    }
    assert!(bytes.starts_with(&again.into_bytes()));
}

/// Decodes any bytes as a hello.
pub fn native_hello(bytes: &[u8]) {
    let mut reader = Reader::new(bytes, 0);
    let Ok(prefix) = reader.array::<PREFIX_BYTES>("hello") else { return };
    let Ok(header) = hello::decode_prefix(prefix) else { return };
    let Ok(rest) = reader.take(header.rest_len(), "hello") else { return };
    if let Ok(hello) = Hello::decode(header, rest) {
        let again = hello.encode();
        assert_eq!(Hello::decode(header_of(&again), &again[PREFIX_BYTES..]), Ok(hello));
    }
}

fn header_of(hello: &[u8]) -> frame::Header {
    let prefix = Reader::new(hello, 0).array("hello").map(hello::decode_prefix);
    prefix.expect("a prefix").expect("a hello of ours")
}

/// Decodes any bytes as records.
pub fn native_records(bytes: &[u8]) {
    let mut reader = Reader::new(bytes, 0);
    while let Ok(record) = Record::decode(&mut reader) {
        decode_record(&record);
    }
}

/// Decodes any body as that of a record of any type, under a right checksum.
pub fn native_body(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first_chunk::<2>() else { return };
    let body = &body[..body.len().min(frame::MAX_BODY)];
    let kind = u16::from_be_bytes(*kind);
    let mut framed = Vec::new();
    frame::encode(kind, &[body], &mut framed);
    if let Ok(record) = Record::decode(&mut Reader::new(&framed, 0)) {
        decode_record(&record);
    } else {
        assert_eq!(kind, frame::END, "a record of ours");
    }
}

fn decode_record(record: &Record<'_>) {
    macro_rules! survive {
        ($type:ident) => {
            if let Ok(Some(value)) = $type::decode(record) {
                let mut again = Vec::new();
                value.encode(&mut again);
                let again = Record::decode(&mut Reader::new(&again, 0)).expect("a record of ours");
                assert_eq!($type::decode(&again), Ok(Some(value)));
            }
        };
    }
    survive!(BlockRecord);
    survive!(Control);
    survive!(Answer);
    survive!(JournalRecord);
    if let Ok(Some(BlockRecord::Run(run))) = BlockRecord::decode(record) {
        let shape = BitmapShape { granularity: 512, bits: 1 << 20 };
        let bytes: usize = run.pieces.iter().map(|piece| 20 + piece.bits.len()).sum();
        assert_eq!(bytes, run.pieces.as_bytes().len());
        run.pieces.iter().for_each(|piece| drop(shape.check(&piece)));
        let _ = run.content.check(1 << 30);
    }
}

fn written(write: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut out = Writer::new();
    write(&mut out);
    out.into_bytes()
}

/// A captured stream of the format-spec crate.
fn captured(name: &str) -> Vec<u8> {
    let path = crate::bitferry::workspace().join("format-spec/tests/data").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub(super) fn streams() -> Vec<Vec<u8>> {
    let named = |kind, id, name, version| {
        let name = Some(SectionName { name, instance: 0, version });
        Item::Element(Element::Section(Section { id, kind, name }))
    };
    let unnamed = |kind, id| Item::Element(Element::Section(Section { id, kind, name: None }));
    let configuration = Configuration {
        machine: "none",
        subsections: vec![Subsection::Capabilities(vec!["x-other"]), Subsection::Uuid([3; 16])],
    };
    let start = [Item::Start, Item::Element(Element::Configuration(configuration))];
    let end = [Item::Element(Element::Eof), Item::Element(Element::VmDescription(2))];
    let stream = |items: &[Item<'_>]| {
        written(|out| {
            start.iter().chain(items).chain(&end).for_each(|item| item.encode(out));
            out.bytes(b"{}");
        })
    };
    let block = |record| Item::Block(record);
    let bitmap =
        |device, name, body| Item::DirtyBitmap(dirty_bitmap::Record::new(device, name, body));
    let bits = dirty_bitmap::Body::Bits { first_sector: 0, sectors: 8192, buffer: Some(&[7; 32]) };
    let device = [
        named(SectionKind::Full, 9, "timer", 2),
        Item::Bytes(&[0x7e, 0, 0, 0, 9, 0x7e, 0]),
        Item::Footer(9),
    ];
    let nested = written(|out| device.iter().for_each(|item| item.encode(out)));
    let size = u32::try_from(nested.len()).expect("a small package");
    let zeroes = dirty_bitmap::Body::Bits { first_sector: 0, sectors: 8192, buffer: None };
    vec![
        captured("q100-multifd-nocomp.main.bin"),
        stream(&[
            named(SectionKind::Start, 1, "block", 1),
            block(block::Record::progress(3)),
            block(block::Record::zeroes(1 << 20, "disk0")),
            block(block::Record::end()),
            Item::Footer(1),
            unnamed(SectionKind::End, 1),
            block(block::Record::end()),
            Item::Footer(1),
        ]),
        stream(&[
            named(SectionKind::Start, 3, "dirty-bitmap", 1),
            bitmap(Some("d"), Some("b"), dirty_bitmap::Body::Start { granularity: 512, flags: 3 }),
            bitmap(None, None, bits),
            bitmap(None, None, zeroes),
            bitmap(None, Some("b"), dirty_bitmap::Body::Complete),
            Item::DirtyBitmap(dirty_bitmap::Record::end()),
            Item::Footer(3),
        ]),
        stream(&[
            Item::Element(Element::Command(Command::OpenReturnPath)),
            Item::Element(Element::Command(Command::PostcopyAdvise(Some((4096, 4096))))),
            named(SectionKind::Start, 2, "ram", 4),
            Item::Ram(ram::Record::MemSize(1 << 20)),
            Item::Ram(ram::Record::Block {
                name: "pc.ram",
                used_length: 1 << 20,
                address: None,
                mapped: None,
            }),
            Item::Ram(ram::Record::Page {
                block: Some("pc.ram"),
                offset: 4096,
                content: ram::Content::Fill(0),
            }),
            Item::Ram(ram::Record::Page {
                block: None,
                offset: 8192,
                content: ram::Content::Xbzrle(&[1, 1, 9]),
            }),
            Item::Ram(ram::Record::End),
            Item::Footer(2),
            Item::Element(Element::Command(Command::Packaged(size))),
            Item::Bytes(&nested),
        ]),
        stream(&device),
        native_stream(),
    ]
}

fn native_stream() -> Vec<u8> {
    let name = Some(SectionName { name: "block", instance: 0, version: 2 });
    let mut all = hellos().remove(0);
    all.extend(written(|out| {
        Item::Start.encode(out);
        Element::Section(Section { id: 1, kind: SectionKind::Start, name }).encode(out);
        out.bytes(&records().concat());
        let mut end = Vec::new();
        frame::encode_end(&mut end);
        out.bytes(&end);
        Item::Footer(1).encode(out);
        Element::Eof.encode(out);
    }));
    all
}

/// Streams behind read sizes.
pub(super) fn scripts() -> Vec<Vec<u8>> {
    let behind = |sizes: &[u8], stream: &[u8]| {
        [&[u8::try_from(sizes.len()).expect("few sizes")], sizes, stream].concat()
    };
    let sizes: [&[u8]; 3] = [&[0; 200], &[3, 0, 40, 7, 1, 0, 0, 255], &[]];
    let streams = streams();
    streams.iter().flat_map(|stream| sizes.map(|sizes| behind(sizes, stream))).collect()
}

pub(super) fn replies() -> Vec<Vec<u8>> {
    let replies = [
        Reply::Pong(1),
        Reply::ReqPages { block: Some("pc.ram"), offset: 4096, len: 4096 },
        Reply::ReqPages { block: None, offset: 8192, len: 4096 },
        Reply::RecvBitmap { block: "pc.ram", len: 16 },
        Reply::Bits(&[9; 16]),
        Reply::BitsEnd,
        Reply::ResumeAck,
        Reply::SwitchoverAck,
        Reply::Shut(0),
    ];
    let all = written(|out| replies.iter().for_each(|reply| reply.encode(out)));
    vec![all, captured("q100-postcopy-preempt.returnpath.bin")]
}

pub(super) fn hellos() -> Vec<Vec<u8>> {
    let (session, ticket, program) = ([1; 16], [2; 16], "bitferry".to_owned());
    let offer = Offer {
        session,
        is_one_way: false,
        features: 0xf,
        required: 1,
        channels: 4,
        program: program.clone(),
    };
    let state = SessionState::Ready;
    let choice = Choice { session, ticket, state, features: 1, channels: 2, program };
    let join = Join { session, ticket, channel: 1 };
    [Hello::Offer(offer), Hello::Choice(choice), Hello::Join(join)].map(|h| h.encode()).to_vec()
}

pub(super) fn records() -> Vec<Vec<u8>> {
    let (disk, version) = (DiskId(1), BitmapVersion { bitmap: 1, generation: 1 });
    let mut pieces = Vec::new();
    Piece { version, index: 0, bits: &[5; 24] }.encode(&mut pieces);
    Piece { version, index: 3, bits: &[] }.encode(&mut pieces);
    let pieces = Pieces::decode(Reader::new(&pieces, 0)).expect("pieces of ours");
    let shape = BitmapShape { granularity: 65536, bits: 16 };
    let block = |record: BlockRecord<'_>| {
        let mut out = Vec::new();
        record.encode(&mut out);
        out
    };
    let content = Content::Data { offset: 0, bytes: &[1; 512] };
    let mut barrier = Vec::new();
    Control::Barrier { number: 1, is_durable: true }.encode(&mut barrier);
    let mut have = Vec::new();
    Answer::Have(disk, UnitNodes { first: 2, nodes: &[[3; 32]; 2] }).encode(&mut have);
    let mut session = Vec::new();
    let target = "qcow2".to_owned();
    JournalRecord::Session { session: [1; 16], size: 512, target }.encode(&mut session);
    vec![
        block(BlockRecord::Disk(Disk { disk, keeps_rest: false, size: 1 << 20, name: "vda" })),
        block(BlockRecord::BitmapCreate(BitmapCreate {
            version,
            disk,
            shape,
            is_enabled: true,
            is_persistent: true,
            name: "nightly",
        })),
        block(BlockRecord::Run(Run { disk, content, pieces })),
        block(BlockRecord::Run(Run { disk, content: Content::None, pieces })),
        block(BlockRecord::Run(Run::zeroes(disk, 65536, 1 << 19))),
        barrier,
        have,
        session,
    ]
}

/// Types and bodies of records.
pub(super) fn bodies() -> Vec<Vec<u8>> {
    let body = |record: &Vec<u8>| {
        let record = Record::decode(&mut Reader::new(record, 0)).expect("a record of ours");
        [&record.header.kind.to_be_bytes()[..], record.body].concat()
    };
    records().iter().map(body).collect()
}
