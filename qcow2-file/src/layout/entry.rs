//! L1 and L2 table entries. qcow2 spec, "Cluster mapping".

use format_spec::{Malformed, Problem};

use super::geometry::Geometry;
use super::units::HostOffset;

/// Bits 9 to 55 of an entry: the host offset.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: refcount is exactly one, so the cluster may be written in place.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry (version 3): reads as zero.
pub const READS_ZERO: u64 = 1;

/// An L1 entry: where an L2 table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L1Entry {
    /// Host offset of the L2 table; `None` when the whole span is unallocated.
    pub table: Option<HostOffset>,
    /// Whether the table's refcount is exactly one.
    pub is_copied: bool,
}

impl L1Entry {
    /// Decodes an entry that stands at file offset `at`.
    pub fn decode(raw: u64, geometry: Geometry, at: u64) -> Result<Self, Malformed> {
        let reserved = raw & !(OFFSET_MASK | COPIED);
        if reserved != 0 {
            return Err(Malformed::new(at, "l1_entry", Problem::Reserved { value: reserved }));
        }
        let table = offset_field(raw, geometry, at, "l1_entry")?;
        Ok(Self { table, is_copied: raw & COPIED != 0 })
    }

    /// The entry as it stands in the table.
    pub fn encode(self) -> u64 {
        self.table.map_or(0, |t| t.0) | if self.is_copied { COPIED } else { 0 }
    }
}

/// An L2 entry: where a cluster is and how it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L2Entry {
    /// A cluster that is not compressed, or none.
    Standard(StandardEntry),
    /// A compressed cluster.
    Compressed(CompressedEntry),
}

/// A cluster that is not compressed, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StandardEntry {
    /// Host cluster; `None` when nothing is allocated. With an external data file offset 0 is a
    /// valid cluster: the COPIED bit tells it from "none" (qcow2 spec, "Standard Cluster
    /// Descriptor").
    pub cluster: Option<HostOffset>,
    /// Whether the cluster's refcount is exactly one.
    pub is_copied: bool,
    /// How its parts read.
    pub subclusters: Subclusters,
}

/// How the parts of a cluster read: bit `n` of each mask stands for subcluster `n`. Where entries
/// are not extended all 32 bits are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Subclusters {
    /// Subclusters whose content is in the host cluster.
    pub allocated: u32,
    /// Subclusters that read as zero.
    pub zero: u32,
}

impl Subclusters {
    /// Nothing here: look at the backing file.
    pub const UNALLOCATED: Self = Self { allocated: 0, zero: 0 };
    /// All from the host cluster.
    pub const DATA: Self = Self { allocated: u32::MAX, zero: 0 };
    /// All zero.
    pub const ZERO: Self = Self { allocated: 0, zero: u32::MAX };
}

/// A compressed cluster. It shares host clusters with others, so only sectors are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressedEntry {
    /// Host byte offset, not aligned to anything.
    pub offset: HostOffset,
    /// 512-byte sectors the data touches, the first included: at least 1.
    pub sectors: u64,
}

impl CompressedEntry {
    /// The largest number of bytes that may be read: to the end of the last sector.
    pub fn max_bytes(self) -> u64 {
        let into_sector = self.offset.0 & 511;
        self.sectors.saturating_mul(512).saturating_sub(into_sector)
    }

    /// The entry that describes `len` bytes at `offset`; `None` when it does not fit the fields.
    pub fn covering(offset: HostOffset, len: u64, geometry: Geometry) -> Option<Self> {
        let last = offset.0.checked_add(len)?.checked_sub(1)?;
        let sectors = (last >> 9).checked_sub(offset.0 >> 9)?.checked_add(1)?;
        let (offset_bits, sector_bits) = compressed_bits(geometry);
        let fits = offset.0 >> offset_bits == 0 && sectors.checked_sub(1)? >> sector_bits == 0;
        fits.then_some(Self { offset, sectors })
    }
}

/// Widths of the offset and the sector-count field of a compressed descriptor.
fn compressed_bits(geometry: Geometry) -> (u32, u32) {
    let sector_bits = geometry.cluster_bits().saturating_sub(8);
    (62u32.saturating_sub(sector_bits), sector_bits)
}

impl L2Entry {
    /// An entry that maps nothing.
    pub const UNALLOCATED: Self = Self::Standard(StandardEntry {
        cluster: None,
        is_copied: false,
        subclusters: Subclusters::UNALLOCATED,
    });

    /// Decodes an entry that stands at file offset `at`. `bitmap` is the second half of an extended
    /// entry and is ignored without subclusters. `has_data_file` allows host offset 0.
    pub fn decode(
        raw: u64,
        bitmap: u64,
        geometry: Geometry,
        has_data_file: bool,
        at: u64,
    ) -> Result<Self, Malformed> {
        if raw & COMPRESSED != 0 {
            return decode_compressed(raw, bitmap, geometry, at);
        }
        let allowed =
            OFFSET_MASK | COPIED | if geometry.has_subclusters() { 0 } else { READS_ZERO };
        if raw & !allowed != 0 {
            let value = raw & !allowed;
            return Err(Malformed::new(at, "l2_entry", Problem::Reserved { value }));
        }
        let is_copied = raw & COPIED != 0;
        let mut cluster = offset_field(raw, geometry, at, "l2_entry")?;
        if cluster.is_none() && has_data_file && is_copied {
            cluster = Some(HostOffset(0));
        }
        let subclusters = if geometry.has_subclusters() {
            decode_subclusters(bitmap, cluster, at)?
        } else if raw & READS_ZERO != 0 {
            Subclusters::ZERO
        } else if cluster.is_some() {
            Subclusters::DATA
        } else {
            Subclusters::UNALLOCATED
        };
        Ok(Self::Standard(StandardEntry { cluster, is_copied, subclusters }))
    }

    /// The entry and its subcluster bitmap as they stand in the table. The bitmap is written only
    /// with extended entries.
    pub fn encode(self, geometry: Geometry) -> (u64, u64) {
        match self {
            Self::Compressed(c) => {
                let (offset_bits, _) = compressed_bits(geometry);
                let count = c.sectors.saturating_sub(1) << offset_bits;
                (COMPRESSED | count | c.offset.0, 0)
            }
            Self::Standard(s) => {
                let raw = s.cluster.map_or(0, |c| c.0) | if s.is_copied { COPIED } else { 0 };
                let Subclusters { allocated, zero } = s.subclusters;
                if geometry.has_subclusters() {
                    (raw, u64::from(zero) << 32 | u64::from(allocated))
                } else {
                    (raw | if zero == 0 { 0 } else { READS_ZERO }, 0)
                }
            }
        }
    }
}

fn decode_compressed(raw: u64, bitmap: u64, g: Geometry, at: u64) -> Result<L2Entry, Malformed> {
    if raw & COPIED != 0 {
        let value = COPIED;
        return Err(Malformed::new(at, "compressed l2_entry", Problem::Reserved { value }));
    }
    if g.has_subclusters() && bitmap != 0 {
        let problem = Problem::Reserved { value: bitmap };
        return Err(Malformed::new(at.saturating_add(8), "compressed subcluster bitmap", problem));
    }
    let (offset_bits, sector_bits) = compressed_bits(g);
    let offset = HostOffset(raw & (1u64 << offset_bits).saturating_sub(1));
    let count = (raw >> offset_bits) & (1u64 << sector_bits).saturating_sub(1);
    Ok(L2Entry::Compressed(CompressedEntry { offset, sectors: count.saturating_add(1) }))
}

fn decode_subclusters(
    bitmap: u64,
    cluster: Option<HostOffset>,
    at: u64,
) -> Result<Subclusters, Malformed> {
    let half = |shift: u32| u32::try_from(bitmap >> shift & u64::from(u32::MAX)).unwrap_or(0);
    let (allocated, zero) = (half(0), half(32));
    let field_at = at.saturating_add(8);
    if allocated & zero != 0 {
        let problem = Problem::Other("marks a subcluster both allocated and zero");
        return Err(Malformed::new(field_at, "subcluster bitmap", problem));
    }
    if allocated != 0 && cluster.is_none() {
        let problem = Problem::Other("marks subclusters allocated without a host cluster");
        return Err(Malformed::new(field_at, "subcluster bitmap", problem));
    }
    Ok(Subclusters { allocated, zero })
}

fn offset_field(
    raw: u64,
    geometry: Geometry,
    at: u64,
    field: &'static str,
) -> Result<Option<HostOffset>, Malformed> {
    let offset = HostOffset(raw & OFFSET_MASK);
    if !geometry.is_cluster_aligned(offset) {
        let problem = Problem::Misaligned { value: offset.0, align: geometry.cluster_size() };
        return Err(Malformed::new(at, field, problem));
    }
    Ok((offset.0 != 0).then_some(offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_entries_round_trip() {
        let g = Geometry::new(16, 4, false);
        for raw in [0, 1, COPIED | 0x50000, 0x50000, COPIED | 0x50001] {
            let e = L2Entry::decode(raw, 0, g, false, 0).unwrap();
            assert_eq!(e.encode(g).0, raw);
        }
        assert!(L2Entry::decode(0x50200, 0, g, false, 0).is_err());
        assert!(L2Entry::decode(0x50002, 0, g, false, 0).is_err());
    }

    #[test]
    fn compressed_entries_round_trip() {
        for bits in 9..=21 {
            let g = Geometry::new(bits, 4, false);
            let e = CompressedEntry::covering(HostOffset(0x12345), 100, g).unwrap();
            let (raw, _) = L2Entry::Compressed(e).encode(g);
            assert_eq!(L2Entry::decode(raw, 0, g, false, 0).unwrap(), L2Entry::Compressed(e));
            assert!(e.max_bytes() >= 100);
        }
    }

    #[test]
    fn offset_zero_is_a_cluster_of_a_data_file() {
        let g = Geometry::new(16, 4, false);
        let L2Entry::Standard(s) = L2Entry::decode(COPIED, 0, g, true, 0).unwrap() else {
            panic!()
        };
        assert_eq!(s.cluster, Some(HostOffset(0)));
        assert_eq!(s.subclusters, Subclusters::DATA);
    }
}
