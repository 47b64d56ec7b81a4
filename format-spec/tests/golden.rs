//! Streams captured from real QEMU: decoded, listed, written again to the same bytes, and decoded
//! with the input cut at any place.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::PathBuf;

use format_spec::qemu::container::{Element, SectionKind};
use format_spec::qemu::dirty_bitmap::{bits_range, trim_buffer};
use format_spec::qemu::stream::{Decoder, Item};
use format_spec::qemu::{Step, block, dirty_bitmap, multifd, ram, reply};
use format_spec::{Malformed, Writer};

const STREAMS: &[&str] = &[
    "q72-block-full.bin.gz",
    "q72-block-zeroblocks.bin.gz",
    "q72-block-inc.bin.gz",
    "q100-dirty-bitmap-two.bin.gz",
    "q100-ram-precopy.bin.gz",
    "q100-xbzrle.bin.gz",
    "q100-mapped-ram.bin.gz",
    "q100-multifd-nocomp.main.bin",
    "q72-multifd-nocomp.main.bin.gz",
    "q100-postcopy-preempt.main.cut.bin.gz",
];
const CHANNELS: &[&str] = &[
    "q72-multifd-nocomp.ch0.bin.gz",
    "q72-multifd-nocomp.ch1.bin.gz",
    "q100-multifd-nocomp.ch1.bin.gz",
    "q100-multifd-zlib.ch0.bin.gz",
    "q100-multifd-zstd.ch0.bin.gz",
];
const PREEMPT: &str = "q100-postcopy-preempt.preempt.bin.gz";
const RETURN_PATH: &str = "q100-postcopy-preempt.returnpath.bin";

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn load(name: &str) -> Vec<u8> {
    let packed = std::fs::read(data(name)).unwrap();
    if !name.ends_with(".gz") {
        return packed;
    }
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut bytes).unwrap();
    bytes
}

/// Decodes a whole stream; `see` is handed each item and its offset.
fn decode(bytes: &[u8], mut see: impl FnMut(u64, &Item<'_>)) -> Result<(), Malformed> {
    let mut decoder = Decoder::new();
    let mut rest = bytes;
    while !(rest.is_empty() && decoder.may_end()) {
        let at = decoder.offset();
        match decoder.next(rest, true)? {
            Step::Item(item, len) => {
                see(at, &item);
                rest = &rest[len..];
            }
            Step::Need(needed) => {
                assert!(needed > rest.len());
                return Err(format_spec::qemu::cut_off(at, needed, rest.len()));
            }
        }
    }
    Ok(())
}

/// A listing in which runs of PART sections are counted: the empty ones, and of the others those
/// after the first twelve. So are pages after the first four of a section.
#[derive(Default)]
struct Listing {
    text: String,
    section: Vec<String>,
    empty: u32,
    parts: u32,
}

impl Listing {
    fn of(bytes: &[u8]) -> String {
        let mut listing = Self::default();
        decode(bytes, |at, item| {
            if matches!(item, Item::Element(_)) {
                listing.end_section();
            }
            listing.section.push(format!("@{at} {item}"));
        })
        .unwrap();
        listing.end_section();
        listing.text
    }

    fn end_section(&mut self) {
        let section = std::mem::take(&mut self.section);
        if section.first().is_some_and(|line| line.contains(" PART ")) {
            let counter = if section.len() == 3 { &mut self.empty } else { &mut self.parts };
            *counter += 1;
            if section.len() == 3 || *counter > 12 {
                return;
            }
        } else {
            let more = std::mem::take(&mut self.parts).saturating_sub(12);
            for (count, what) in [(more, "more"), (std::mem::take(&mut self.empty), "empty")] {
                if count > 0 {
                    writeln!(self.text, "[{count} {what} PART sections]").unwrap();
                }
            }
        }
        let mut pages = 0;
        for line in section {
            pages = if line.contains("  page ") { pages + 1 } else { 0 };
            match pages {
                0..=4 => writeln!(self.text, "{line}").unwrap(),
                5 => writeln!(self.text, "[more pages]").unwrap(),
                _ => {}
            }
        }
    }
}

fn check_listing(name: &str, found: &str) {
    let path = data(name.trim_end_matches(".gz")).with_extension("txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "{} differs; UPDATE_GOLDEN=1 rewrites it", path.display());
}

#[test]
fn streams_are_listed_and_written_again() {
    for name in STREAMS {
        let bytes = load(name);
        let mut again = Writer::new();
        let mut end = 0;
        decode(&bytes, |at, item| {
            assert_eq!(at, end, "{name}");
            item.encode(&mut again);
            end = again.len() as u64;
        })
        .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(again.into_bytes() == bytes, "{name} is not written as it was read");
        check_listing(name, &Listing::of(&bytes));
    }
}

#[test]
fn split_reads_give_the_same_items() {
    for name in STREAMS {
        let bytes = load(name);
        let mut whole = Vec::new();
        // Parts of what has no inner form depend on the reads; all else must not.
        let key = |item: &Item<'_>| match item {
            Item::Bytes(_) => None,
            item => Some(format!("{item}")),
        };
        decode(&bytes, |_, item| whole.extend(key(item))).unwrap();
        let mut decoder = Decoder::new();
        let (mut start, mut end) = (0, 0);
        let mut split = Vec::new();
        let mut again = Writer::new();
        while start < bytes.len() {
            // One more byte each time, or as many as are asked for where that is a chunk's content.
            match decoder.next(&bytes[start..end], false).unwrap() {
                Step::Item(item, len) => {
                    split.extend(key(&item));
                    item.encode(&mut again);
                    start += len;
                }
                Step::Need(needed) => {
                    assert!(needed > end - start, "{name} at {start}");
                    end += if needed > 8192 { needed - (end - start) } else { 1 };
                    assert!(end <= bytes.len(), "{name} asks for more than there is");
                }
            }
        }
        assert!(decoder.may_end(), "{name}");
        assert!(split == whole, "{name}");
        assert!(again.into_bytes() == bytes, "{name}");
    }
}

#[test]
fn a_stream_that_is_cut_never_ends_well() {
    let names = [
        "q100-dirty-bitmap-two.bin.gz",
        "q100-multifd-nocomp.main.bin",
        "q72-block-full.bin.gz",
        "q72-block-inc.bin.gz",
        "q72-block-zeroblocks.bin.gz",
    ];
    for name in names {
        let bytes = load(name);
        let mut eof = 0;
        let mut ends = vec![0];
        decode(&bytes, |at, item| {
            if matches!(item, Item::Element(Element::Eof)) {
                eof = usize::try_from(at).unwrap();
            }
            ends.push(usize::try_from(at).unwrap());
        })
        .unwrap();
        // Every cut of a short stream; of a long one some of those around each item.
        let is_short = bytes.len() < 16 << 10;
        let is_near = |at: usize| {
            let next = ends.partition_point(|end| *end < at);
            let around = [ends.get(next), ends.get(next.saturating_sub(1))];
            around.into_iter().flatten().any(|end| at.abs_diff(*end) < 24)
        };
        let cuts = (0..bytes.len()).filter(|at| is_short || is_near(*at));
        let cuts: Vec<_> = cuts.collect();
        let step = if is_short { 1 } else { cuts.len().div_ceil(300) };
        for cut in cuts.into_iter().step_by(step) {
            let result = decode(&bytes[..cut], |_, _| {});
            // A stream without VM description is whole.
            assert_eq!(result.is_ok(), cut == eof + 1, "{name} cut at {cut}");
        }
    }
}

#[test]
fn flipped_bytes_neither_panic_nor_hang() {
    for name in ["q100-dirty-bitmap-two.bin.gz", "q100-postcopy-preempt.main.cut.bin.gz"] {
        let bytes = load(name);
        for at in (0..bytes.len()).filter(|at| *at < 400 || at % 131 == 0) {
            for change in [0x01, 0x80, 0xff] {
                let mut flipped = bytes.clone();
                flipped[at] ^= change;
                let mut again = Writer::new();
                let mut end = 0;
                let _ = decode(&flipped, |at, item| {
                    item.encode(&mut again);
                    end = at;
                });
                // What was decoded is written as it was read, up to where it went wrong.
                let again = again.into_bytes();
                assert!(flipped.starts_with(&again), "{name} flipped at {at}, wrong before {end}");
            }
        }
    }
}

#[test]
fn the_return_path_is_listed_and_written_again() {
    let bytes = load(RETURN_PATH);
    for part in 1..=bytes.len() {
        let mut decoder = reply::Decoder::default();
        let mut again = Writer::new();
        let mut text = String::new();
        let (mut start, mut end) = (0, 0);
        while start < bytes.len() {
            match decoder.next(&bytes[start..end]).unwrap() {
                Step::Item(reply, len) => {
                    writeln!(text, "@{start} {reply}").unwrap();
                    reply.encode(&mut again);
                    start += len;
                }
                Step::Need(_) => end = (end + part).min(bytes.len()),
            }
        }
        assert_eq!(again.into_bytes(), bytes);
        check_listing(RETURN_PATH, &text);
    }
}

/// Items of a channel, and the bytes they are written to again; `step` bytes arrive at once.
fn channel(bytes: &[u8], step: usize) -> Result<(Vec<String>, Vec<u8>), Malformed> {
    let mut decoder = multifd::Decoder::default();
    let (mut start, mut end) = (0, 0);
    let (mut items, mut again) = (Vec::new(), Writer::new());
    while start < bytes.len() {
        assert_eq!(decoder.offset(), start as u64);
        match decoder.next(&bytes[start..end])? {
            Step::Item(item, len) => {
                if !matches!(item, multifd::Item::Payload(_)) {
                    items.push(item.to_string());
                }
                item.encode(&mut again);
                start += len;
            }
            Step::Need(needed) if end == bytes.len() => {
                return Err(format_spec::qemu::cut_off(start as u64, needed, end - start));
            }
            Step::Need(_) => end = (end + step).min(bytes.len()),
        }
    }
    assert!(decoder.may_end());
    Ok((items, again.into_bytes()))
}

#[test]
fn channels_are_written_again_with_what_is_stale() {
    for name in CHANNELS {
        let bytes = load(name);
        let (items, again) = channel(&bytes, bytes.len()).unwrap();
        assert!(again == bytes, "{name} is not written as it was read");
        assert_eq!(channel(&bytes, 1).unwrap(), (items.clone(), again), "{name}");
        assert!(items[0].starts_with("hello of channel"), "{name}");
        assert!(items[1..].iter().all(|item| item.starts_with("packet")), "{name}");
    }
}

#[test]
fn the_preempt_channel_is_written_again() {
    let bytes = load(PREEMPT);
    let mut decoder = ram::Decoder::default();
    let mut again = Writer::new();
    while again.len() < bytes.len() {
        let at = again.len();
        match decoder.next(&bytes[at..], at as u64).unwrap() {
            Step::Item(record, len) => {
                assert!(matches!(record, ram::Record::Page { .. }));
                record.encode(&mut again);
                assert_eq!(again.len(), at + len);
            }
            Step::Need(_) => panic!("cut off at {at}"),
        }
    }
    assert_eq!(again.into_bytes(), bytes);
}

#[test]
fn packets_that_do_not_add_up_are_refused() {
    let bytes = load("q100-multifd-nocomp.ch1.bin.gz");
    let at = multifd::HELLO_BYTES;
    for (field, offset, value) in [
        ("multifd magic", 0, 0x1122_3345_u32),
        ("multifd version", 4, 2),
        ("multifd pages_alloc", 12, 129),
        ("multifd normal_pages", 16, 0x8000_0000),
        ("multifd zero_pages", 32, 129),
    ] {
        let mut wrong = bytes.clone();
        wrong[at + offset..at + offset + 4].copy_from_slice(&value.to_be_bytes());
        let error = channel(&wrong, wrong.len()).unwrap_err();
        assert_eq!((error.field, error.offset), (field, (at + offset) as u64));
    }
    // A compressed packet of more than 1 MiB: QEMU would write past its buffer.
    let mut wrong = load("q100-multifd-zlib.ch0.bin.gz");
    let data = (at..wrong.len()).step_by(multifd::HEADER_BYTES);
    let data = data.into_iter().find(|at| wrong[at + 19] > 0).unwrap();
    wrong[data + 20..data + 24].copy_from_slice(&0x0010_0001_u32.to_be_bytes());
    let error = channel(&wrong, wrong.len()).unwrap_err();
    assert_eq!(error.field, "multifd next_packet_size");
}

#[test]
fn the_disks_come_out_as_they_were() {
    let mut full = vec![0; 3 << 20];
    full[..65536].fill(0x11);
    full[2 << 20..(2 << 20) + 512].fill(0x33);
    let mut inc = vec![0x55; 3 << 20];
    inc[1 << 20..(1 << 20) + 65536].fill(0x77);
    for (name, before, expected) in [
        ("q72-block-full.bin.gz", 0xaa, &full),
        ("q72-block-zeroblocks.bin.gz", 0xaa, &full),
        ("q72-block-inc.bin.gz", 0x55, &inc),
    ] {
        let mut disk = vec![before; 3 << 20];
        decode(&load(name), |_, item| {
            let Item::Block(record) = item else { return };
            let at = usize::try_from(record.offset()).unwrap();
            let chunk = at..at + block::CHUNK_BYTES;
            match record.body {
                block::Body::Data { device, content } => {
                    assert_eq!(device, "disk0");
                    disk[chunk].copy_from_slice(content);
                }
                block::Body::Zeroes { .. } => disk[chunk].fill(0),
                block::Body::Progress | block::Body::None => {}
            }
        })
        .unwrap();
        assert!(disk == *expected, "{name}");
    }
}

#[test]
fn the_bitmaps_come_out_as_they_were() {
    const SIZE: u64 = 4 << 20;
    let bytes = load("q100-dirty-bitmap-two.bin.gz");
    let mut decoder = Decoder::new();
    let mut rest = &bytes[..];
    let mut seen = Vec::new();
    let mut granularities = std::collections::BTreeMap::new();
    while !rest.is_empty() {
        let Step::Item(item, len) = decoder.next(rest, true).unwrap() else { panic!("cut off") };
        rest = &rest[len..];
        let Item::DirtyBitmap(record) = item else { continue };
        let names = decoder.dirty_bitmap();
        match record.body {
            dirty_bitmap::Body::Start { granularity, flags } => {
                granularities.insert(names.bitmap().to_owned(), (granularity, flags));
            }
            dirty_bitmap::Body::Bits { first_sector, sectors, buffer } => {
                let (granularity, _) = granularities[names.bitmap()];
                let range = bits_range(first_sector, sectors, granularity, SIZE).unwrap();
                let bits = buffer.map(|buffer| trim_buffer(buffer, &range).unwrap().to_vec());
                seen.push((names.device().to_owned(), names.bitmap().to_owned(), range, bits));
            }
            dirty_bitmap::Body::Complete | dirty_bitmap::Body::None => {}
        }
    }
    assert_eq!(granularities["bm-set"], (65536, dirty_bitmap::ENABLED));
    assert_eq!(granularities["bm-empty"], (512, dirty_bitmap::PERSISTENT));
    let disk = || "disk0".to_owned();
    let set = vec![4, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(seen[0], (disk(), "bm-empty".to_owned(), 0..1024, None));
    assert_eq!(seen[1], (disk(), "bm-set".to_owned(), 0..8, Some(set)));
    assert_eq!(seen.len(), 2);
}

#[test]
fn device_states_are_cut_where_their_footers_are() {
    let mut sections = Vec::new();
    decode(&load("q100-xbzrle.bin.gz"), |_, item| match item {
        Item::Element(Element::Section(section)) if section.kind == SectionKind::Full => {
            sections.push((section.name.unwrap().name.to_owned(), 0));
        }
        Item::Bytes(bytes) => {
            if let Some((_, len)) = sections.last_mut() {
                *len += bytes.len();
            }
        }
        _ => {}
    })
    .unwrap();
    let description = 99184;
    assert_eq!(sections.len(), 31);
    assert_eq!(sections[27], ("vmmouse".to_owned(), 4105));
    assert_eq!(sections[30], ("globalstate".to_owned(), 104 + description));
}

#[test]
fn memory_comes_out_as_it_was() {
    let mut memory = vec![0xaa; 1 << 20];
    let mut at = 0;
    decode(&load("q100-ram-precopy.bin.gz"), |_, item| {
        let Item::Ram(ram::Record::Page { offset, content, .. }) = item else { return };
        at = usize::try_from(*offset).unwrap();
        match content {
            ram::Content::Fill(byte) => memory[at..at + ram::PAGE_BYTES].fill(*byte),
            ram::Content::Plain(page) => memory[at..at + ram::PAGE_BYTES].copy_from_slice(*page),
            other => panic!("{other:?}"),
        }
    })
    .unwrap();
    for page in (3..12).chain([255]) {
        let text = format!("page {page:06} ").into_bytes();
        let expected: Vec<u8> = text.into_iter().cycle().take(4096).collect();
        assert!(memory[page * 4096..][..4096] == expected[..], "page {page}");
    }
    assert!(memory[..3 * 4096].iter().all(|byte| *byte == 0));
}

#[test]
fn every_data_file_is_used_and_has_its_origin() {
    let origins = std::fs::read_to_string(data("README.md")).unwrap();
    for entry in std::fs::read_dir(data("")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let known = [STREAMS, CHANNELS, &[PREEMPT, RETURN_PATH]].concat();
        let is_stream = known.contains(&name.as_str());
        assert!(is_stream || name.ends_with(".txt") || name == "README.md", "{name} is not used");
        assert!(!is_stream || origins.contains(&format!("| `{name}` |")), "{name} has no origin");
    }
}
