//! Writing bitmaps to clusters of their own: data, then the table, then the directory. Nothing that
//! is in the file changes; only the header, written by whoever calls, makes them visible.

use std::collections::HashSet;

use super::PersistentBitmap;
use super::bits::{Bits, granules};
use super::load::State;
use crate::allocate::Allocate;
use crate::error::{Condition, Error, Result};
use crate::in_memory;
use crate::layout::bitmap_directory::{
    BitmapShape, DIRTY_TRACKING, DirectoryEntry, TableEntry, encode_directory, flags,
};
use crate::layout::extension::BitmapsExtension;
use crate::layout::geometry::Geometry;
use crate::layout::units::HostOffset;
use crate::limits;
use crate::storage::{Storage, StorageExt};

/// Bytes of bitmap data gathered for one write.
const STORE_PIECE_BYTES: usize = 1 << 20;

/// Tables and directories are written in whole sectors, the smallest cluster.
const SECTOR_BYTES: usize = 512;

/// Stores `bitmaps` of a disk of `size` bytes in clusters taken from `allocator`, valid and
/// consistent, and answers the extension that makes them so once it stands in the header together
/// with the autoclear bit; `None` when there are none. Nothing is durable before the caller syncs.
pub fn write(
    file: &dyn Storage,
    geometry: Geometry,
    bitmaps: &[PersistentBitmap],
    size: u64,
    allocator: &mut dyn Allocate,
) -> Result<Option<BitmapsExtension>> {
    // The format counts bytes, a disk has whole sectors.
    let size = size & !511;
    let mut names = HashSet::new();
    for bitmap in bitmaps {
        check_new(file, &bitmap.name, bitmap.granularity_bits, (geometry, size))?;
        if !names.insert(&bitmap.name) {
            return Err(refuse(file, &bitmap.name, "is given twice"));
        }
        if bitmap.bits.len() != granules(size, bitmap.granularity_bits) {
            return Err(refuse(
                file,
                &bitmap.name,
                "does not have one bit per granule of the disk",
            ));
        }
    }
    let mut target = Target { file, geometry, allocator, taken: Vec::new() };
    let stored: Result<_> = bitmaps
        .iter()
        .map(|bitmap| Ok(new_entry(bitmap, target.store_bits(&bitmap.bits)?)))
        .collect::<Result<Vec<_>>>()
        .and_then(|entries| target.store_directory(&entries));
    stored.inspect_err(|_| target.give_back())
}

pub(crate) fn new_entry(
    bitmap: &PersistentBitmap,
    (table, table_entries): (HostOffset, u32),
) -> DirectoryEntry {
    DirectoryEntry {
        table,
        table_entries,
        flags: if bitmap.is_enabled { flags::AUTO } else { 0 },
        kind: DIRTY_TRACKING,
        granularity_bits: bitmap.granularity_bits,
        extra: Vec::new(),
        name: bitmap.name.clone(),
    }
}

/// Whether a bitmap of that name and granularity can be stored at all.
pub(crate) fn check_new(
    file: &dyn Storage,
    name: &str,
    granularity_bits: u8,
    (geometry, size): (Geometry, u64),
) -> Result<()> {
    let longest = usize::from(limits::MAX_BITMAP_NAME_BYTES);
    if name.is_empty() || name.len() > longest || name.contains('\0') {
        return Err(refuse(
            file,
            name,
            format!("has a name that is not 1 to {longest} bytes without NUL"),
        ));
    }
    if !limits::BITMAP_GRANULARITY_BITS.contains(&granularity_bits) {
        return Err(refuse(file, name, "has a granularity outside 512 bytes to 2 GiB"));
    }
    let shape = BitmapShape::new(size, granularity_bits, geometry);
    if shape.bits == 0 {
        return Err(refuse(file, name, "cannot be stored for an empty disk"));
    }
    if shape.table_entries.saturating_mul(geometry.cluster_size()) > limits::MAX_BITMAP_BYTES {
        let reason = format!(
            "would take {} bytes where the format allows {}: use a larger granularity",
            shape.bytes,
            limits::MAX_BITMAP_BYTES
        );
        return Err(refuse(file, name, reason));
    }
    Ok(())
}

/// Why a bitmap in that state is not used.
pub(crate) fn unusable(file: &dyn Storage, name: &str, state: State) -> Error {
    match state {
        State::Inconsistent => {
            Error::condition(file.name(), Condition::InconsistentBitmap(name.into()))
        }
        other => refuse(file, name, other.reason()),
    }
}

pub(crate) fn refuse(file: &dyn Storage, name: &str, reason: impl Into<String>) -> Error {
    Error::Bitmap { file: file.name(), name: name.into(), reason: reason.into() }
}

/// Where bitmaps are stored, and what was allocated for them so far.
pub(crate) struct Target<'a> {
    pub(crate) file: &'a dyn Storage,
    pub(crate) geometry: Geometry,
    pub(crate) allocator: &'a mut dyn Allocate,
    /// Runs of clusters taken, so that they can be given back when storing fails.
    pub(crate) taken: Vec<(HostOffset, u64)>,
}

impl Target<'_> {
    pub(crate) fn allocate(&mut self, clusters: u64) -> Result<HostOffset> {
        let at = self.allocator.allocate(clusters)?;
        self.taken.push((at, clusters));
        Ok(at)
    }

    /// Gives back all that was taken; nothing points at it. What cannot be given back is leaked.
    pub(crate) fn give_back(&mut self) {
        for (at, clusters) in self.taken.drain(..) {
            if let Err(error) = self.allocator.free(at, clusters) {
                tracing::warn!(%error, %at, clusters, "clusters of a bitmap are leaked");
            }
        }
    }

    /// Stores all bits. Clusters without a set bit take no space. Answers the table.
    pub(crate) fn store_bits(&mut self, bits: &Bits) -> Result<(HostOffset, u32)> {
        let size = self.geometry.cluster_size();
        let dirty = || bits.blocks(size.saturating_mul(8));
        let count = dirty().count() as u64;
        let mut next = if count == 0 { HostOffset(0) } else { self.allocate(count)? };
        let mut table = vec![TableEntry::Zeroes; in_memory(bits.byte_len().div_ceil(size))];
        let mut pending = Pending { file: self.file, at: next, bytes: Vec::new() };
        for index in dirty() {
            let entry = table.get_mut(in_memory(index));
            entry.into_iter().for_each(|entry| *entry = TableEntry::Data(next));
            next = HostOffset(next.0 + size);
            let start = pending.bytes.len();
            pending.bytes.resize(start + in_memory(size), 0);
            let bytes = pending.bytes.get_mut(start..).unwrap_or_default();
            bits.read_bytes(index * size, bytes);
            if pending.bytes.len() >= STORE_PIECE_BYTES {
                pending.flush()?;
            }
        }
        pending.flush()?;
        self.store_table(&table)
    }

    /// Stores a table in new clusters.
    pub(crate) fn store_table(&mut self, table: &[TableEntry]) -> Result<(HostOffset, u32)> {
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.encode().to_be_bytes()).collect();
        let at = self.store_bytes(bytes)?;
        Ok((at, u32::try_from(table.len()).unwrap_or(u32::MAX)))
    }

    /// Stores a directory in new clusters. `None` when there is nothing to store.
    pub(crate) fn store_directory(
        &mut self,
        entries: &[DirectoryEntry],
    ) -> Result<Option<BitmapsExtension>> {
        if entries.is_empty() {
            return Ok(None);
        }
        let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        let bytes = encode_directory(entries);
        let directory_size = bytes.len() as u64;
        let too_many = count > limits::MAX_BITMAPS;
        if too_many || directory_size > limits::MAX_BITMAP_DIRECTORY_BYTES {
            let reason = format!("cannot hold more than {} bitmaps", limits::MAX_BITMAPS);
            return Err(Error::Refused { file: self.file.name(), reason });
        }
        let directory_offset = self.store_bytes(bytes)?.0;
        Ok(Some(BitmapsExtension { count, directory_size, directory_offset }))
    }

    /// Stores `bytes` in new clusters. What follows them in the last cluster means nothing.
    fn store_bytes(&mut self, mut bytes: Vec<u8>) -> Result<HostOffset> {
        let at = self.allocate(self.geometry.clusters_for(bytes.len() as u64))?;
        bytes.resize(bytes.len().next_multiple_of(SECTOR_BYTES), 0);
        self.file.write(&bytes, at.0)?;
        Ok(at)
    }
}

/// Bytes gathered for one large write.
struct Pending<'a> {
    file: &'a dyn Storage,
    at: HostOffset,
    bytes: Vec<u8>,
}

impl Pending<'_> {
    fn flush(&mut self) -> Result<()> {
        if !self.bytes.is_empty() {
            self.file.write(&self.bytes, self.at.0)?;
            self.at.0 += self.bytes.len() as u64;
            self.bytes.clear();
        }
        Ok(())
    }
}
