//! The content of a cluster that is written in part: what was there, and the new bytes over it.

use std::ops::Range;

use format_spec::{Malformed, Problem};

use super::Editor;
use super::entries::{units_covered, units_touched};
use crate::error::Result;
use crate::in_memory;
use crate::layout::entry::{CompressedEntry, L2Entry};
use crate::layout::units::GuestOffset;
use crate::storage::StorageExt;

/// From this size on a cluster's zeroes are left to the file system rather than written.
const SPARSE_CLUSTER_BYTES: u64 = 128 << 10;

/// Part of a cluster, ready to be written.
#[derive(Debug)]
pub(super) struct Composed {
    /// A whole cluster.
    bytes: Vec<u8>,
    /// Units of it that are to be written.
    pub(super) units: u32,
    /// Everything outside this range of the units to be written is zero.
    content: Range<usize>,
}

impl Editor {
    /// Puts together what must be written to the host cluster of guest cluster `cluster` for a
    /// write of `data` from byte `into` of it on. `moves`: the host cluster is another one than
    /// before, so everything that stood in the old one comes along.
    pub(super) fn compose(
        &self,
        (cluster, entry): (GuestOffset, &L2Entry),
        (into, data): (u64, &[u8]),
        moves: bool,
    ) -> Result<Composed> {
        let g = self.geometry;
        let end = into.saturating_add(data.len() as u64);
        let touched = units_touched(g, into, end);
        let covered = units_covered(g, into, end);
        let mut bytes = vec![0; in_memory(g.cluster_size())];
        let (mut units, mut content) = (touched, in_memory(into)..in_memory(end));
        match entry {
            L2Entry::Compressed(compressed) => {
                self.decompress(*compressed, &mut bytes)?;
                (units, content) = (u32::MAX, 0..bytes.len());
            }
            L2Entry::Standard(standard) => {
                let stored = standard.subclusters.allocated;
                units |= if moves { stored } else { 0 };
                for (mask, unit) in self.each_unit(units & !covered) {
                    if stored & mask != 0 {
                        let host = standard.cluster.map_or(0, |h| h.0);
                        self.fill(&mut bytes, &unit, |buf| self.data.read(buf, host + unit.start))?;
                    } else if let (0, Some(backing)) =
                        (standard.subclusters.zero & mask, &self.backing)
                    {
                        let at = GuestOffset(cluster.0 + unit.start);
                        self.fill(&mut bytes, &unit, |buf| backing.read_at(buf, at))?;
                    } else {
                        continue;
                    }
                    content.start = content.start.min(in_memory(unit.start));
                    content.end = content.end.max(in_memory(unit.end));
                }
            }
        }
        if let Some(slot) = bytes.get_mut(in_memory(into)..in_memory(end)) {
            slot.copy_from_slice(data);
        }
        Ok(Composed { bytes, units, content })
    }

    fn fill(
        &self,
        bytes: &mut [u8],
        unit: &Range<u64>,
        read: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        bytes.get_mut(in_memory(unit.start)..in_memory(unit.end)).map_or(Ok(()), read)
    }

    /// Writes the units of `composed` to the host cluster at `host`.
    pub(super) fn write_composed(&self, composed: &Composed, host: u64) -> Result<()> {
        let Composed { bytes, units, content } = composed;
        let is_sparse = self.geometry.cluster_size() >= SPARSE_CLUSTER_BYTES;
        let mut rest = self.each_unit(*units).peekable();
        while let Some((_, mut run)) = rest.next() {
            while let Some((_, next)) = rest.next_if(|(_, next)| next.start == run.end) {
                run.end = next.end;
            }
            // An external data file is as long as the disk, and no longer.
            let end = if self.has_data_file() { self.virtual_size() - host } else { run.end };
            let mut run = in_memory(run.start)..in_memory(run.end.min(end).max(run.start));
            if is_sparse {
                let kept =
                    content.start.clamp(run.start, run.end)..content.end.clamp(run.start, run.end);
                self.zero_host(host + run.start as u64, kept.start - run.start)?;
                self.zero_host(host + kept.end as u64, run.end - kept.end)?;
                run = kept;
            }
            let part = bytes.get(run.clone()).unwrap_or_default();
            self.data.write(part, host + run.start as u64)?;
        }
        Ok(())
    }

    fn zero_host(&self, at: u64, len: usize) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let done = self.data.write_zeroes(at, len as u64);
        done.map_err(|e| self.data.io_error("write zeroes", at, e))
    }

    /// The units of a mask and their ranges in the cluster.
    fn each_unit(&self, mask: u32) -> impl Iterator<Item = (u32, Range<u64>)> + use<> {
        let unit = self.geometry.subcluster_size();
        let has_subclusters = self.geometry.has_subclusters();
        let count = if has_subclusters { u32::BITS } else { 1 };
        let bit = move |n: u32| if has_subclusters { 1 << n } else { u32::MAX };
        let range = move |n: u32| u64::from(n) * unit..u64::from(n + 1) * unit;
        (0..count).map(move |n| (bit(n), range(n))).filter(move |(bit, _)| mask & bit != 0)
    }

    /// Decodes a compressed cluster into `out`, one cluster long.
    pub(super) fn decompress(&self, entry: CompressedEntry, out: &mut [u8]) -> Result<()> {
        self.decoders.with(self.header.compression_type, |decoder| {
            decoder.stored.resize(in_memory(entry.max_bytes()), 0);
            self.file.read(&mut decoder.stored, entry.offset.0)?;
            decoder.decode_into(out).map(|_| ()).ok_or_else(|| {
                let problem = Problem::Other("does not decode to one cluster");
                let what = Malformed::new(entry.offset.0, "compressed cluster", problem);
                self.file.malformed(what)
            })
        })
    }
}
