//! The header: fixed fields, extensions, backing file name. qcow2 spec, "Header".

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use format_spec::{Malformed, Problem, Reader, Writer};

use super::extension::{self, BitmapsExtension, Extension};
use super::geometry::Geometry;
use crate::limits;

/// "QFI\xfb".
pub const MAGIC: u32 = 0x5146_49fb;
const V2_BYTES: u32 = 72;
const V3_BYTES: u32 = 104;

/// Incompatible feature bits: an image with one that is not known must not be opened.
pub mod incompatible {
    /// Refcounts may be wrong; the image was not closed.
    pub const DIRTY: u64 = 1;
    /// Some structure is known to be wrong; never write.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data lives in another file.
    pub const EXTERNAL_DATA_FILE: u64 = 1 << 2;
    /// The compression type field counts.
    pub const COMPRESSION_TYPE: u64 = 1 << 3;
    /// L2 entries are extended by subcluster bitmaps.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// Ours: an in-place copy is not finished. SPEC 3.3.
    pub const UNFINISHED_COPY: u64 = 1 << 62;
}

/// Compatible feature bits.
pub mod compatible {
    /// Refcounts are updated lazily; the dirty bit may follow.
    pub const LAZY_REFCOUNTS: u64 = 1;
}

/// Autoclear feature bits: a writer that does not know one clears it.
pub mod autoclear {
    /// The bitmaps extension is consistent with the data.
    pub const BITMAPS: u64 = 1;
    /// The external data file reads as a raw image.
    pub const DATA_FILE_RAW: u64 = 1 << 1;
}

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CompressionType {
    /// Raw deflate with a 4 KiB window.
    #[default]
    Zlib,
    /// zstd frames.
    Zstd,
}

/// A decoded header. Encoding it again gives the same meaning; unknown extensions and fields beyond
/// the known header are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Virtual size in bytes.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries in the active L1 table.
    pub l1_size: u32,
    /// Offset of the active L1 table.
    pub l1_table_offset: u64,
    /// Offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub nb_snapshots: u32,
    /// Offset of the snapshot table.
    pub snapshots_offset: u64,
    /// See [`incompatible`].
    pub incompatible_features: u64,
    /// See [`compatible`].
    pub compatible_features: u64,
    /// See [`autoclear`].
    pub autoclear_features: u64,
    /// log2 of the refcount width in bits.
    pub refcount_order: u32,
    /// How clusters are compressed.
    pub compression_type: CompressionType,
    /// Header fields beyond those known here, as they came.
    pub further_fields: Vec<u8>,
    /// Extensions in file order.
    pub extensions: Vec<Extension>,
    /// The backing file's name as it stands in the image.
    pub backing_file: Option<OsString>,
}

impl Header {
    /// Decodes a header from the first cluster of a file, or as much of it as there is. Checks
    /// everything that can be checked without the rest of the file. Incompatible bits are *not*
    /// judged here: see `preflight`.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, 0);
        expect(&mut r, "magic", MAGIC)?;
        let version = in_range(r.be32("version")?, 4, "version", 2, 3)?;
        let backing_file_offset = r.be64("backing_file_offset")?;
        let backing_file_size = r.be32("backing_file_size")?;
        let (low, high) = (*limits::CLUSTER_BITS.start(), *limits::CLUSTER_BITS.end());
        let cluster_bits = in_range(r.be32("cluster_bits")?, 20, "cluster_bits", low, high)?;
        let size = r.be64("size")?;
        let crypt_method = in_range(r.be32("crypt_method")?, 32, "crypt_method", 0, 2)?;
        let mut header = Self {
            version,
            cluster_bits,
            size,
            crypt_method,
            l1_size: r.be32("l1_size")?,
            l1_table_offset: r.be64("l1_table_offset")?,
            refcount_table_offset: r.be64("refcount_table_offset")?,
            refcount_table_clusters: r.be32("refcount_table_clusters")?,
            nb_snapshots: r.be32("nb_snapshots")?,
            snapshots_offset: r.be64("snapshots_offset")?,
            incompatible_features: 0,
            compatible_features: 0,
            autoclear_features: 0,
            refcount_order: 4,
            compression_type: CompressionType::Zlib,
            further_fields: Vec::new(),
            extensions: Vec::new(),
            backing_file: None,
        };
        let header_length = if version == 2 { V2_BYTES } else { header.decode_v3(&mut r)? };
        header.check_tables()?;
        let area = decode_backing(&mut header, bytes, (backing_file_offset, backing_file_size))?;
        header.extensions = decode_extensions(bytes, header_length, area)?;
        Ok(header)
    }

    fn decode_v3(&mut self, r: &mut Reader<'_>) -> Result<u32, Malformed> {
        self.incompatible_features = r.be64("incompatible_features")?;
        self.compatible_features = r.be64("compatible_features")?;
        self.autoclear_features = r.be64("autoclear_features")?;
        let order = r.be32("refcount_order")?;
        self.refcount_order = in_range(order, 96, "refcount_order", 0, limits::MAX_REFCOUNT_ORDER)?;
        let max = 1u32 << self.cluster_bits;
        let length = in_range(r.be32("header_length")?, 100, "header_length", V3_BYTES, max)?;
        if length % 8 != 0 {
            let problem = Problem::Misaligned { value: u64::from(length), align: 8 };
            return Err(Malformed::new(100, "header_length", problem));
        }
        let further = length.saturating_sub(V3_BYTES) as usize;
        let mut fields = r.sub(further, "further header fields")?;
        let mut compression = 0;
        if further > 0 {
            compression = fields.u8("compression_type")?;
            fields.take(7, "compression_type padding")?;
        }
        self.further_fields = fields.take_rest().to_vec();
        self.compression_type = match compression {
            0 => CompressionType::Zlib,
            1 => CompressionType::Zstd,
            _ => {
                in_range(u32::from(compression), 104, "compression_type", 0, 1)?;
                CompressionType::Zlib
            }
        };
        let has_bit = self.incompatible_features & incompatible::COMPRESSION_TYPE != 0;
        if has_bit != (self.compression_type != CompressionType::Zlib) {
            let problem = Problem::Other("does not agree with the compression type feature bit");
            return Err(Malformed::new(104, "compression_type", problem));
        }
        Ok(length)
    }

    fn check_tables(&self) -> Result<(), Malformed> {
        let g = self.geometry();
        if self.size > limits::MAX_VIRTUAL_SIZE {
            let max = limits::MAX_VIRTUAL_SIZE;
            let problem = Problem::OutOfRange { value: self.size, min: 0, max };
            return Err(Malformed::new(24, "size", problem));
        }
        if g.has_subclusters() && self.cluster_bits < 14 {
            let problem = Problem::Other("is too small for extended L2 entries");
            return Err(Malformed::new(20, "cluster_bits", problem));
        }
        let max_l1 = limits::MAX_L1_BYTES / 8;
        let needed = g.l1_entries(self.size);
        if u64::from(self.l1_size) < needed || u64::from(self.l1_size) > max_l1 {
            let value = u64::from(self.l1_size);
            let problem = Problem::OutOfRange { value, min: needed, max: max_l1 };
            return Err(Malformed::new(36, "l1_size", problem));
        }
        let max_clusters = limits::MAX_REFCOUNT_TABLE_BYTES >> self.cluster_bits;
        let clusters = u64::from(self.refcount_table_clusters);
        if clusters == 0 || clusters > max_clusters.max(1) {
            let problem = Problem::OutOfRange { value: clusters, min: 1, max: max_clusters.max(1) };
            return Err(Malformed::new(56, "refcount_table_clusters", problem));
        }
        if self.nb_snapshots > limits::MAX_SNAPSHOTS {
            let (value, max) = (u64::from(self.nb_snapshots), u64::from(limits::MAX_SNAPSHOTS));
            return Err(Malformed::new(
                60,
                "nb_snapshots",
                Problem::OutOfRange { value, min: 0, max },
            ));
        }
        let mut tables = vec![(self.refcount_table_offset, 48, "refcount_table_offset")];
        if self.l1_size > 0 {
            tables.push((self.l1_table_offset, 40, "l1_table_offset"));
        }
        if self.nb_snapshots > 0 {
            tables.push((self.snapshots_offset, 64, "snapshots_offset"));
        }
        tables.into_iter().try_for_each(|(value, at, field)| table_offset(g, value, at, field))
    }

    /// Cluster arithmetic of this image.
    pub fn geometry(&self) -> Geometry {
        let extended = self.incompatible_features & incompatible::EXTENDED_L2 != 0;
        Geometry::new(self.cluster_bits, self.refcount_order, extended)
    }

    /// Whether guest data lives in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible_features & incompatible::EXTERNAL_DATA_FILE != 0
    }

    /// The external data file's name as it stands in the image.
    pub fn data_file(&self) -> Option<&OsStr> {
        self.extensions.iter().find_map(|e| match e {
            Extension::DataFile(name) => Some(name.as_os_str()),
            _ => None,
        })
    }

    /// The backing file's format as it stands in the image.
    pub fn backing_format(&self) -> Option<&str> {
        self.extensions.iter().find_map(|e| match e {
            Extension::BackingFormat(name) => Some(name.as_str()),
            _ => None,
        })
    }

    /// The bitmaps extension, whether or not the autoclear bit says that it is valid.
    pub fn bitmaps(&self) -> Option<BitmapsExtension> {
        self.extensions.iter().find_map(|e| match e {
            Extension::Bitmaps(b) => Some(*b),
            _ => None,
        })
    }

    /// Replaces, adds or (with `None`) removes the bitmaps extension. The autoclear bit is the
    /// caller's.
    pub fn set_bitmaps(&mut self, bitmaps: Option<BitmapsExtension>) {
        let old = self.extensions.iter().position(|e| matches!(e, Extension::Bitmaps(_)));
        match (old, bitmaps) {
            (Some(at), Some(new)) => {
                if let Some(slot) = self.extensions.get_mut(at) {
                    *slot = Extension::Bitmaps(new);
                }
            }
            (Some(at), None) => drop(self.extensions.remove(at)),
            (None, Some(new)) => self.extensions.push(Extension::Bitmaps(new)),
            (None, None) => {}
        }
    }

    /// The header area as bytes, padded with zeroes to a whole cluster, so that nothing of a longer
    /// earlier header remains. `None` when it does not fit one cluster.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let mut tail = Writer::new();
        let is_v3 = self.version >= 3;
        for e in &self.extensions {
            e.encode(&mut tail);
        }
        extension::encode_end(&mut tail);
        let known = if is_v3 { V3_BYTES.checked_add(8)? } else { V2_BYTES };
        let further = u32::try_from(self.further_fields.len()).ok()?;
        let header_length = known.checked_add(further)?;
        let backing_len = u32::try_from(self.backing_file.as_ref().map_or(0, |n| n.len())).ok()?;
        let backing_at = u64::from(header_length).checked_add(tail.len() as u64)?;
        let mut w = Writer::new();
        w.be32(MAGIC).be32(self.version);
        w.be64(if backing_len == 0 { 0 } else { backing_at }).be32(backing_len);
        w.be32(self.cluster_bits).be64(self.size).be32(self.crypt_method);
        w.be32(self.l1_size).be64(self.l1_table_offset);
        w.be64(self.refcount_table_offset).be32(self.refcount_table_clusters);
        w.be32(self.nb_snapshots).be64(self.snapshots_offset);
        if is_v3 {
            w.be64(self.incompatible_features).be64(self.compatible_features);
            w.be64(self.autoclear_features).be32(self.refcount_order).be32(header_length);
            let zstd = self.compression_type == CompressionType::Zstd;
            w.u8(u8::from(zstd)).bytes(&[0; 7]).bytes(&self.further_fields);
        }
        w.bytes(&tail.into_bytes());
        w.bytes(self.backing_file.as_deref().unwrap_or_default().as_bytes());
        let mut bytes = w.into_bytes();
        let cluster = 1usize << self.cluster_bits;
        if bytes.len() > cluster {
            return None;
        }
        bytes.resize(cluster, 0);
        Some(bytes)
    }
}

fn expect(r: &mut Reader<'_>, field: &'static str, expected: u32) -> Result<(), Malformed> {
    let at = r.offset();
    let value = r.be32(field)?;
    if value == expected {
        return Ok(());
    }
    let problem = Problem::Mismatch { value: u64::from(value), expected: u64::from(expected) };
    Err(Malformed::new(at, field, problem))
}

fn in_range(
    value: u32,
    at: u64,
    field: &'static str,
    min: u32,
    max: u32,
) -> Result<u32, Malformed> {
    if (min..=max).contains(&value) {
        return Ok(value);
    }
    let (value, min, max) = (u64::from(value), u64::from(min), u64::from(max));
    Err(Malformed::new(at, field, Problem::OutOfRange { value, min, max }))
}

/// A table lies on a cluster boundary, behind the header, where an offset can point.
fn table_offset(g: Geometry, value: u64, at: u64, field: &'static str) -> Result<(), Malformed> {
    if g.in_cluster(value) != 0 {
        let problem = Problem::Misaligned { value, align: g.cluster_size() };
        return Err(Malformed::new(at, field, problem));
    }
    let (min, max) = (g.cluster_size(), super::entry::OFFSET_MASK);
    if value < min || value > max {
        return Err(Malformed::new(at, field, Problem::OutOfRange { value, min, max }));
    }
    Ok(())
}

/// Reads the backing file name and answers where the extension area ends.
fn decode_backing(
    header: &mut Header,
    bytes: &[u8],
    (offset, len): (u64, u32),
) -> Result<u64, Malformed> {
    let cluster = 1u64 << header.cluster_bits;
    if offset == 0 {
        return Ok(cluster);
    }
    if len > limits::MAX_FILE_NAME_BYTES {
        let max = u64::from(limits::MAX_FILE_NAME_BYTES);
        let problem = Problem::OutOfRange { value: u64::from(len), min: 0, max };
        return Err(Malformed::new(16, "backing_file_size", problem));
    }
    let end = offset.saturating_add(u64::from(len));
    let min = u64::from(V2_BYTES);
    if offset < min || end > cluster {
        let problem = Problem::OutOfRange { value: offset, min, max: cluster };
        return Err(Malformed::new(8, "backing_file_offset", problem));
    }
    let mut r = Reader::new(bytes, 0);
    r.take(usize::try_from(offset).unwrap_or(usize::MAX), "backing file name")?;
    let raw = r.take(len as usize, "backing file name")?;
    if raw.contains(&0) {
        return Err(Malformed::new(offset, "backing file name", Problem::BadName));
    }
    header.backing_file = Some(OsStr::from_bytes(raw).to_owned()).filter(|n| !n.is_empty());
    Ok(offset)
}

fn decode_extensions(bytes: &[u8], start: u32, end: u64) -> Result<Vec<Extension>, Malformed> {
    let end = usize::try_from(end).unwrap_or(usize::MAX).min(bytes.len());
    let area = bytes.get(start as usize..end).unwrap_or_default();
    extension::decode_all(Reader::new(area, u64::from(start)))
}
