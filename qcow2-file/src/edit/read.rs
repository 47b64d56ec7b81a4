//! Reading guest data of an image that is being written, and what is where.

use super::Editor;
use super::ranges::Mode;
use crate::error::Result;
use crate::image::{LayerExtent, LayerKind, piece_at};
use crate::in_memory;
use crate::layout::entry::L2Entry;
use crate::layout::units::GuestOffset;
use crate::storage::StorageExt;

impl Editor {
    /// Fills `buf` with what the guest reads at `at`, the backing disk included. Never short; the
    /// range must lie inside the disk.
    pub fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<()> {
        let range = self.inside(at, buf.len() as u64)?;
        self.refuse_poisoned()?;
        let mut rest = buf;
        let mut at = range.start;
        while at < range.end {
            let end = self.step_end(at, range.end);
            let (step, left) = rest.split_at_mut(in_memory(end - at).min(rest.len()));
            self.read_step(step, at)?;
            (rest, at) = (left, end);
        }
        Ok(())
    }

    /// Reads inside one L2 table.
    fn read_step(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let range = at..at.saturating_add(buf.len() as u64);
        let _range = self.ranges.lock(self.clusters_around(&range), Mode::Shared);
        let mut rest = buf;
        let mut at = at;
        for (extent, compressed) in self.extents(at, range.end)? {
            let len = in_memory(extent.len).min(rest.len());
            let (piece, left) = rest.split_at_mut(len);
            match (extent.kind, extent.host) {
                (LayerKind::Data, Some(host)) => self.data.read(piece, host.0)?,
                (LayerKind::Compressed, _) => self.read_compressed(piece, at, compressed)?,
                (LayerKind::Unallocated, _) => match &self.backing {
                    Some(backing) => backing.read_at(piece, GuestOffset(at))?,
                    None => piece.fill(0),
                },
                _ => piece.fill(0),
            }
            (rest, at) = (left, at + len as u64);
        }
        Ok(())
    }

    fn read_compressed(&self, buf: &mut [u8], at: u64, entry: L2Entry) -> Result<()> {
        let L2Entry::Compressed(entry) = entry else { return Ok(()) };
        let size = in_memory(self.geometry.cluster_size());
        if buf.len() == size {
            return self.decompress(entry, buf);
        }
        let mut cluster = vec![0; size];
        self.decompress(entry, &mut cluster)?;
        let into = in_memory(self.geometry.in_cluster(at));
        if let Some(part) = cluster.get(into..into + buf.len()) {
            buf.copy_from_slice(part);
        }
        Ok(())
    }

    /// How the range from `at` reads in this layer: one extent of at most `max_len` bytes, which
    /// must not be zero, with its place in the file that holds guest data. Neighbours may be
    /// alike. What is unallocated reads as the backing disk, or zero. True until somebody writes.
    pub fn extent(&self, at: GuestOffset, max_len: u64) -> Result<LayerExtent> {
        let end = at.0.saturating_add(max_len).min(self.virtual_size());
        if at.0 >= end {
            return Ok(LayerExtent { len: max_len, kind: LayerKind::Unallocated, host: None });
        }
        self.refuse_poisoned()?;
        let range = at.0..self.step_end(at.0, end);
        // Where the file has holes is asked below: the cluster must not be freed before.
        let _range = self.ranges.lock(self.clusters_around(&range), Mode::Shared);
        let extents = self.extents(range.start, range.end)?;
        let nothing = LayerExtent { len: 1, kind: LayerKind::Unallocated, host: None };
        let found = extents.first().map_or(nothing, |(extent, _)| *extent);
        let (LayerKind::Data, Some(host)) = (found.kind, found.host) else { return Ok(found) };
        let run = self.data.run_at(host.0, found.len);
        let run = run.map_err(|e| self.data.io_error("find holes", host.0, e))?;
        let kind = if run.is_hole { LayerKind::Zero } else { LayerKind::Data };
        Ok(LayerExtent { len: run.len.clamp(1, found.len), kind, ..found })
    }

    /// The extents of a range inside one table, merged; compressed clusters stay single and come
    /// with their entry.
    fn extents(&self, at: u64, end: u64) -> Result<Vec<(LayerExtent, L2Entry)>> {
        let mut found: Vec<(LayerExtent, L2Entry)> = Vec::new();
        if self.tables.is_empty_at(GuestOffset(at)) {
            let extent = LayerExtent { len: end - at, kind: LayerKind::Unallocated, host: None };
            return Ok(vec![(extent, L2Entry::UNALLOCATED)]);
        }
        let table = self.table(GuestOffset(at))?;
        let (_, entries) = self.entries_of(&table, &(at..end))?;
        let mut at = at;
        for entry in entries {
            let cluster_end = self.geometry.cluster_start(at) + self.geometry.cluster_size();
            let stop = cluster_end.min(end);
            while at < stop {
                let mut piece = piece_at(&entry, self.geometry, self.geometry.in_cluster(at));
                piece.len = piece.len.min(stop - at);
                at += piece.len;
                match found.last_mut() {
                    Some((last, _)) if last.joins(&piece) && last.kind != LayerKind::Compressed => {
                        last.len += piece.len;
                    }
                    _ => found.push((piece, entry)),
                }
            }
        }
        Ok(found)
    }
}
