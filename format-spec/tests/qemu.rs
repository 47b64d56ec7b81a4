//! QEMU's records and elements: what is written is read, what QEMU takes is taken, and what makes
//! QEMU abort is refused.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use format_spec::qemu::command::Command;
use format_spec::qemu::configuration::{Configuration, Subsection};
use format_spec::qemu::container::{Element, Section, SectionKind, SectionName};
use format_spec::qemu::dirty_bitmap::{self, bits_range, trim_buffer};
use format_spec::qemu::reply::Reply;
use format_spec::qemu::stream::{Decoder, Item};
use format_spec::qemu::{Step, block, cut_off, ram, reply};
use format_spec::{Malformed, Problem, Reader, Writer};
use proptest::collection::vec;
use proptest::prelude::*;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    let pair = |p: &[u8]| u8::from_str_radix(std::str::from_utf8(p).unwrap(), 16).unwrap();
    digits.chunks(2).map(pair).collect()
}

fn bytes(write: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut out = Writer::new();
    write(&mut out);
    out.into_bytes()
}

/// All items of a stream as text.
fn items(decoder: &mut Decoder, stream: &[u8]) -> Result<Vec<String>, Malformed> {
    let mut rest = stream;
    let mut items = Vec::new();
    while !(rest.is_empty() && decoder.may_end()) {
        match decoder.next(rest, true)? {
            Step::Item(item, len) => {
                items.push(item.to_string().trim().to_owned());
                rest = &rest[len..];
            }
            Step::Need(needed) => return Err(cut_off(decoder.offset(), needed, rest.len())),
        }
    }
    Ok(items)
}

/// A stream whose element bytes are `body`, behind the shortest start.
fn stream(body: &[u8]) -> Vec<u8> {
    let mut all = hex("5145564d 00000003 07 00000000");
    all.extend(body);
    all
}

fn field_of(body: &[u8]) -> &'static str {
    items(&mut Decoder::new(), &stream(body)).unwrap_err().field
}

fn live(name: &str, version: u32, body: &[u8]) -> Vec<u8> {
    let name = Some(SectionName { name, instance: 0, version });
    let section = Section { id: 5, kind: SectionKind::Start, name };
    let mut all = bytes(|out| section.encode(out));
    all.extend(body);
    all.extend(hex("7e 00000005"));
    all
}

fn names() -> impl Strategy<Value = String> {
    "[a-z/@.0-9é-]{1,120}"
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn elements_survive(
        name in names(), numbers: [u32; 3], wide: (u64, u64),
        ranges in vec(any::<[u8; 16]>(), 1..13),
        uuid: [u8; 16], capabilities in vec(names(), 0..5), which in 0usize..16,
    ) {
        let [id, instance, version] = numbers;
        let command = Element::Command;
        let named = Some(SectionName { name: &name, instance, version });
        let element = match which {
            0 => Element::Eof,
            1 => Element::Section(Section { id, kind: SectionKind::Start, name: named }),
            2 => Element::Section(Section { id, kind: SectionKind::Full, name: named }),
            3 => Element::Section(Section { id, kind: SectionKind::Part, name: None }),
            4 => Element::Section(Section { id, kind: SectionKind::End, name: None }),
            5 => command(Command::Ping(id)),
            6 => command(Command::PostcopyAdvise(Some(wide))),
            7 => command(Command::PostcopyAdvise(None)),
            8 => command(Command::PostcopyRamDiscard { block: &name, ranges: &ranges }),
            9 => command(Command::Packaged(id)),
            10 => command(Command::RecvBitmap(&name)),
            11 => command(Command::SwitchoverStart),
            12 => command(Command::OpenReturnPath),
            13 => Element::VmDescription(id & 0xff_ffff),
            _ => Element::Configuration(Configuration {
                machine: &name,
                subsections: vec![
                    Subsection::Capabilities(capabilities.iter().map(String::as_str).collect()),
                    Subsection::TargetPageBits(12),
                    Subsection::Uuid(uuid),
                ],
            }),
        };
        let mut written = bytes(|out| element.encode(out));
        let len = written.len();
        // A configuration looks at the next byte.
        written.push(0);
        let mut reader = Reader::new(&written, 0);
        prop_assert_eq!(Element::decode(&mut reader).unwrap(), element.clone());
        prop_assert_eq!(reader.left(), 1);
        for cut in 0..len {
            prop_assert!(Element::decode(&mut Reader::new(&written[..cut], 0)).is_err());
        }
    }

    #[test]
    fn replies_survive(name in names(), wide: u64, narrow: u32, bits in vec(any::<u8>(), 0..40)) {
        let bits: Vec<u8> = bits.chunks_exact(8).flatten().copied().collect();
        let replies = [
            Reply::Shut(narrow),
            Reply::Pong(narrow),
            Reply::ReqPages { block: Some(&name), offset: wide, len: narrow },
            Reply::ReqPages { block: None, offset: wide, len: narrow },
            Reply::RecvBitmap { block: &name, len: bits.len() as u64 },
            Reply::Bits(&bits),
            Reply::BitsEnd,
            Reply::ResumeAck,
            Reply::SwitchoverAck,
        ];
        let written = bytes(|out| replies.iter().for_each(|reply| reply.encode(out)));
        let mut decoder = reply::Decoder::default();
        let mut rest = &written[..];
        let expected = replies.iter().filter(|reply| **reply != Reply::Bits(&[]));
        for reply in expected {
            let step = decoder.next(rest).unwrap();
            let Step::Item(found, len) = step else { panic!("{step:?}") };
            prop_assert_eq!(&found, reply);
            rest = &rest[len..];
        }
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn dirty_bitmap_records_survive(
        device in proptest::option::of(names()), bitmap in proptest::option::of(names()),
        wide: u64, sectors: u32, bits in 9u32..32, flags in 0u8..8,
        buffer in proptest::option::of(vec(any::<u8>(), 0..300)), which in 0usize..4,
    ) {
        use dirty_bitmap::{Body, Record};
        let body = match which {
            0 => Body::Start { granularity: 1 << bits, flags },
            1 => Body::Complete,
            2 => Body::Bits { first_sector: wide, sectors, buffer: buffer.as_deref() },
            _ => Body::None,
        };
        let first = Record::new(Some("d"), Some("b"), Body::None);
        let record = Record::new(device.as_deref(), bitmap.as_deref(), body);
        let written = bytes(|out| record.encode(out));
        let mut decoder = dirty_bitmap::Decoder::default();
        decoder.decode(&mut Reader::new(&bytes(|out| first.encode(out)), 0)).unwrap();
        let mut reader = Reader::new(&written, 0);
        prop_assert_eq!(decoder.clone().decode(&mut reader).unwrap(), record);
        prop_assert_eq!(reader.left(), 0);
        for cut in 0..written.len() {
            prop_assert!(decoder.clone().decode(&mut Reader::new(&written[..cut], 0)).is_err());
        }
    }

    #[test]
    fn ram_records_survive(
        lengths in vec(1u64..1 << 30, 1..5), page in 0u64..1 << 30, fill: u8,
        xbzrle in vec(any::<u8>(), 0..64), address: u64,
    ) {
        let name = |n: usize| format!("block{n}");
        let all: Vec<String> = (0..lengths.len()).map(name).collect();
        let plain = [fill; ram::PAGE_BYTES];
        let mut records = vec![ram::Record::MemSize(lengths.iter().map(|l| l * 4096).sum())];
        for (name, length) in all.iter().zip(&lengths) {
            let (used_length, address, mapped) = (length * 4096, Some(address), None);
            records.push(ram::Record::Block { name, used_length, address, mapped });
        }
        let offset = page % lengths[0] * 4096;
        for (block, content) in [
            (Some(all[0].as_str()), ram::Content::Fill(fill)),
            (None, ram::Content::Plain(&plain)),
            (None, ram::Content::Xbzrle(&xbzrle)),
            (Some(all[0].as_str()), ram::Content::Zlib(&xbzrle)),
        ] {
            records.push(ram::Record::Page { block, offset, content });
        }
        records.extend([ram::Record::MultifdFlush, ram::Record::End]);
        let written = bytes(|out| records.iter().for_each(|record| record.encode(out)));
        let options = ram::Options { has_addresses: true, is_mapped: false };
        let mut decoder = ram::Decoder::new(options);
        let mut reader = Reader::new(&written, 0);
        for record in &records {
            prop_assert_eq!(&decoder.decode(&mut reader).unwrap(), record);
        }
        prop_assert_eq!(reader.left(), 0);
        prop_assert_eq!(decoder.blocks().len(), lengths.len());
    }

    #[test]
    fn chunks_cover_a_bitmap_once(
        granularity_bits in 9u32..32, sectors in 1u64..1 << 40, coarse: bool,
    ) {
        let granularity = 1u32 << granularity_bits;
        // Few chunks: small disks for fine bitmaps.
        let sectors = if coarse { sectors } else { sectors % 100_000 + 1 };
        let size = sectors * 512;
        prop_assume!(size / u64::from(granularity) < 1 << 20);
        let (mut sector, mut byte) = (0, 0);
        for (first, count, range) in dirty_bitmap::chunks(granularity, size) {
            prop_assert_eq!((first, range.start), (sector, byte));
            prop_assert!(range.end - range.start <= 1024);
            sector += u64::from(count);
            byte = range.end;
        }
        prop_assert_eq!(sector, sectors);
        prop_assert_eq!(byte, size.div_ceil(u64::from(granularity)).div_ceil(64) * 8);
    }

    #[test]
    fn any_bytes_are_items_or_an_error(body in vec(any::<u8>(), 0..400), seeded: bool) {
        let all = if seeded { stream(&body) } else { body };
        let mut decoder = Decoder::new();
        let mut rest = &all[..];
        let mut again = Writer::new();
        while let Ok(Step::Item(item, len)) = decoder.next(rest, true) {
            item.encode(&mut again);
            rest = &rest[len..];
        }
        prop_assert!(all.starts_with(&again.into_bytes()));
    }
}

#[test]
fn the_shortest_bitmap_stream_is_read() {
    let stream = [
        hex("5145564d 00000003 07 00000000 01 00000005 0c"),
        b"dirty-bitmap".to_vec(),
        hex("00000000 00000001 1c 05"),
        b"disk0\x02bm".to_vec(),
        hex("00010000 01 01 7e 00000005 03 00000005 40 0000000000000000 00002000"),
        hex("0000000000000020 0400000000000100"),
        vec![0; 24],
        hex("20 01 7e 00000005 00 06 00000002 7b7d"),
    ]
    .concat();
    assert_eq!(stream.len(), 133);
    let found = items(&mut Decoder::new(), &stream).unwrap();
    assert_eq!(
        found,
        [
            "stream, version 3",
            "configuration of machine \"\"",
            "START 5 \"dirty-bitmap\" instance 0 version 1",
            "device \"disk0\" bitmap \"bm\" START granularity 65536 flags 0x1",
            "EOS",
            "footer of section 5",
            "END 5",
            "BITS sectors 0 + 8192 32 bytes 0400000000000100…",
            "COMPLETE",
            "EOS",
            "footer of section 5",
            "EOF",
            "VM description of 2 bytes",
            "2 bytes 7b7d",
        ]
    );
    for cut in 0..stream.len() {
        let whole = items(&mut Decoder::new(), &stream[..cut]).is_ok();
        assert_eq!(whole, cut == stream.len() - 7, "cut at {cut}");
    }
}

#[test]
fn the_shortest_ram_stream_is_read() {
    let body = [
        hex("01 00000007 03"),
        b"ram".to_vec(),
        hex("00000000 00000004 0000000000100004 03"),
        b"ram".to_vec(),
        hex("0000000000100000 0000000000000010 7e 00000007 03 00000007 0000000000003002 03"),
        b"ram".to_vec(),
        hex("00 0000000000000010 7e 00000007 00 06 00000002 7b7d"),
    ]
    .concat();
    let stream = stream(&body);
    assert_eq!(stream.len(), 102);
    assert!(
        items(&mut Decoder::new(), &stream)
            .unwrap()
            .contains(&"page 0x3000 of \"ram\" all 0".into())
    );
}

#[test]
fn the_configuration_of_a_real_machine_is_read() {
    let start = [
        hex("5145564d 00000003 07 00000004"),
        b"none".to_vec(),
        hex("05 1a"),
        b"configuration/capabilities".to_vec(),
        hex("00000001 00000001 0f"),
        b"x-ignore-shared".to_vec(),
        hex("05 12"),
        b"configuration/uuid".to_vec(),
        hex("00000001 000102030405060708090a0b0c0d0e0f"),
    ]
    .concat();
    assert_eq!(start.len(), 109);
    let found = items(&mut Decoder::new(), &[&start[..], &[0]].concat()).unwrap();
    let expected = "configuration of machine \"none\", capabilities [\"x-ignore-shared\"], \
                    uuid 000102030405060708090a0b0c0d0e0f";
    assert_eq!(found[1], expected);

    let with = |name: &str, version: u32, payload: &[u8]| {
        let mut all = hex("5145564d 00000003 07 00000000 05");
        all.push(name.len() as u8);
        all.extend(name.as_bytes());
        all.extend(version.to_be_bytes());
        all.extend(payload);
        all.push(0);
        items(&mut Decoder::new(), &all).map(|_| ()).map_err(|e| e.field)
    };
    assert_eq!(with("configuration/target-page-bits", 1, &[0, 0, 0, 12]), Ok(()));
    let bits = with("configuration/target-page-bits", 1, &[0, 0, 0, 13]);
    assert_eq!(bits, Err("target page bits"));
    assert_eq!(with("configuration/other", 1, &[]), Err("subsection name"));
    assert_eq!(with("configuration/uuid", 2, &[0; 16]), Err("subsection version"));
    let many = with("configuration/capabilities", 1, &[0xff; 4]);
    assert_eq!(many, Err("number of capabilities"));
}

#[test]
fn what_is_wrong_around_sections_is_named() {
    let end = block_bytes(&block::Record::end());
    for (body, field) in [
        (hex("08 000b 0000 05"), "element type"),
        (hex("09"), "element type"),
        (hex("07 00000000 00"), "configuration"),
        (hex("06 00000002 7b7d"), "VM description"),
        (hex("00 06 01000001"), "length of the VM description"),
        (hex("00 02 00000005"), "element after the end of the stream"),
        (hex("02 00000005"), "section id"),
        (hex("03 00000000"), "section id"),
        (hex("01 00000005 00"), "section name"),
        (hex("01 00000005 02 61ff"), "section name"),
        (hex("01 00000005 02 6100"), "section name"),
        (live("ram", 3, &[]), "section version"),
        (live("block", 3, &[]), "section version"),
        (live("dirty-bitmap", 0, &[]), "section version"),
        (live("bitferry", 2, &[]), "section version"),
        (
            [hex("01 00000005 05 626c6f636b 00000001 00000001"), end.clone()].concat(),
            "section instance",
        ),
        ([live("block", 1, &end), hex("02 00000006")].concat(), "section id"),
        (live("block", 1, &[&end[..], &hex("7f 00000005")].concat()), "section footer"),
        (live("block", 1, &[&end[..], &hex("7e 00000006")].concat()), "section id in the footer"),
        (
            [live("block", 1, &end), hex("02 00000005"), hex("0000000000000000")].concat(),
            "block flags",
        ),
        (hex("08 0000 0000"), "command"),
        (hex("08 000c 0000"), "command"),
        (hex("08 0002 0000"), "PING value"),
        (hex("08 0002 0005 0000000000"), "command"),
        (hex("08 0001 0001 00"), "command"),
        (hex("08 0003 0008 0000000000000000"), "page size of the target"),
        (hex("08 0006 0004 00 01 61 00"), "RAM_DISCARD ranges"),
        (hex("08 0006 0004 01 01 61 00"), "RAM_DISCARD version"),
        (hex("08 0006 0004 00 01 61 01"), "RAM_DISCARD name end"),
        (hex("08 000a 0001 00"), "RAM block name"),
        (hex("08 000a 0002 02 61"), "RAM block name"),
    ] {
        assert_eq!(field_of(&body), field, "{body:x?}");
    }
    // QEMU's `block` 1 is read as version 0 too, and takes a section under another id.
    let again =
        [live("block", 0, &end), hex("01 00000009 05 626c6f636b 00000000 00000001")].concat();
    let again =
        [again, end, hex("7e 00000009 03 00000009 0000000000000002 7e 00000009 00")].concat();
    assert_eq!(items(&mut Decoder::new(), &stream(&again)).unwrap().len(), 12);
}

#[test]
fn the_start_of_a_stream_is_checked() {
    let field = |bytes: &[u8]| items(&mut Decoder::new(), bytes).unwrap_err().field;
    assert_eq!(field(b"QEVN\0\0\0\x03"), "stream magic");
    assert_eq!(field(&hex("5145564d 00000002")), "stream version");
    assert_eq!(field(b"BFRY\0\0\0\x02"), "hello version");
    assert_eq!(field(&hex("5145564d 00000003 07 00000100")), "length of the machine name");
    // Without a configuration, as old machines send it.
    assert!(items(&mut Decoder::new(), &hex("5145564d 00000003 00")).is_ok());
}

#[test]
fn packages_hold_elements_and_nothing_else() {
    let package = |inner: &[u8], len: u32| {
        [hex("08 0007 0004"), len.to_be_bytes().to_vec(), inner.to_vec()].concat()
    };
    let device = [hex("04 00000003 03 646576 00000000 00000001 aabb7e 7e 00000003")].concat();
    let inner = [hex("08 0004 0000"), device.clone(), hex("08 0005 0000")].concat();
    let body = [package(&inner, inner.len() as u32), hex("08 0002 0004 00000004 00")].concat();
    let found = items(&mut Decoder::new(), &stream(&body)).unwrap();
    let expected = [
        "COMMAND PACKAGED 35 bytes",
        "COMMAND POSTCOPY_LISTEN",
        "FULL 3 \"dev\" instance 0 version 1",
        "2 bytes aabb",
        "1 bytes 7e",
        "footer of section 3",
        "COMMAND POSTCOPY_RUN",
        "end of the package",
        "COMMAND PING 4",
        "EOF",
    ];
    assert_eq!(found[2..], expected);
    // A device may end the package.
    let last = [package(&device, device.len() as u32), hex("00")].concat();
    assert!(items(&mut Decoder::new(), &stream(&last)).is_ok());

    let refused = |inner: &[u8], len: usize| {
        field_of(&[package(inner, len as u32), hex("00000000000000")].concat())
    };
    assert_eq!(refused(&hex("00"), 1), "end of the stream");
    assert_eq!(refused(&package(&[], 0), 9), "package inside a package");
    assert_eq!(refused(&hex("08 0002 0004 00"), 6), "element of a package");
    // A package that ends inside a device's state is refused at its end, however it is read.
    let open = package(&device[..device.len() - 1], device.len() as u32 - 1);
    let all = stream(&[open, hex("03 00")].concat());
    for part in 1..all.len() {
        let mut decoder = Decoder::new();
        let (mut start, mut end) = (0, 0);
        let error = loop {
            match decoder.next(&all[start..end], end == all.len()) {
                Ok(Step::Item(_, len)) => start += len,
                Ok(Step::Need(_)) => end = (end + part).min(all.len()),
                Err(error) => break error,
            }
        };
        let at = all.len() as u64 - 2;
        assert_eq!((error.field, error.offset), ("element of a package", at), "{part}");
    }
    // Four GiB are announced, nothing comes: no memory is spent on it.
    let error = items(&mut Decoder::new(), &stream(&package(&[], u32::MAX))).unwrap_err();
    assert_eq!(error.field, "next item of the stream");
}

#[test]
fn streams_of_every_phase_are_read() {
    let eos = hex("0000000000000010");
    let start = live("ram", 4, &eos);
    let end = [hex("03 00000005"), eos.clone(), hex("7e 00000005")].concat();
    // Two END sections, none, only FULL; with and without a description.
    for body in [
        [&start[..], &end, &end, &[0]].concat(),
        [&start[..], &[0]].concat(),
        [&start[..], &hex("00 06 00000000")].concat(),
        [&hex("04 00000005 03 72616d 00000000 00000004")[..], &eos, &hex("7e 00000005 00")]
            .concat(),
    ] {
        let mut decoder = Decoder::new();
        assert!(items(&mut decoder, &stream(&body)).is_ok(), "{body:x?}");
        assert!(decoder.may_end());
    }
    // Section id 0 is poison to write, not to read.
    assert!(
        items(
            &mut Decoder::new(),
            &stream(&hex("04 00000000 01 74 00000000 00000001 aa 7e 00000000 00"))
        )
        .is_ok()
    );
    // After a cut in postcopy: no magic, ids and block names go on.
    let mut decoder = Decoder::new();
    let first = [&start[..], &hex("02 00000005 0000000000002008 01 61")].concat();
    assert!(items(&mut decoder, &stream(&first)).is_err());
    let again = [hex("08 000a 0002 01 61 08 0009 0000"), end, hex("00")].concat();
    let found = items(&mut decoder.recovered(), &again).unwrap();
    assert_eq!(found[..2], ["COMMAND RECV_BITMAP \"a\"", "COMMAND POSTCOPY_RESUME"]);
}

#[test]
fn a_flood_of_empty_parts_costs_nothing_that_stays() {
    let mut body = live("ram", 4, &hex("0000000000000010"));
    let part = hex("02 00000005 0000000000000010 7e 00000005");
    (0..115_000).for_each(|_| body.extend(&part));
    body.push(0);
    let all = stream(&body);
    let mut decoder = Decoder::new();
    let (mut at, mut count) = (0, 0);
    while at < all.len() {
        let Step::Item(_, len) = decoder.next(&all[at..], true).unwrap() else { panic!("cut off") };
        at += len;
        count += 1;
    }
    assert_eq!(count, 6 + 3 * 115_000);
}

fn block_bytes(record: &block::Record<'_>) -> Vec<u8> {
    bytes(|out| record.encode(out))
}

#[test]
fn block_words_are_read_as_qemu_reads_them() {
    let content = Box::new([7; block::CHUNK_BYTES]);
    let decode = |bytes: &[u8]| {
        let mut reader = Reader::new(bytes, 0);
        block::Record::decode(&mut reader).map(|r| (r.to_string(), r.ends_body(), reader.left()))
    };
    let data = block_bytes(&block::Record::data(3 << 20, "disk0", &content));
    assert_eq!(data.len(), 8 + 6 + block::CHUNK_BYTES);
    let text = "chunk 0x300000 of \"disk0\" 1048576 bytes 0707070707070707…".to_owned();
    assert_eq!(decode(&data).unwrap(), (text.clone(), false, 0));
    for (flags, ends) in
        [(0x11u16, false), (0x03, true), (0x05, false), (0x31, false), (0x101, false)]
    {
        let mut word = data.clone();
        word[6..8].copy_from_slice(&[(flags >> 8) as u8, (flags & 0xff) as u8]);
        assert_eq!(decode(&word).unwrap(), (text.clone(), ends, 0), "flags {flags:#x}");
        let mut reader = Reader::new(&word, 0);
        let record = block::Record::decode(&mut reader).unwrap();
        assert!(block_bytes(&record) == word, "flags {flags:#x}");
    }
    let zeroes = block_bytes(&block::Record::zeroes(1 << 20, ""));
    assert_eq!(decode(&zeroes).unwrap(), ("chunk 0x100000 of \"\" zeroes".to_owned(), false, 0));
    assert_eq!(decode(&block_bytes(&block::Record::progress(33))).unwrap().0, "PROGRESS 33");
    assert_eq!(decode(&hex("0000000000000006")).unwrap(), ("PROGRESS 0".to_owned(), true, 0));
    assert_eq!(decode(&hex("ffffffffffffff04")).unwrap().0, "PROGRESS 100");
    for word in [0x00, 0x08, 0x10, 0x20, 0x30] {
        assert_eq!(
            decode(&hex(&format!("00000000000000{word:02x}"))).unwrap_err().field,
            "block flags"
        );
    }
    assert_eq!(block::chunk_len(0, 3 << 20), Ok(1 << 20));
    assert_eq!(block::chunk_len(2 << 20, (2 << 20) + 512), Ok(512));
    assert_eq!(block::chunk_len(512, 513), Ok(1));
    let beyond = Problem::OutOfRange { value: 512, min: 0, max: 511 };
    assert_eq!(block::chunk_len(512, 512), Err(beyond));
    assert!(block::chunk_len(!511, 512).is_err());
}

#[test]
fn dirty_bitmap_flags_have_three_widths() {
    let rest = b"\x05disk0\x02bm\0\x01\0\0\x01";
    for prefix in [&b""[..], b"\x80", b"\x80\x80\0", b"\xff\xff\xff"] {
        let written = [prefix, b"\x1c", rest].concat();
        let mut decoder = dirty_bitmap::Decoder::default();
        let record = decoder.decode(&mut Reader::new(&written, 0)).unwrap();
        assert_eq!(record.flags_before, prefix);
        assert_eq!((decoder.device(), decoder.bitmap()), ("disk0", "bm"));
        assert_eq!(bytes(|out| record.encode(out)), written);
    }
    // One record may complete the bitmap and end the body.
    let mut decoder = dirty_bitmap::Decoder::default();
    let record = decoder.decode(&mut Reader::new(b"\x2d\x01d\x01b", 0)).unwrap();
    assert_eq!(record.body, dirty_bitmap::Body::Complete);
    assert!(record.ends_body());
    assert_eq!(record.to_string(), "device \"d\" bitmap \"b\" COMPLETE EOS");
    // START goes before COMPLETE, that before BITS; nothing is nothing.
    let record = decoder.decode(&mut Reader::new(b"\x70\0\0\x02\0\0", 0)).unwrap();
    assert_eq!(record.body, dirty_bitmap::Body::Start { granularity: 512, flags: 0 });
    let record = decoder.decode(&mut Reader::new(b"\x60", 0)).unwrap();
    assert_eq!(record.body, dirty_bitmap::Body::Complete);
    let record = decoder.decode(&mut Reader::new(b"\0", 0)).unwrap();
    assert_eq!(record.body, dirty_bitmap::Body::None);
}

#[test]
fn what_makes_qemu_abort_or_cancel_is_refused() {
    let mut known = dirty_bitmap::Decoder::default();
    known.decode(&mut Reader::new(b"\x0c\x01d\x01b", 0)).unwrap();
    let decode =
        |bytes: &[u8]| known.clone().decode(&mut Reader::new(bytes, 0)).err().map(|e| e.field);
    let start = |granularity: u32, flags: u8| {
        decode(&[&[0x10][..], &granularity.to_be_bytes(), &[flags]].concat())
    };
    for granularity in [0, 1, 256, 1000, 511, u32::MAX] {
        assert_eq!(start(granularity, 0), Some("dirty bitmap granularity"), "{granularity}");
    }
    assert_eq!(start(1 << 31, 7), None);
    assert_eq!(start(512, 8), Some("dirty bitmap START flags"));
    let buffer = |len: u64| {
        let head = hex("40 0000000000000000 00002000");
        decode(&[&head[..], &len.to_be_bytes(), &vec![0; len.min(20_000) as usize]].concat())
    };
    assert_eq!((buffer(0), buffer(10240)), (None, None));
    assert_eq!(buffer(10241), Some("dirty bitmap buffer length"));
    assert_eq!(buffer(u64::MAX), Some("dirty bitmap buffer length"));

    let nameless = |bytes: &[u8]| {
        let mut decoder = dirty_bitmap::Decoder::default();
        decoder.decode(&mut Reader::new(bytes, 0)).unwrap_err().field
    };
    assert_eq!(nameless(b"\x20"), "device name of a dirty bitmap");
    assert_eq!(nameless(b"\x28\x01d"), "name of a dirty bitmap");
    assert_eq!(nameless(b"\x24\x01b"), "device name of a dirty bitmap");
    assert_eq!(nameless(b"\x28\0"), "device name of a dirty bitmap");
    assert_eq!(nameless(b"\x24\0"), "name of a dirty bitmap");

    let size = 4 << 20;
    assert_eq!(bits_range(0, 8192, 65536, size), Ok(0..8));
    assert_eq!(bits_range(0, 8192, 512, size), Ok(0..1024));
    assert_eq!(bits_range(0, 64, 512, size), Ok(0..8));
    assert_eq!(bits_range(64, 128, 512, size), Ok(8..24));
    // An end that is the disk's need not be a whole granule.
    assert_eq!(bits_range(0, 8193, 65536, size + 512), Ok(0..16));
    for (first, sectors) in [(1, 64), (0, 63), (0, 0), (8192, 64), (0, 8256), (u64::MAX, 64)] {
        assert!(bits_range(first, sectors, 512, size).is_err(), "{first} + {sectors}");
    }
    for (len, ok) in [(7, false), (8, true), (32, true), (40, false)] {
        let buffer = vec![1; len];
        let trimmed = trim_buffer(&buffer, &(0..8));
        assert_eq!(trimmed.ok(), ok.then_some(&[1; 8][..]), "{len} bytes");
    }
}

#[test]
fn ram_words_are_exact() {
    let list = hex("0000000000003004 01 61 0000000000001000 01 62 0000000000002000");
    let decode = |bytes: &[u8]| {
        let all = [&list[..], bytes].concat();
        let mut reader = Reader::new(&all, 0);
        let mut decoder = ram::Decoder::default();
        let mut last = String::new();
        while reader.left() > 0 {
            last = decoder.decode(&mut reader)?.to_string();
        }
        Ok::<_, Malformed>(last)
    };
    let fine = |text: &str| decode(&hex(text)).unwrap();
    let field = |text: &str| decode(&hex(text)).unwrap_err().field;
    assert_eq!(fine("0000000000001002 01 62 05"), "page 0x1000 of \"b\" all 5");
    assert_eq!(fine("0000000000000002 01 62 00 0000000000001022 00"), "page 0x1000 all 0");
    assert_eq!(fine("0000000000000040 01 61 01 0000"), "page 0x0 of \"a\" xbzrle 0 bytes");
    assert_eq!(field("0000000000000022 00"), "ram page");
    assert_eq!(field("0000000000001002 01 61 00"), "offset of a ram page");
    assert_eq!(field("0000000000000002 01 63 00"), "RAM block name");
    assert_eq!(field("0000000000000002 00"), "RAM block name");
    assert_eq!(field("0000000000000040 01 61 02 0000"), "xbzrle encoding");
    assert_eq!(field("0000000000000040 01 61 01 1001"), "xbzrle length");
    assert_eq!(field("0000000000000100 01 61 0000100f"), "length of a compressed page");
    for word in
        ["0001", "0018", "0012", "0030", "0220", "0080", "0024", "0000", "000a", "0400", "1010"]
    {
        assert_eq!(field(&format!("000000000000{word}")), "ram flags", "{word}");
    }
    // A list that says one thing and sums up to another.
    assert_eq!(field("0000000000001004 01 61 0000000000002000"), "RAM block length");
    assert_eq!(field("0000000000002004 01 61 0000000000000800"), "RAM block length");
    assert_eq!(
        field("0000000000002004 01 61 0000000000001000 01 61 0000000000001000"),
        "RAM block name"
    );
    // Without a list any block goes, as in QEMU.
    let mut bare = ram::Decoder::default();
    assert!(bare.decode(&mut Reader::new(&hex("ffffffffffff1002 01 61 00"), 0)).is_ok());
}

#[test]
fn replies_that_are_wrong_are_named() {
    let field = |text: &str| {
        let bytes = hex(text);
        let mut decoder = reply::Decoder::default();
        let mut rest = &bytes[..];
        loop {
            match decoder.next(rest) {
                Ok(Step::Item(_, len)) => rest = &rest[len..],
                Ok(Step::Need(_)) => return "more",
                Err(error) => return error.field,
            }
        }
    };
    assert_eq!(field("0000 0000"), "return path message");
    assert_eq!(field("0008 0000"), "return path message");
    assert_eq!(field("0001 0201"), "length of a return path message");
    assert_eq!(field("0001 0003 000000"), "SHUT status");
    assert_eq!(field("0001 0005 0000000000"), "return path message");
    assert_eq!(field("0004 000c 000000000000000000001000"), "RAM block name");
    assert_eq!(field("0006 0004 00000002"), "RESUME_ACK value");
    assert_eq!(field("0005 0002 0161 0000000040000000"), "size of a bitmap of received pages");
    assert_eq!(field("0005 0002 0161 0000000000000004"), "size of a bitmap of received pages");
    assert_eq!(
        field("0005 0002 0161 0000000000000000 0123456789abcdee"),
        "end of a bitmap of received pages"
    );
    assert_eq!(field("0005 0002 0161 0000000000000008 0000"), "more");
}

#[test]
fn a_native_stream_is_read_as_well() {
    use format_spec::native::block::{BlockRecord, DiskId, Run};
    use format_spec::native::hello::{Hello, Offer};
    let offer = Offer {
        session: [1; 16],
        is_one_way: true,
        features: 0,
        required: 0,
        channels: 1,
        program: "test".into(),
    };
    let mut body = Vec::new();
    BlockRecord::Run(Run::zeroes(DiskId(1), 0, 1 << 30)).encode(&mut body);
    BlockRecord::End.encode(&mut body);
    let all = [Hello::Offer(offer).encode(), stream(&live("block", 2, &body)), vec![0]].concat();
    let found = items(&mut Decoder::new(), &all).unwrap();
    let expected = [
        "native hello, version 1",
        "record of type 0x1 43 bytes 0101010101010101…",
        "stream, version 3",
        "configuration of machine \"\"",
        "START 5 \"block\" instance 0 version 2",
        "record of type 0x2 32 bytes 0000000100000004…",
        "END",
        "footer of section 5",
        "EOF",
    ];
    assert_eq!(found, expected);
    let mut again = Writer::new();
    let mut decoder = Decoder::new();
    let mut rest = &all[..];
    while let Ok(Step::Item(item, len)) = decoder.next(rest, false) {
        if let Item::Native(record) = &item {
            assert_eq!(record.header.has_checksum(), !record.header.is_end());
        }
        item.encode(&mut again);
        rest = &rest[len..];
    }
    assert_eq!(again.into_bytes(), all);
}
