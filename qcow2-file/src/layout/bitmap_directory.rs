//! The bitmap directory and bitmap tables. qcow2 spec, "Bitmaps extension".
//!
//! Decoding is in two steps, so that a checker can go on after the first broken rule:
//! [`decode_directory`] cuts the bytes into entries, [`DirectoryEntry::broken_rules`] and
//! [`broken_set_rules`] judge them. What is well formed but not known here (another type, unknown
//! flags, extra data) is no broken rule: see [`DirectoryEntry::unknown_to_us`].

use std::collections::HashMap;

use format_spec::{Malformed, Problem, Reader, Writer};

use super::entry::OFFSET_MASK;
use super::extension::BitmapsExtension;
use super::geometry::Geometry;
use super::units::HostOffset;
use crate::limits;

/// Flag bits of a directory entry.
pub mod flags {
    /// The bitmap was not saved: its content is not to be trusted.
    pub const IN_USE: u32 = 1;
    /// The bitmap must reflect every write to the disk ("enabled").
    pub const AUTO: u32 = 1 << 1;
    /// Whoever does not know the extra data may use the bitmap, leaving that data as it is.
    pub const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
    /// All bits that have a meaning.
    pub const KNOWN: u32 = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE;
}

/// The only type the spec gives a meaning: each bit says whether its granule was written.
pub const DIRTY_TRACKING: u8 = 1;
/// Bytes of an entry before its extra data and name.
pub const ENTRY_HEAD_BYTES: u64 = 24;
/// Largest granularity exponent that the spec allows.
const MAX_GRANULARITY_BITS: u8 = 63;
const ALL_ONES: u64 = 1;
const FLAGS_AT: u64 = 12;

/// One bitmap as the directory describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Where the bitmap table is.
    pub table: HostOffset,
    /// Entries of the table: one per cluster of bitmap data.
    pub table_entries: u32,
    /// See [`flags`].
    pub flags: u32,
    /// See [`DIRTY_TRACKING`].
    pub kind: u8,
    /// log2 of the guest bytes per bit.
    pub granularity_bits: u8,
    /// Extra data, kept as it came.
    pub extra: Vec<u8>,
    /// The name, unique in its directory.
    pub name: String,
}

/// A directory entry and where it stands in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocatedEntry {
    /// File offset of the entry.
    pub at: u64,
    /// The entry.
    pub entry: DirectoryEntry,
    /// Whether the padding behind the name holds anything but zeroes. Harmless; checkers report it.
    pub has_stray_padding: bool,
}

impl LocatedEntry {
    /// File offset of the flags field, which never crosses a sector.
    pub fn flags_at(&self) -> u64 {
        self.at.saturating_add(FLAGS_AT)
    }
}

/// What a bitmap needs on disk: 64-bit words for all bits, cut into clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapShape {
    /// Granules of the disk, that is, bits.
    pub bits: u64,
    /// Bytes of bitmap data, a multiple of 8.
    pub bytes: u64,
    /// Table entries.
    pub table_entries: u64,
}

impl BitmapShape {
    /// The shape of a bitmap over a disk of `size` bytes.
    pub fn new(size: u64, granularity_bits: u8, geometry: Geometry) -> Self {
        let granule = 1u64.checked_shl(u32::from(granularity_bits)).unwrap_or(u64::MAX);
        let bits = size.div_ceil(granule.max(1));
        let bytes = bits.div_ceil(64).saturating_mul(8);
        Self { bits, bytes, table_entries: geometry.clusters_for(bytes) }
    }
}

impl DirectoryEntry {
    /// Whether the content is marked as not to be trusted.
    pub fn is_in_use(&self) -> bool {
        self.flags & flags::IN_USE != 0
    }

    /// Whether the bitmap records writes.
    pub fn is_auto(&self) -> bool {
        self.flags & flags::AUTO != 0
    }

    /// Why this bitmap must be left as it is, if it must: it is well formed, but uses something
    /// that is not known here. The spec forbids using it; QEMU 10.0 does not open such an image at
    /// all.
    pub fn unknown_to_us(&self) -> Option<&'static str> {
        if self.kind != DIRTY_TRACKING {
            Some("has a type that is not known")
        } else if self.flags & !flags::KNOWN != 0 {
            Some("has flags that are not known")
        } else if !self.extra.is_empty() && self.flags & flags::EXTRA_DATA_COMPATIBLE == 0 {
            Some("has extra data that is not known and does not allow ignoring it")
        } else if !limits::BITMAP_GRANULARITY_BITS.contains(&self.granularity_bits) {
            Some("has a granularity outside 512 bytes to 2 GiB")
        } else {
            None
        }
    }

    /// Bytes of the encoded entry, padding included.
    pub fn encoded_len(&self) -> u64 {
        let len = (self.extra.len() as u64).saturating_add(self.name.len() as u64);
        ENTRY_HEAD_BYTES.saturating_add(len).next_multiple_of(8)
    }

    /// Appends the entry.
    pub fn encode(&self, out: &mut Writer) {
        out.be64(self.table.0).be32(self.table_entries).be32(self.flags);
        out.u8(self.kind).u8(self.granularity_bits);
        out.be16(u16::try_from(self.name.len()).unwrap_or(u16::MAX));
        out.be32(u32::try_from(self.extra.len()).unwrap_or(u32::MAX));
        out.bytes(&self.extra).bytes(self.name.as_bytes()).pad_to(8);
    }

    /// The rules this entry breaks, standing at `at` in an image with this geometry and a virtual
    /// size of `size` bytes, whose file has `file_len` bytes.
    pub fn broken_rules(&self, at: u64, image: ImageFacts) -> Vec<Malformed> {
        let g = image.geometry;
        let mut broken = Vec::new();
        let mut rule = |holds: bool, field_at: u64, field, problem: Problem| {
            if !holds {
                broken.push(Malformed::new(at.saturating_add(field_at), field, problem));
            }
        };
        let (table, entries) = (self.table.0, u64::from(self.table_entries));
        let aligned = Problem::Misaligned { value: table, align: g.cluster_size() };
        rule(g.is_cluster_aligned(self.table), 0, "bitmap_table_offset", aligned);
        let end = table.saturating_add(entries.saturating_mul(8));
        let (min, max) = (g.cluster_size(), image.file_len.min(OFFSET_MASK));
        let range = Problem::OutOfRange { value: table, min, max };
        rule(table >= min && end <= max, 0, "bitmap_table_offset", range);
        let max = limits::MAX_BITMAP_BYTES >> g.cluster_bits();
        let range = Problem::OutOfRange { value: entries, min: 1, max };
        rule((1..=max).contains(&entries), 8, "bitmap_table_size", range);
        let value = u64::from(self.granularity_bits);
        let range = Problem::OutOfRange { value, min: 0, max: u64::from(MAX_GRANULARITY_BITS) };
        rule(self.granularity_bits <= MAX_GRANULARITY_BITS, 17, "granularity_bits", range);
        // A bitmap in use may date from before a resize, and one not understood may be counted
        // differently.
        if !self.is_in_use() && self.unknown_to_us().is_none() {
            let expected = BitmapShape::new(image.size, self.granularity_bits, g).table_entries;
            let mismatch = Problem::Mismatch { value: entries, expected };
            rule(entries == expected, 8, "bitmap_table_size", mismatch);
        }
        let no_nul = !self.name.contains('\0');
        rule(no_nul, ENTRY_HEAD_BYTES, "bitmap name", Problem::BadName);
        broken
    }
}

/// What of an image the rules for bitmaps depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageFacts {
    /// Cluster arithmetic.
    pub geometry: Geometry,
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// Length of the file in bytes.
    pub file_len: u64,
}

/// Cuts a directory of `count` entries that stands at file offset `base` into its entries.
pub fn decode_directory(
    bytes: &[u8],
    base: u64,
    count: u32,
) -> Result<Vec<LocatedEntry>, Malformed> {
    let mut reader = Reader::new(bytes, base);
    let mut entries = Vec::new();
    for _ in 0..count {
        entries.push(decode_entry(&mut reader)?);
    }
    reader.finish("bitmap directory")?;
    Ok(entries)
}

fn decode_entry(r: &mut Reader<'_>) -> Result<LocatedEntry, Malformed> {
    let at = r.offset();
    let table = HostOffset(r.be64("bitmap_table_offset")?);
    let table_entries = r.be32("bitmap_table_size")?;
    let entry_flags = r.be32("bitmap flags")?;
    let kind = r.u8("bitmap type")?;
    let granularity_bits = r.u8("granularity_bits")?;
    let name_len = r.be16("bitmap name_size")?;
    let extra_len = r.be32("extra_data_size")?;
    if name_len == 0 || name_len > limits::MAX_BITMAP_NAME_BYTES {
        let (value, max) = (u64::from(name_len), u64::from(limits::MAX_BITMAP_NAME_BYTES));
        let problem = Problem::OutOfRange { value, min: 1, max };
        return Err(Malformed::new(at.saturating_add(18), "bitmap name_size", problem));
    }
    let extra = r.take(extra_len as usize, "bitmap extra data")?.to_vec();
    let name_at = r.offset();
    let name = std::str::from_utf8(r.take(usize::from(name_len), "bitmap name")?)
        .map_err(|_| Malformed::new(name_at, "bitmap name", Problem::BadName))?
        .to_owned();
    let used = r.offset().saturating_sub(at);
    let padding = used.next_multiple_of(8).saturating_sub(used);
    let padding = r.take(usize::try_from(padding).unwrap_or(0), "bitmap entry padding")?;
    let has_stray_padding = padding.iter().any(|b| *b != 0);
    let entry = DirectoryEntry {
        table,
        table_entries,
        flags: entry_flags,
        kind,
        granularity_bits,
        extra,
        name,
    };
    Ok(LocatedEntry { at, entry, has_stray_padding })
}

/// The rules that concern the directory as a whole: its place, unique names, and tables that share
/// no cluster with each other or with the directory.
pub fn broken_set_rules(
    extension: BitmapsExtension,
    entries: &[LocatedEntry],
    geometry: Geometry,
) -> Vec<Malformed> {
    let mut broken = Vec::new();
    let mut names = HashMap::new();
    for e in entries {
        if names.insert(e.entry.name.as_str(), e.at).is_some() {
            let at = e.at.saturating_add(ENTRY_HEAD_BYTES);
            broken.push(Malformed::new(at, "bitmap name", Problem::Duplicate));
        }
    }
    let mut areas: Vec<(u64, u64, u64)> = entries
        .iter()
        .map(|e| (e.entry.table.0, u64::from(e.entry.table_entries).saturating_mul(8), e.at))
        .chain([(extension.directory_offset, extension.directory_size, 0)])
        .map(|(start, len, at)| (start, clusters_end(start, len, geometry), at))
        .collect();
    areas.sort_unstable();
    let mut end_so_far = 0;
    let mut last_at = 0;
    for (start, end, at) in areas {
        if start < end_so_far {
            let problem = Problem::Other("overlaps another table or the directory");
            broken.push(Malformed::new(at.max(last_at), "bitmap_table_offset", problem));
        }
        end_so_far = end_so_far.max(end);
        last_at = at;
    }
    broken
}

fn clusters_end(start: u64, len: u64, geometry: Geometry) -> u64 {
    start.saturating_add(geometry.clusters_for(len).saturating_mul(geometry.cluster_size()))
}

/// Whether the extension, whose body stands at file offset `at`, names a place where a directory
/// can be.
pub fn check_place(e: BitmapsExtension, at: u64, image: ImageFacts) -> Result<(), Malformed> {
    let g = image.geometry;
    let start = e.directory_offset;
    let place =
        |problem| Err(Malformed::new(at.saturating_add(16), "bitmap_directory_offset", problem));
    if !g.is_cluster_aligned(HostOffset(start)) {
        return place(Problem::Misaligned { value: start, align: g.cluster_size() });
    }
    let (min, max) = (g.cluster_size(), image.file_len.min(OFFSET_MASK));
    if start < min || start.saturating_add(e.directory_size) > max {
        return place(Problem::OutOfRange { value: start, min, max });
    }
    let least = u64::from(e.count).saturating_mul(ENTRY_HEAD_BYTES);
    if e.directory_size < least {
        let (value, max) = (e.directory_size, limits::MAX_BITMAP_DIRECTORY_BYTES);
        let problem = Problem::OutOfRange { value, min: least, max };
        return Err(Malformed::new(at.saturating_add(8), "bitmap_directory_size", problem));
    }
    Ok(())
}

/// Encodes a directory.
pub fn encode_directory<'a>(entries: impl IntoIterator<Item = &'a DirectoryEntry>) -> Vec<u8> {
    let mut out = Writer::new();
    entries.into_iter().for_each(|e| e.encode(&mut out));
    out.into_bytes()
}

/// What a bitmap table says about one cluster of bitmap data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableEntry {
    /// No cluster: all bits are clear.
    Zeroes,
    /// No cluster: all bits are set.
    Ones,
    /// The bits are in this cluster.
    Data(HostOffset),
}

impl TableEntry {
    /// Decodes an entry that stands at file offset `at`.
    pub fn decode(raw: u64, geometry: Geometry, at: u64) -> Result<Self, Malformed> {
        let field = "bitmap table entry";
        let reserved = raw & !(OFFSET_MASK | ALL_ONES);
        if reserved != 0 {
            return Err(Malformed::new(at, field, Problem::Reserved { value: reserved }));
        }
        let offset = HostOffset(raw & OFFSET_MASK);
        match (offset.0, raw & ALL_ONES) {
            (0, 0) => Ok(Self::Zeroes),
            (0, _) => Ok(Self::Ones),
            (_, 0) if geometry.is_cluster_aligned(offset) => Ok(Self::Data(offset)),
            (value, 0) => {
                let problem = Problem::Misaligned { value, align: geometry.cluster_size() };
                Err(Malformed::new(at, field, problem))
            }
            _ => {
                let problem = Problem::Other("says all ones and names a cluster");
                Err(Malformed::new(at, field, problem))
            }
        }
    }

    /// The entry as it stands in the table.
    pub fn encode(self) -> u64 {
        match self {
            Self::Zeroes => 0,
            Self::Ones => ALL_ONES,
            Self::Data(at) => at.0,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::cast_possible_truncation)]

    use proptest::prelude::*;

    use super::*;

    fn facts() -> ImageFacts {
        ImageFacts { geometry: Geometry::new(16, 4, false), size: 1 << 30, file_len: 1 << 32 }
    }

    fn sample(name: &str, table: u64) -> DirectoryEntry {
        DirectoryEntry {
            table: HostOffset(table),
            table_entries: 1,
            flags: flags::AUTO,
            kind: DIRTY_TRACKING,
            granularity_bits: 16,
            extra: Vec::new(),
            name: name.into(),
        }
    }

    fn fields(broken: &[Malformed]) -> Vec<(u64, &'static str)> {
        broken.iter().map(|m| (m.offset, m.field)).collect()
    }

    #[test]
    fn a_directory_round_trips_and_fails_at_every_cut() {
        let mut with_extra = sample("second name", 0x70000);
        with_extra.extra = vec![1, 2, 3];
        with_extra.flags |= flags::EXTRA_DATA_COMPATIBLE;
        let entries = [sample("b0", 0x60000), with_extra];
        let bytes = encode_directory(&entries);
        let decoded = decode_directory(&bytes, 0x1000, 2).unwrap();
        assert_eq!(decoded.iter().map(|l| l.entry.clone()).collect::<Vec<_>>(), entries);
        assert_eq!(decoded[1].at, 0x1000 + 32);
        for cut in 0..bytes.len() {
            assert!(decode_directory(&bytes[..cut], 0, 2).is_err(), "cut at {cut}");
        }
        assert!(decode_directory(&bytes, 0, 1).is_err());
        assert!(decode_directory(&bytes, 0, 3).is_err());
    }

    #[test]
    fn every_broken_rule_names_its_field() {
        let bad = |change: fn(&mut DirectoryEntry)| {
            let mut e = sample("b", 0x60000);
            change(&mut e);
            fields(&e.broken_rules(100, facts()))
        };
        assert_eq!(bad(|_| ()), []);
        assert_eq!(bad(|e| e.table.0 = 0x60200), [(100, "bitmap_table_offset")]);
        assert_eq!(bad(|e| e.table.0 = 0), [(100, "bitmap_table_offset")]);
        assert_eq!(bad(|e| e.table.0 = 1 << 32), [(100, "bitmap_table_offset")]);
        assert_eq!(bad(|e| e.table_entries = 2), [(108, "bitmap_table_size")]);
        assert_eq!(bad(|e| e.table_entries = 0).len(), 2);
        assert_eq!(bad(|e| e.granularity_bits = 64), [(117, "granularity_bits")]);
        assert_eq!(bad(|e| e.name = "a\0b".into()), [(124, "bitmap name")]);
        let in_use = |e: &mut DirectoryEntry| {
            e.flags |= flags::IN_USE;
            e.table_entries = 2;
        };
        assert_eq!(bad(in_use), []);
    }

    #[test]
    fn names_and_tables_are_unique() {
        let g = facts().geometry;
        let e = BitmapsExtension { count: 2, directory_size: 64, directory_offset: 0x50000 };
        let judge = |entries: &[DirectoryEntry]| {
            let bytes = encode_directory(entries);
            let located = decode_directory(&bytes, 0x50000, entries.len() as u32).unwrap();
            broken_set_rules(e, &located, g).len()
        };
        assert_eq!(judge(&[sample("a", 0x60000), sample("b", 0x70000)]), 0);
        assert_eq!(judge(&[sample("a", 0x60000), sample("a", 0x70000)]), 1);
        assert_eq!(judge(&[sample("a", 0x60000), sample("b", 0x60000)]), 1);
        assert_eq!(judge(&[sample("a", 0x50000), sample("b", 0x70000)]), 1);
    }

    #[test]
    fn what_is_not_known_is_not_malformed() {
        let unknown = |change: fn(&mut DirectoryEntry)| {
            let mut e = sample("b", 0x60000);
            change(&mut e);
            assert_eq!(fields(&e.broken_rules(0, facts())), []);
            e.unknown_to_us().is_some()
        };
        assert!(!unknown(|_| ()));
        assert!(unknown(|e| e.kind = 2));
        assert!(unknown(|e| e.flags |= 8));
        assert!(unknown(|e| e.extra = vec![0; 8]));
        assert!(unknown(|e| e.granularity_bits = 8));
        assert!(!unknown(|e| {
            e.extra = vec![0; 8];
            e.flags |= flags::EXTRA_DATA_COMPATIBLE;
        }));
    }

    #[test]
    fn table_entries_round_trip() {
        let g = facts().geometry;
        for raw in [0, 1, 0x50000] {
            assert_eq!(TableEntry::decode(raw, g, 8).unwrap().encode(), raw);
        }
        for raw in [0x50001, 0x50200, 2, 1 << 56, 1 << 63] {
            assert_eq!(TableEntry::decode(raw, g, 8).unwrap_err().offset, 8);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_name_a_field(
            bytes in proptest::collection::vec(any::<u8>(), 0..256), count in 0u32..5,
        ) {
            if let Ok(entries) = decode_directory(&bytes, 0, count) {
                let again = encode_directory(entries.iter().map(|l| &l.entry));
                prop_assert_eq!(again.len(), bytes.len());
                let twice = decode_directory(&again, 0, count).unwrap();
                prop_assert!(entries.iter().zip(&twice).all(|(a, b)| a.entry == b.entry));
                for e in &entries {
                    e.entry.broken_rules(e.at, facts());
                }
            }
        }

        #[test]
        fn any_entry_round_trips(
            table: u64, table_entries: u32, entry_flags: u32, kind: u8, granularity_bits: u8,
            extra in proptest::collection::vec(any::<u8>(), 0..40), name in "[a-zé]{1,60}",
        ) {
            let e = DirectoryEntry {
                table: HostOffset(table), table_entries, flags: entry_flags, kind,
                granularity_bits, extra, name,
            };
            let bytes = encode_directory([&e]);
            prop_assert_eq!(bytes.len() as u64, e.encoded_len());
            prop_assert_eq!(&decode_directory(&bytes, 0, 1).unwrap()[0].entry, &e);
            e.broken_rules(0, facts());
        }
    }
}
