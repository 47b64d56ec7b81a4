//! Tables of SPEC.md that say how records of `block` 2 look are read from it, and held against the
//! codec.
#![allow(clippy::unwrap_used, clippy::as_conversions, clippy::indexing_slicing)]

use format_spec::content_hash::{BitmapDigest, ContentHash};
use format_spec::native::block::{
    BITMAP_CREATE, BITMAP_REMOVE, BITMAP_SEAL, BITMAP_UPDATE, BitmapCreate, BitmapSeal,
    BitmapShape, BitmapUpdate, BitmapVersion, BlockRecord, DISK, DISK_CONTENT, DISK_SEAL, Disk,
    DiskContent, DiskId, DiskSeal, ENABLED, HAS_BITMAPS, HAS_BLOCK, HAS_HASH, KEEPS_REST,
    PERSISTENT, Piece, RUN, ZERO_BLOCK,
};
use format_spec::native::frame::{self, Record};
use format_spec::{Malformed, Reader};

const SPEC: &str = include_str!("../SPEC.md");
const DISK_NUMBER: u32 = 3;
const VERSION: BitmapVersion = BitmapVersion { bitmap: 5, generation: 7 };
const NAME: &str = "name";

/// Rows of the tables with these headings, cell by cell.
fn rows(headings: &[&str]) -> Vec<Vec<&'static str>> {
    let mut found = Vec::new();
    let mut is_in = false;
    for line in SPEC.lines() {
        let Some(row) = line.strip_prefix('|').and_then(|row| row.strip_suffix('|')) else {
            is_in = false;
            continue;
        };
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        if cells == headings {
            is_in = true;
        } else if is_in && !cells[0].starts_with("---") {
            found.push(cells);
        }
    }
    found
}

fn decode(bytes: &[u8]) -> Result<Option<BlockRecord<'_>>, Malformed> {
    let mut reader = Reader::new(bytes, 0);
    let record = Record::decode(&mut reader)?;
    reader.finish("record")?;
    BlockRecord::decode(&record)
}

/// A record's type, its flags, and one that has all optional fields.
fn records() -> Vec<(u16, u32, BlockRecord<'static>)> {
    let disk = DiskId(DISK_NUMBER);
    let root = Some(ContentHash([9; 32]));
    let digest = Some(BitmapDigest([9; 32]));
    let shape = BitmapShape { granularity: 65536, bits: 640 };
    let (version, is_enabled, is_persistent) = (VERSION, true, true);
    let both = ENABLED | PERSISTENT;
    let create = BitmapCreate { version, disk, shape, is_enabled, is_persistent, name: NAME };
    let update = BitmapUpdate { version, is_enabled, is_persistent };
    let size = 1 << 20;
    let named = BlockRecord::Disk(Disk { disk, keeps_rest: true, size, name: NAME });
    let content = DiskContent { disk, bytes: 1 << 40 };
    vec![
        (DISK, KEEPS_REST, named),
        (DISK_SEAL, HAS_HASH, BlockRecord::DiskSeal(DiskSeal { disk, hash: root })),
        (BITMAP_CREATE, both, BlockRecord::BitmapCreate(create)),
        (BITMAP_UPDATE, both, BlockRecord::BitmapUpdate(update)),
        (BITMAP_REMOVE, 0, BlockRecord::BitmapRemove(version)),
        (BITMAP_SEAL, HAS_HASH, BlockRecord::BitmapSeal(BitmapSeal { version, digest })),
        (DISK_CONTENT, 0, BlockRecord::DiskContent(content)),
    ]
}

fn name_of(kind: u16) -> &'static str {
    match kind {
        DISK => "DISK",
        DISK_SEAL => "DISK_SEAL",
        BITMAP_CREATE => "BITMAP_CREATE",
        BITMAP_UPDATE => "BITMAP_UPDATE",
        BITMAP_REMOVE => "BITMAP_REMOVE",
        BITMAP_SEAL => "BITMAP_SEAL",
        _ => "DISK_CONTENT",
    }
}

/// The body that a layout of the spec describes.
fn body(layout: &str, flags: u32) -> Vec<u8> {
    let mut depth = 0;
    let fields = layout.split(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        c == ',' && depth == 0
    });
    let mut body = Vec::new();
    for field in fields.map(str::trim) {
        let words: Vec<_> = field.split(' ').collect();
        match words.as_slice() {
            ["be32", "disk", ..] => body.extend(DISK_NUMBER.to_be_bytes()),
            ["be32", "flags", ..] => body.extend(flags.to_be_bytes()),
            ["be32", "bitmap", ..] => body.extend(VERSION.bitmap.to_be_bytes()),
            ["be32", "generation", ..] => body.extend(VERSION.generation.to_be_bytes()),
            ["be32", "granularity", ..] => body.extend(65536u32.to_be_bytes()),
            ["be64", "bits", ..] => body.extend(640u64.to_be_bytes()),
            ["be64", "size", ..] => body.extend((1u64 << 20).to_be_bytes()),
            ["be64", "bytes", ..] => body.extend((1u64 << 40).to_be_bytes()),
            ["32", "bytes", ..] => body.extend([9; 32]),
            ["name"] => {
                body.extend(u16::try_from(NAME.len()).unwrap().to_be_bytes());
                body.extend(NAME.as_bytes());
            }
            _ => panic!("what is {field:?}?"),
        }
    }
    body
}

#[test]
fn records_are_laid_out_as_the_spec_says() {
    let rows = rows(&["record", "body"]);
    for (kind, flags, record) in records() {
        let name = name_of(kind);
        let row = rows.iter().find(|row| row[0] == name);
        let expected = body(row.unwrap_or_else(|| panic!("{name} is not in SPEC.md"))[1], flags);
        let mut encoded = Vec::new();
        record.encode(&mut encoded);
        let mut framed = Vec::new();
        frame::encode(kind, &[&expected], &mut framed);
        assert_eq!(encoded, framed, "{name}");
        assert_eq!(decode(&framed).unwrap(), Some(record), "{name}");
    }
}

#[test]
fn the_truth_table_of_runs_is_that_of_the_spec() {
    let rows = rows(&["HAS_BLOCK", "ZERO_BLOCK", "HAS_BITMAPS", "meaning"]);
    let mut pieces = Vec::new();
    Piece { version: VERSION, index: 0, bits: &[0; 8] }.encode(&mut pieces);
    let mut seen = [false; 8];
    for flags in 0..8u32 {
        let has = |flag: u32| flags & flag != 0;
        let fits = |cell: &str, flag: u32| cell == "any" || (cell == "1") == has(flag);
        let columns = [HAS_BLOCK, ZERO_BLOCK, HAS_BITMAPS];
        let mut found = rows.iter().filter(|r| (0..3).all(|n| fits(r[n], columns[n])));
        let meaning = found.next().unwrap_or_else(|| panic!("no row for {flags}"))[3];
        assert!(found.next().is_none(), "two rows for {flags}");
        let pieces: &[u8] = if has(HAS_BITMAPS) { &pieces } else { &[] };
        let content: &[u8] = if has(HAS_BLOCK) { &[1; 512] } else { &[] };
        let len: u64 = if has(HAS_BLOCK | ZERO_BLOCK) { 512 } else { 0 };
        // As the table of its head says: field after field.
        let mut body = Vec::new();
        body.extend(DISK_NUMBER.to_be_bytes());
        body.extend(flags.to_be_bytes());
        body.extend(0u64.to_be_bytes());
        body.extend(len.to_be_bytes());
        body.extend(u32::try_from(pieces.len()).unwrap().to_be_bytes());
        body.extend([0; 4]);
        let mut framed = Vec::new();
        frame::encode(RUN, &[&body, pieces, content], &mut framed);
        assert_eq!(decode(&framed).is_ok(), meaning != "invalid", "{flags}: {meaning}");
        seen[flags as usize] = true;
    }
    assert_eq!(seen, [true; 8]);
}
