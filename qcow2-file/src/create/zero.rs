//! Zeroes and discards.

use std::ops::Range;

use super::step::{Piece, Rules, ZeroStep, mapped, zero_step};
use super::{NewImage, zero_out};
use crate::error::Result;
use crate::layout::entry::{L2Entry, Subclusters};
use crate::storage::StorageExt;

impl NewImage {
    /// [`NewImage::write_zeroes`] without its gate. `rules` are the image's own but for a discard.
    pub(super) fn zero(&self, at: u64, len: u64, rules: Rules) -> Result<()> {
        if self.is_one_to_one {
            return self.clear(at, len);
        }
        let Some(last) = len.checked_sub(1).map(|n| (at + n) >> self.geometry.cluster_bits())
        else {
            return Ok(());
        };
        let mut cluster = at >> self.geometry.cluster_bits();
        while cluster <= last {
            let is_nothing = !rules.has_backing && self.map.is_untouched(cluster);
            let (stop, is_nothing) = if is_nothing {
                (self.map.table_end(cluster), true)
            } else {
                (self.map.slice_end(cluster), false)
            };
            let stop = stop.min(last + 1);
            if !is_nothing {
                self.zero_clusters(cluster..stop, at..at + len, rules)?;
            }
            cluster = stop;
        }
        Ok(())
    }

    /// Zeroes the part of `range` that lies in `clusters`, which one slice maps.
    fn zero_clusters(&self, clusters: Range<u64>, range: Range<u64>, rules: Rules) -> Result<()> {
        let g = self.geometry;
        let mut clears: Vec<Range<u64>> = Vec::new();
        let mut hard = Vec::new();
        let mut holes = Vec::new();
        self.map.with(clusters.start, &self.space, |entries| {
            for cluster in clusters {
                let piece = Piece::of(cluster, range.start, range.end, g);
                let entry = entries.get(cluster)?;
                match zero_step(entry, piece.touch(self.header.size, g), rules) {
                    ZeroStep::Set(new, clear) => {
                        new.into_iter().for_each(|new| entries.set(cluster, new));
                        if let Some(host) = clear {
                            push(&mut clears, host.0 + piece.from..host.0 + piece.to);
                        }
                    }
                    ZeroStep::MapHole if self.map.is_fresh() => {
                        let host = self.space.allocate(1)?;
                        entries.set(cluster, mapped(host, Subclusters::DATA));
                    }
                    ZeroStep::MapHole => holes.push(cluster),
                    ZeroStep::Convert => hard.push(piece),
                }
            }
            Ok(())
        })?;
        // Only now: where an entry says zero, the bytes behind it do not count any more.
        clears.into_iter().try_for_each(|r| self.clear(r.start, r.end - r.start))?;
        holes.into_iter().try_for_each(|cluster| self.map_zeroes(cluster))?;
        hard.into_iter().try_for_each(|piece| {
            let host = self.convert(piece, None)?;
            self.clear(host.0 + piece.from, piece.len())
        })
    }

    /// [`ZeroStep::MapHole`] where new clusters do not read as zero.
    fn map_zeroes(&self, cluster: u64) -> Result<()> {
        let whole = Piece { cluster, from: 0, to: self.geometry.cluster_size() };
        let host = self.convert(whole, None)?;
        self.clear(host.0, whole.len())
    }

    /// Makes a range of the file that holds data read as zero.
    pub(super) fn clear(&self, host: u64, len: u64) -> Result<()> {
        zero_out(self.data(), host, len)
    }

    /// [`NewImage::discard`] without its gate: units inside the range become zero where they are
    /// stored, and what is not stored stays as it is.
    pub(super) fn forget(&self, at: u64, len: u64) -> Result<()> {
        let unit = self.geometry.subcluster_size();
        let end = at + len;
        let is_at_end = end == self.header.size;
        let start = at.next_multiple_of(unit);
        let stop = if is_at_end { end } else { end - end % unit };
        if start >= stop {
            return Ok(());
        }
        if self.is_one_to_one {
            let data = self.data();
            let discarded = data.discard(start, stop - start);
            return discarded.map_err(|e| data.io_error("discard", start, e));
        }
        self.zero(start, stop - start, Rules { has_backing: false, ..self.rules })
    }

    /// [`NewImage::uncover`] without its gate. What the clusters had taken stays unused.
    pub(super) fn unmap(&self, at: u64, len: u64) -> Result<()> {
        let (bits, end) = (self.geometry.cluster_bits(), at + len);
        if self.is_one_to_one {
            return self.clear(at, len);
        }
        let mut cluster = at.next_multiple_of(self.geometry.cluster_size()) >> bits;
        let last =
            if end == self.header.size { self.geometry.clusters_for(end) } else { end >> bits };
        while cluster < last {
            if self.map.is_untouched(cluster) {
                cluster = self.map.table_end(cluster);
                continue;
            }
            let stop = self.map.slice_end(cluster).min(last);
            self.map.with(cluster, &self.space, |entries| {
                (cluster..stop).for_each(|c| entries.set(c, L2Entry::UNALLOCATED));
                Ok(())
            })?;
            cluster = stop;
        }
        Ok(())
    }

    /// [`NewImage::reads_as_zero`] with its errors.
    pub(super) fn is_known_zero(&self, at: u64, len: u64) -> Result<bool> {
        if self.is_one_to_one {
            let data = self.data();
            let run = data.run_at(at, len).map_err(|e| data.io_error("find holes", at, e))?;
            return Ok(run.is_hole && run.len >= len);
        }
        let end = at + len;
        let last = (end - 1) >> self.geometry.cluster_bits();
        let mut cluster = at >> self.geometry.cluster_bits();
        while cluster <= last {
            if self.map.is_untouched(cluster) {
                if self.rules.has_backing {
                    return Ok(false);
                }
                cluster = self.map.table_end(cluster);
                continue;
            }
            let stop = self.map.slice_end(cluster).min(last + 1);
            let are_zero = self.map.with(cluster, &self.space, |entries| {
                let mut clusters = cluster..stop;
                clusters.try_fold(true, |all, c| {
                    Ok(all
                        && self
                            .entry_is_zero(entries.get(c)?, Piece::of(c, at, end, self.geometry)))
                })
            })?;
            if !are_zero {
                return Ok(false);
            }
            cluster = stop;
        }
        Ok(true)
    }

    fn entry_is_zero(&self, entry: L2Entry, piece: Piece) -> bool {
        let L2Entry::Standard(s) = entry else {
            return false;
        };
        let any = piece.touch(self.header.size, self.geometry).any;
        let zero =
            if self.rules.has_backing { s.subclusters.zero } else { !s.subclusters.allocated };
        any & !zero == 0
    }
}

fn push(ranges: &mut Vec<Range<u64>>, new: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == new.start => last.end = new.end,
        _ => ranges.push(new),
    }
}
