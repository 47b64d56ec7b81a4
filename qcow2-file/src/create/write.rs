//! Guest data into host clusters.

use std::ops::Range;

use super::map::Entries;
use super::step::{Piece, WriteStep, mapped, write_step};
use super::{NewImage, in_memory};
use crate::error::Result;
use crate::layout::entry::L2Entry;
use crate::layout::units::HostOffset;
use crate::storage::{Storage, StorageExt};
use crate::zeroes::is_zero;

/// Pieces of a new cluster of this size that are all zero stay holes: the block size of the file
/// systems that images lie on.
const HOLE_BYTES: u64 = 4096;

/// A stretch of a write that goes to one place.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Guest offset.
    at: u64,
    host: u64,
    len: u64,
    /// Nothing was ever written there.
    is_virgin: bool,
}

/// Appends a run, or lets the last one grow where it continues that.
fn push(runs: &mut Vec<Run>, new: Run) {
    match runs.last_mut() {
        Some(last)
            if last.at + last.len == new.at
                && last.host + last.len == new.host
                && last.is_virgin == new.is_virgin =>
        {
            last.len += new.len;
        }
        _ => runs.push(new),
    }
}

/// Host clusters for the guest clusters of one call that have none.
#[derive(Debug)]
enum Fresh {
    /// In a data file every guest cluster has a place of its own.
    OneToOne(u32),
    /// One behind the other.
    From(u64, u64),
}

impl Fresh {
    fn take(&mut self, cluster: u64) -> HostOffset {
        match self {
            Self::OneToOne(bits) => HostOffset(cluster << *bits),
            Self::From(next, size) => {
                let host = HostOffset(*next);
                *next += *size;
                host
            }
        }
    }
}

impl NewImage {
    /// [`NewImage::write_at`] without its gate.
    pub(super) fn write(&self, buf: &[u8], at: u64) -> Result<()> {
        if self.is_one_to_one {
            return self.write_around_holes(buf, at);
        }
        let mut rest = buf;
        let mut at = at;
        while !rest.is_empty() {
            let (len, is_zero) = first_run(rest, at, self.geometry.subcluster_size());
            let (run, tail) = rest.split_at_checked(len).unwrap_or((rest, &[]));
            if is_zero {
                self.zero(at, run.len() as u64, self.rules)?;
            } else {
                self.write_data(run, at)?;
            }
            at += run.len() as u64;
            rest = tail;
        }
        Ok(())
    }

    /// Writes to a raw data file, which may hold anything, leaving the holes it has where zeroes
    /// would go.
    fn write_around_holes(&self, buf: &[u8], at: u64) -> Result<()> {
        for_each_run(buf, at, |run, at, is_zero| {
            if is_zero && self.is_known_zero(at, run.len() as u64)? {
                return Ok(());
            }
            self.data().write(run, at)
        })
    }

    fn write_data(&self, buf: &[u8], at: u64) -> Result<()> {
        let end = at + buf.len() as u64;
        let mut runs = Vec::new();
        let last = (end - 1) >> self.geometry.cluster_bits();
        let mut cluster = at >> self.geometry.cluster_bits();
        while cluster <= last {
            let stop = self.map.slice_end(cluster).min(last + 1);
            self.place(cluster..stop, at..end, &mut runs)?;
            cluster = stop;
        }
        for run in runs {
            let from = in_memory(run.at - at);
            let bytes =
                buf.get(from..).and_then(|b| b.get(..in_memory(run.len))).unwrap_or_default();
            if run.is_virgin {
                write_sparse(self.data(), bytes, run.host)?;
            } else {
                self.data().write(bytes, run.host)?;
            }
        }
        Ok(())
    }

    /// Finds or makes the places of `range` in `clusters`, which one slice maps. They are mapped
    /// before they are written, so that whoever writes beside us in the same new cluster finds it.
    fn place(&self, clusters: Range<u64>, range: Range<u64>, runs: &mut Vec<Run>) -> Result<()> {
        let g = self.geometry;
        let mut hard = Vec::new();
        self.map.with(clusters.start, &self.space, |entries| {
            let mut fresh = self.fresh(entries, clusters.clone())?;
            for cluster in clusters {
                let piece = Piece::of(cluster, range.start, range.end, g);
                let entry = entries.get(cluster)?;
                let (host, is_virgin) =
                    match write_step(entry, piece.touch(self.header.size, g), self.rules) {
                        WriteStep::InPlace(host) => (host, false),
                        WriteStep::Map(Some(host), subclusters) => {
                            entries.set(cluster, mapped(host, subclusters));
                            (host, false)
                        }
                        WriteStep::Map(None, subclusters) => {
                            let host = fresh.take(cluster);
                            entries.set(cluster, mapped(host, subclusters));
                            (host, true)
                        }
                        WriteStep::Convert => {
                            hard.push((piece, lacks_cluster(entry).then(|| fresh.take(cluster))));
                            continue;
                        }
                    };
                push(runs, self.run(piece, host, is_virgin));
            }
            Ok(())
        })?;
        for (piece, spare) in hard {
            let host = self.convert(piece, spare)?;
            push(runs, self.run(piece, host, false));
        }
        Ok(())
    }

    fn run(&self, piece: Piece, host: HostOffset, is_virgin: bool) -> Run {
        let at = piece.at(self.geometry);
        Run { at, host: host.0 + piece.from, len: piece.len(), is_virgin }
    }

    /// Contiguous host clusters for those of `clusters` that have none.
    fn fresh(&self, entries: &Entries<'_>, clusters: Range<u64>) -> Result<Fresh> {
        let bits = self.geometry.cluster_bits();
        if self.data.is_some() {
            return Ok(Fresh::OneToOne(bits));
        }
        let mut missing = 0;
        for cluster in clusters {
            missing += u64::from(lacks_cluster(entries.get(cluster)?));
        }
        let first = if missing == 0 { 0 } else { self.space.allocate(missing)?.0 };
        Ok(Fresh::From(first, 1 << bits))
    }
}

/// Writes to a place that reads as zero, leaving holes.
pub(super) fn write_sparse(file: &dyn Storage, bytes: &[u8], at: u64) -> Result<()> {
    for_each_run(bytes, at, |run, at, is_zero| if is_zero { Ok(()) } else { file.write(run, at) })
}

/// Calls `write` with each run of pieces that may be holes or not, where it stands, and whether it
/// is all zero.
fn for_each_run(
    bytes: &[u8],
    at: u64,
    mut write: impl FnMut(&[u8], u64, bool) -> Result<()>,
) -> Result<()> {
    let mut rest = bytes;
    let mut at = at;
    while !rest.is_empty() {
        let (len, is_zero) = first_run(rest, at, HOLE_BYTES);
        let (run, tail) = rest.split_at_checked(len).unwrap_or((rest, &[]));
        write(run, at, is_zero)?;
        at += run.len() as u64;
        rest = tail;
    }
    Ok(())
}

fn lacks_cluster(entry: L2Entry) -> bool {
    match entry {
        L2Entry::Compressed(_) => true,
        L2Entry::Standard(s) => s.cluster.is_none(),
    }
}

/// Bytes at the start of `buf` made of units that are all zero, or of units that are not; and
/// which. `buf` stands at `at`; units are aligned to `unit`, the first and the last one may be cut.
fn first_run(buf: &[u8], at: u64, unit: u64) -> (usize, bool) {
    let unit = in_memory(unit);
    let into_unit = in_memory(at % (unit as u64).max(1));
    let mut len = (unit - into_unit).min(buf.len());
    let kind = is_zero(buf.get(..len).unwrap_or_default());
    while let Some(next) = buf.get(len..(len + unit).min(buf.len())).filter(|n| !n.is_empty()) {
        if is_zero(next) != kind {
            break;
        }
        len += next.len();
    }
    (len, kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_follow_units() {
        let mut buf = vec![0u8; 3000];
        buf[1100] = 1;
        assert_eq!(first_run(&buf, 0, 512), (1024, true));
        assert_eq!(first_run(&buf[1024..], 1024, 512), (512, false));
        assert_eq!(first_run(&buf[1536..], 1536, 512), (1464, true));
        assert_eq!(first_run(&buf, 100, 512), (412 + 512, true));
        assert_eq!(first_run(&buf, 0, 4096), (3000, false));
    }
}
