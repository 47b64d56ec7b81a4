//! What a new image shall be, checked before anything is written.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::layout::extension::{BitmapsExtension, Extension, FeatureName};
use crate::layout::geometry::Geometry;
use crate::layout::header::{CompressionType, Header, autoclear, compatible, incompatible};
use crate::layout::units::GuestOffset;
use crate::limits;
use crate::storage::Storage;

/// Extended L2 entries need clusters of 16 KiB at least (qcow2 spec, "Extended L2 Entries").
const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;

/// What a new image shall be. [`CreateOptions::new`] gives what `qemu-img create` gives by default;
/// every field may then be set.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// log2 of the cluster size, see [`limits::CLUSTER_BITS`].
    pub cluster_bits: u32,
    /// Width of a refcount in bits: a power of two from 1 to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// 2 or 3. Version 2 holds no bitmaps, zero flags, data file, zstd or subclusters.
    pub version: u32,
    /// Whether clusters have subclusters. Needs clusters of 16 KiB at least.
    pub extended_l2: bool,
    /// How clusters given to [`write_compressed`](super::NewImage::write_compressed) are
    /// compressed.
    pub compression_type: CompressionType,
    /// Lets QEMU update refcounts lazily when it writes later. The new image is written with exact
    /// refcounts all the same.
    pub lazy_refcounts: bool,
    /// What shines through where the new image has nothing.
    pub backing: Option<Backing>,
    /// Another file for the guest's data.
    pub data_file: Option<DataFile>,
    /// Whether the file may hold something, which then counts as nothing: a block device, or a file
    /// that is to be overwritten. Costs speed, since nothing there is known to read as zero.
    pub overwrite: bool,
}

/// The file below a new image.
#[derive(Debug, Clone)]
pub struct Backing {
    /// Its name as it is recorded.
    pub name: OsString,
    /// Its format as it is recorded: "raw", "qcow2".
    pub format: Option<String>,
    /// Reads it, for writes that cover an allocation unit in part. Without it such a write is
    /// refused, since the rest of the unit would have to come from the backing file.
    pub reader: Option<Arc<dyn BackingReader>>,
}

/// Reads what a guest would see below a new image.
pub trait BackingReader: Send + Sync + fmt::Debug {
    /// Fills `buf`. Bytes beyond the end of the backing file read as zero.
    fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<()>;
}

/// The external data file of a new image. Guest data stands in it at its guest offset, as QEMU does
/// it.
#[derive(Debug, Clone)]
pub struct DataFile {
    /// Its name as it is recorded.
    pub name: OsString,
    /// Whether it must read as a raw disk by itself at any time. The map is then complete from the
    /// start, so that what the storage holds already is the disk's content.
    pub is_raw: bool,
    /// The file. Unless it is raw, what it holds counts as nothing.
    pub storage: Arc<dyn Storage>,
}

impl BackingReader for Chain {
    fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<()> {
        Self::read_at(self, buf, at)
    }
}

impl CreateOptions {
    /// The defaults of `qemu-img create`: version 3, 64 KiB clusters, 16-bit refcounts, zlib.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster_bits: 16,
            refcount_bits: 16,
            version: 3,
            extended_l2: false,
            compression_type: CompressionType::Zlib,
            lazy_refcounts: false,
            backing: None,
            data_file: None,
            overwrite: false,
        }
    }

    /// Cluster arithmetic of the new image.
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.cluster_bits, self.refcount_bits.max(1).ilog2(), self.extended_l2)
    }

    /// Whether these options make sense together and within the format's limits. `file` names the
    /// new image in the error.
    pub fn check(&self, file: &Arc<str>) -> Result<()> {
        self.problem().map_or(Ok(()), |reason| {
            Err(Error::Refused { file: Arc::clone(file), reason: reason.to_owned() })
        })
    }

    fn problem(&self) -> Option<&'static str> {
        let is_v2 = self.version == 2;
        let checks = [
            (!self.size.is_multiple_of(512), "the virtual size is not a multiple of 512"),
            (self.size > limits::MAX_VIRTUAL_SIZE, "the virtual size is larger than 2 EiB"),
            (
                !limits::CLUSTER_BITS.contains(&self.cluster_bits),
                "the cluster size must be from 512 bytes to 2 MiB",
            ),
            (
                !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64,
                "the refcount width must be a power of two up to 64 bits",
            ),
            (!(2..=3).contains(&self.version), "the qcow2 version must be 2 or 3"),
            (is_v2 && self.refcount_bits != 16, "version 2 has 16-bit refcounts"),
            (is_v2 && self.lazy_refcounts, "lazy refcounts need version 3"),
            (is_v2 && self.extended_l2, "extended L2 entries need version 3"),
            (is_v2 && self.data_file.is_some(), "an external data file needs version 3"),
            (
                is_v2 && self.compression_type != CompressionType::Zlib,
                "zstd compression needs version 3",
            ),
            (
                self.extended_l2 && self.cluster_bits < MIN_EXTENDED_CLUSTER_BITS,
                "extended L2 entries need clusters of 16 KiB at least",
            ),
            (
                self.backing.is_some() && self.data_file.as_ref().is_some_and(|d| d.is_raw),
                "a raw data file and a backing file exclude each other",
            ),
            (
                self.geometry().l1_entries(self.size) > limits::MAX_L1_BYTES / 8,
                "the virtual size needs larger clusters",
            ),
        ];
        checks.into_iter().find_map(|(bad, reason)| bad.then_some(reason)).or_else(|| {
            let backing = self.backing.as_ref();
            let names = [
                backing.map(|b| b.name.as_os_str()),
                backing.and_then(|b| b.format.as_deref()).map(OsStr::new),
                self.data_file.as_ref().map(|d| d.name.as_os_str()),
            ];
            let bad = names.into_iter().flatten().any(is_bad_name);
            bad.then_some(
                "a file name to be recorded is empty, longer than 1023 bytes or has a NUL",
            )
        })
    }

    /// The header of the new image, complete but for the places of its tables. Fails where it does
    /// not fit one cluster together with a bitmaps extension that may still come.
    pub(super) fn header(&self, file: &Arc<str>) -> Result<Header> {
        let mut header = self.plain_header();
        let room = BitmapsExtension { count: 1, directory_size: 1, directory_offset: 0 };
        let fits = |h: &Header| {
            let mut with_bitmaps = h.clone();
            with_bitmaps.set_bitmaps((h.version >= 3).then_some(room));
            with_bitmaps.encode().is_some()
        };
        if !fits(&header) {
            let reason =
                "the file names to be recorded do not fit one cluster; use larger clusters";
            return Err(Error::Refused { file: Arc::clone(file), reason: reason.to_owned() });
        }
        if header.version >= 3 {
            header.extensions.push(Extension::FeatureNames(feature_names()));
            if !fits(&header) {
                header.extensions.pop();
            }
        }
        Ok(header)
    }

    fn plain_header(&self) -> Header {
        let mut extensions = Vec::new();
        let backing = self.backing.as_ref();
        if let Some(format) = backing.and_then(|b| b.format.clone()) {
            extensions.push(Extension::BackingFormat(format));
        }
        if let Some(data_file) = &self.data_file {
            extensions.push(Extension::DataFile(data_file.name.clone()));
        }
        let is_raw = self.data_file.as_ref().is_some_and(|d| d.is_raw);
        let zstd = self.compression_type == CompressionType::Zstd;
        Header {
            version: self.version,
            cluster_bits: self.cluster_bits,
            size: self.size,
            crypt_method: 0,
            l1_size: 0,
            l1_table_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: bit(self.data_file.is_some(), incompatible::EXTERNAL_DATA_FILE)
                | bit(zstd, incompatible::COMPRESSION_TYPE)
                | bit(self.extended_l2, incompatible::EXTENDED_L2),
            compatible_features: bit(self.lazy_refcounts, compatible::LAZY_REFCOUNTS),
            autoclear_features: bit(is_raw, autoclear::DATA_FILE_RAW),
            refcount_order: self.refcount_bits.ilog2(),
            compression_type: self.compression_type,
            further_fields: Vec::new(),
            extensions,
            backing_file: backing.map(|b| b.name.clone()),
        }
    }
}

fn bit(is_set: bool, mask: u64) -> u64 {
    if is_set { mask } else { 0 }
}

fn is_bad_name(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.is_empty() || name.len() > limits::MAX_FILE_NAME_BYTES as usize || name.contains(&0)
}

/// Names by which a program that does not know a feature can report it.
fn feature_names() -> Vec<FeatureName> {
    let known: [(u8, u64, &str); 8] = [
        (0, incompatible::DIRTY, "dirty bit"),
        (0, incompatible::CORRUPT, "corrupt bit"),
        (0, incompatible::EXTERNAL_DATA_FILE, "external data file"),
        (0, incompatible::COMPRESSION_TYPE, "compression type"),
        (0, incompatible::EXTENDED_L2, "extended L2 entries"),
        (1, compatible::LAZY_REFCOUNTS, "lazy refcounts"),
        (2, autoclear::BITMAPS, "bitmaps"),
        (2, autoclear::DATA_FILE_RAW, "raw external data"),
    ];
    let name = |(kind, mask, name): (u8, u64, &str)| FeatureName {
        kind,
        bit: u8::try_from(mask.trailing_zeros()).unwrap_or_default(),
        name: name.to_owned(),
    };
    known.into_iter().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(change: impl FnOnce(&mut CreateOptions)) -> Option<&'static str> {
        let mut options = CreateOptions::new(1 << 30);
        change(&mut options);
        options.problem()
    }

    #[test]
    fn what_the_format_cannot_hold_is_refused() {
        assert_eq!(refusal(|_| {}), None);
        assert!(refusal(|o| o.size = 513).is_some());
        assert!(refusal(|o| o.cluster_bits = 8).is_some());
        assert!(refusal(|o| o.cluster_bits = 22).is_some());
        assert!(refusal(|o| o.refcount_bits = 3).is_some());
        assert!(refusal(|o| o.refcount_bits = 0).is_some());
        assert!(refusal(|o| o.refcount_bits = 128).is_some());
        assert!(refusal(|o| o.version = 4).is_some());
        for change in [
            |o: &mut CreateOptions| o.refcount_bits = 8,
            |o: &mut CreateOptions| o.lazy_refcounts = true,
            |o: &mut CreateOptions| o.extended_l2 = true,
            |o: &mut CreateOptions| o.compression_type = CompressionType::Zstd,
        ] {
            let reason = refusal(|o| {
                o.version = 2;
                change(o);
            });
            assert!(reason.is_some_and(|r| r.contains('2') || r.contains("version 3")));
        }
        assert!(refusal(|o| (o.extended_l2, o.cluster_bits) = (true, 13)).is_some());
        assert!(refusal(|o| (o.size, o.cluster_bits) = (256 << 30, 9)).is_some());
        assert_eq!(refusal(|o| (o.size, o.cluster_bits) = (128 << 30, 9)), None);
    }

    #[test]
    fn feature_names_go_before_file_names() {
        let file: Arc<str> = "new".into();
        let mut options = CreateOptions { cluster_bits: 9, ..CreateOptions::new(1 << 20) };
        let has_names =
            |h: &Header| h.extensions.iter().any(|e| matches!(e, Extension::FeatureNames(_)));
        assert!(!has_names(&options.header(&file).unwrap()));
        let backing = |len| Backing { name: "b".repeat(len).into(), format: None, reader: None };
        options.backing = Some(backing(300));
        assert!(options.header(&file).is_ok());
        options.backing = Some(backing(500));
        assert!(options.header(&file).is_err());
        options.cluster_bits = 16;
        assert!(has_names(&options.header(&file).unwrap()));
    }
}
