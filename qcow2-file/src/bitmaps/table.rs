//! Bitmap tables and the clusters they name, read by pieces.

use std::ops::Range;

use format_spec::{Malformed, Problem};

use crate::error::Result;
use crate::layout::bitmap_directory::{BitmapShape, DirectoryEntry, ImageFacts, TableEntry};
use crate::layout::geometry::Geometry;
use crate::layout::units::HostOffset;
use crate::storage::{Storage, StorageExt};

/// Bytes of a table that are read at a time.
const TABLE_PIECE_BYTES: u64 = 64 << 10;

/// One bitmap's table, with what is needed to read through it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table<'a> {
    pub(crate) file: &'a dyn Storage,
    pub(crate) image: ImageFacts,
    pub(crate) entry: &'a DirectoryEntry,
}

impl Table<'_> {
    /// What the bitmap needs on this disk.
    pub(crate) fn shape(&self) -> BitmapShape {
        BitmapShape::new(self.image.size, self.entry.granularity_bits, self.image.geometry)
    }

    fn geometry(&self) -> Geometry {
        self.image.geometry
    }

    /// Bytes of bitmap data that the cluster at `index` of the table must hold.
    fn needed_bytes(&self, index: u64) -> u64 {
        let start = index.saturating_mul(self.geometry().cluster_size());
        self.shape().bytes.saturating_sub(start).min(self.geometry().cluster_size())
    }

    /// Calls `each` with position, file offset and raw value of the table's entries in `range`, in
    /// order. Entries in holes of the file, which are zero, are passed over: a table may be long
    /// and cost nothing.
    pub(crate) fn raw_entries(
        &self,
        range: Range<u64>,
        mut each: impl FnMut(u64, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let end = range.end.min(u64::from(self.entry.table_entries));
        let mut index = range.start;
        let mut buf = Vec::new();
        while index < end {
            let at = self.entry.table.0.saturating_add(index * 8);
            let run = self.file.run_at(at, (end - index) * 8);
            let run = run.map_err(|e| self.file.io_error("find data of the file", at, e))?;
            if run.is_hole && run.len >= 8 {
                index += run.len / 8;
                continue;
            }
            let len = run.len.next_multiple_of(8).min((end - index) * 8).min(TABLE_PIECE_BYTES);
            buf.resize(usize::try_from(len).unwrap_or(0), 0);
            self.file.read(&mut buf, at)?;
            for (raw, at) in buf.chunks_exact(8).zip((at..).step_by(8)) {
                let raw = raw.try_into().map(u64::from_be_bytes).unwrap_or_default();
                each(index, at, raw)?;
                index += 1;
            }
        }
        Ok(())
    }

    /// Decodes the entry `raw` that stands at `at` and checks that its cluster is in the file.
    pub(crate) fn decode(&self, index: u64, at: u64, raw: u64) -> Result<TableEntry, Malformed> {
        let entry = TableEntry::decode(raw, self.geometry(), at)?;
        if let TableEntry::Data(HostOffset(offset)) = entry {
            let end = offset.saturating_add(self.needed_bytes(index).max(1));
            if end > self.image.file_len {
                let (min, max) = (self.geometry().cluster_size(), self.image.file_len);
                let problem = Problem::OutOfRange { value: offset, min, max };
                return Err(Malformed::new(at, "bitmap table entry", problem));
            }
        }
        Ok(entry)
    }

    /// Calls `each` with position and decoded value of the entries in `range`, but for zeroes in
    /// holes; the first broken one is the error.
    pub(crate) fn entries(
        &self,
        range: Range<u64>,
        mut each: impl FnMut(u64, TableEntry) -> Result<()>,
    ) -> Result<()> {
        self.raw_entries(range, |index, at, raw| {
            let entry = self.decode(index, at, raw).map_err(|m| self.file.malformed(m))?;
            each(index, entry)
        })
    }

    /// The whole table. Bounded by [`MAX_BITMAP_BYTES`](crate::limits::MAX_BITMAP_BYTES): 8 MiB of
    /// entries at the smallest clusters.
    pub(crate) fn all_entries(&self) -> Result<Vec<TableEntry>> {
        let mut all = vec![TableEntry::Zeroes; self.entry.table_entries as usize];
        self.entries(0..u64::from(self.entry.table_entries), |index, entry| {
            let slot = usize::try_from(index).ok().and_then(|i| all.get_mut(i));
            slot.into_iter().for_each(|slot| *slot = entry);
            Ok(())
        })?;
        Ok(all)
    }

    /// Fills `buf` with the bytes of the bitmap from `offset` on. Bits behind the last granule and
    /// bytes behind the end are zero.
    pub(crate) fn read_bits(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        buf.fill(0);
        let size = self.geometry().cluster_size();
        let end = offset.saturating_add(buf.len() as u64).min(self.shape().bytes);
        if offset >= end {
            return Ok(());
        }
        self.entries(offset / size..end.div_ceil(size), |index, entry| {
            let start = (index * size).max(offset);
            let stop = ((index + 1) * size).min(end);
            let place = usize_range(start - offset, stop - offset);
            let Some(piece) = buf.get_mut(place) else { return Ok(()) };
            match entry {
                TableEntry::Zeroes => Ok(()),
                TableEntry::Ones => {
                    piece.fill(0xff);
                    Ok(())
                }
                TableEntry::Data(at) => self.file.read(piece, at.0 + (start - index * size)),
            }
        })?;
        self.clear_tail(offset, buf);
        Ok(())
    }

    /// Clears in `buf`, which holds the bytes from `offset` on, the bits behind the last granule.
    pub(crate) fn clear_tail(&self, offset: u64, buf: &mut [u8]) {
        let bits = self.shape().bits;
        let skipped = (bits / 8).saturating_sub(offset);
        let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
        let Some(behind) = buf.get_mut(skipped..) else { return };
        match behind.split_first_mut() {
            Some((first, rest)) if bits / 8 >= offset => {
                *first &= !(u8::MAX << (bits % 8));
                rest.fill(0);
            }
            _ => behind.fill(0),
        }
    }
}

pub(crate) fn usize_range(start: u64, end: u64) -> Range<usize> {
    usize::try_from(start).unwrap_or(usize::MAX)..usize::try_from(end).unwrap_or(usize::MAX)
}
