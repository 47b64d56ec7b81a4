//! The mark of an unfinished in-place copy. SPEC 3.3.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use format_spec::Writer;

use super::tables::lock;
use crate::error::Result;
use crate::layout::extension::{Extension, FeatureName};
use crate::layout::header::{Header, incompatible};
use crate::preflight::read_header;
use crate::storage::{Storage, StorageExt};

/// Header field `incompatible_features`.
const INCOMPATIBLE_AT: u64 = 72;
/// What a disk writes in one piece.
const SECTOR: usize = 512;
/// Type of the feature name table, and bytes of one of its entries.
const FEATURE_NAMES: u32 = 0x6803_f857;
const NAME_BYTES: usize = 48;
const EXTENSION_HEAD_BYTES: usize = 8;
/// What a program that refuses the image shows.
const FEATURE_NAME: &str = "bitferry: unfinished in-place copy";
/// The number of the bit.
const BIT: u8 = 62;

/// Whether the image is marked, and whether it is to be.
#[derive(Debug)]
pub(super) struct Mark {
    is_wanted: bool,
    is_set: AtomicBool,
    setting: Mutex<()>,
}

impl Mark {
    pub(super) fn new(header: &Header, is_wanted: bool) -> Self {
        let is_set = header.incompatible_features & incompatible::UNFINISHED_COPY != 0;
        let is_wanted = is_wanted && header.version >= 3;
        Self { is_wanted, is_set: AtomicBool::new(is_set), setting: Mutex::default() }
    }

    pub(super) fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }

    /// Sets the mark durably, where it is wanted and not set yet. To be called before every change
    /// of guest data.
    pub(super) fn set(&self, file: &dyn Storage) -> Result<()> {
        if !self.is_wanted || self.is_set() {
            return Ok(());
        }
        let _alone = lock(&self.setting);
        if !self.is_set() {
            let header = read_header(file)?;
            write_name(file, &header)?;
            let features = header.incompatible_features | incompatible::UNFINISHED_COPY;
            file.write(&features.to_be_bytes(), INCOMPATIBLE_AT)?;
            file.make_durable()?;
            self.is_set.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Clears the mark durably by the last write of the copy, one sector.
    pub(super) fn clear(&self, file: &dyn Storage) -> Result<()> {
        if !self.is_set() {
            return Ok(());
        }
        let features = read_header(file)?.incompatible_features & !incompatible::UNFINISHED_COPY;
        file.write(&features.to_be_bytes(), INCOMPATIBLE_AT)?;
        file.make_durable()?;
        self.is_set.store(false, Ordering::Release);
        Ok(())
    }
}

/// Names the bit in the header, where that can be done one sector at a time without ever leaving a
/// header that reads differently. Last sector first: what a new extension consists of is durable
/// before the end marker in front of it gives way.
fn write_name(file: &dyn Storage, header: &Header) -> Result<()> {
    let mut old = vec![0; 1 << header.cluster_bits];
    file.read(&mut old, 0)?;
    let Some(new) = with_name(&old) else { return Ok(()) };
    let sectors = old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate();
    let changed: Vec<_> = sectors.filter(|(_, (old, new))| old != new).collect();
    for (index, (_, sector)) in changed.into_iter().rev() {
        file.write(sector, (index * SECTOR) as u64)?;
        file.make_durable()?;
    }
    Ok(())
}

/// The first cluster with the bit named: in the place of a name that no program ever shows (those
/// of compatible and autoclear bits, since nobody refuses an image for them), or, without any
/// table, in a new one at the end of the extensions. `None` where it is named or there is no such
/// place.
fn with_name(bytes: &[u8]) -> Option<Vec<u8>> {
    let backing = usize::try_from(u64::from_be_bytes(*bytes.get(8..)?.first_chunk()?)).ok()?;
    let area_end = if backing == 0 { bytes.len() } else { backing.min(bytes.len()) };
    let mut at = be32(bytes, 100)? as usize;
    let mut new = bytes.to_vec();
    while at.checked_add(EXTENSION_HEAD_BYTES)? <= area_end {
        let (kind, len) = (be32(bytes, at)?, be32(bytes, at + 4)? as usize);
        if kind == 0 {
            break;
        }
        let body = at + EXTENSION_HEAD_BYTES;
        if kind == FEATURE_NAMES {
            let place = |n: usize| body + n * NAME_BYTES;
            let entry =
                |n: usize| Some((place(n), *bytes.get(place(n))?, *bytes.get(place(n) + 1)?));
            let mut entries = (0..len / NAME_BYTES).filter_map(entry);
            if entries.clone().any(|(_, kind, bit)| (kind, bit) == (0, BIT)) {
                return None;
            }
            let (slot, ..) = entries.find(|(_, kind, _)| matches!(kind, 1 | 2))?;
            let name = encoded_name();
            let name = name.get(EXTENSION_HEAD_BYTES..)?;
            new.get_mut(slot..slot.checked_add(name.len())?)?.copy_from_slice(name);
            return Some(new);
        }
        at = body.checked_add(len.checked_next_multiple_of(8)?)?;
    }
    let mut table = encoded_name();
    table.extend([0; EXTENSION_HEAD_BYTES]);
    let end = at.checked_add(table.len())?;
    new.get_mut(at..end).filter(|_| end <= area_end)?.copy_from_slice(&table);
    Some(new)
}

/// A feature name table with the one name.
fn encoded_name() -> Vec<u8> {
    let name = FeatureName { kind: 0, bit: BIT, name: FEATURE_NAME.into() };
    let mut out = Writer::new();
    Extension::FeatureNames(vec![name]).encode(&mut out);
    out.into_bytes()
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::header::{CompressionType, MAGIC};

    fn header(names: &[(u8, u8)], backing_len: usize) -> Header {
        let name =
            |(kind, bit): &(u8, u8)| FeatureName { kind: *kind, bit: *bit, name: "x".into() };
        let names = Extension::FeatureNames(names.iter().map(name).collect());
        let data = vec![7; 400];
        Header {
            version: 3,
            cluster_bits: 12,
            size: 1 << 20,
            crypt_method: 0,
            l1_size: 1,
            l1_table_offset: 0x1000,
            refcount_table_offset: 0x2000,
            refcount_table_clusters: 1,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: 0,
            compatible_features: 0,
            autoclear_features: 0,
            refcount_order: 4,
            compression_type: CompressionType::Zlib,
            further_fields: Vec::new(),
            extensions: vec![Extension::Unknown { kind: 0x1234, data }, names],
            backing_file: (backing_len > 0).then(|| "n".repeat(backing_len).into()),
        }
    }

    fn shown(h: &Header) -> Vec<(u8, u8)> {
        let names = h.extensions.iter().find_map(|e| match e {
            Extension::FeatureNames(names) => Some(names),
            _ => None,
        });
        names.map_or(Vec::new(), |n| n.iter().map(|n| (n.kind, n.bit)).collect())
    }

    #[test]
    fn a_name_nobody_needs_gives_way() {
        for backing_len in [0, 100] {
            let old = header(&[(0, 0), (0, 1), (1, 0), (2, 0)], backing_len);
            let new = with_name(&old.encode().unwrap()).unwrap();
            let new = Header::decode(&new).unwrap();
            assert_eq!(shown(&new), [(0, 0), (0, 1), (0, 62), (2, 0)]);
            assert_eq!(new.backing_file, old.backing_file);
            let full = header(&[(0, 0), (0, 1)], backing_len);
            assert_eq!(with_name(&full.encode().unwrap()), None);
            assert_eq!(with_name(&new.encode().unwrap()), None);
        }
    }

    #[test]
    fn a_new_table_appears_at_once() {
        let mut without = header(&[], 0);
        // The end marker moves through the border between two sectors.
        for len in (200..400).step_by(8) {
            without.extensions = vec![Extension::Unknown { kind: 0x1234, data: vec![7; len] }];
            let old = without.encode().unwrap();
            let new = with_name(&old).unwrap();
            assert_eq!(shown(&Header::decode(&new).unwrap()), [(0, 62)]);
            // Cut after any number of sectors, the last first.
            for cut in 0..old.len() / SECTOR {
                let mix = [&old[..cut * SECTOR], &new[cut * SECTOR..]].concat();
                let names = shown(&Header::decode(&mix).unwrap());
                assert!(names.is_empty() || names == [(0, 62)]);
            }
        }
        assert_eq!(with_name(&header(&[], 0).encode().unwrap()), None, "an empty table");
        let mut over = header(&[], 9);
        over.extensions.clear();
        assert_eq!(with_name(&over.encode().unwrap()), None, "the backing file's name is there");
        assert_eq!(over.encode().unwrap()[..4], MAGIC.to_be_bytes());
    }
}
