//! Turning units into data where what surrounds the write must be brought along or cleared.
//!
//! # Who may change an entry, and when
//!
//! Entries change under the lock of their slice. Beside that, one rule makes concurrent writers in
//! one cluster safe: **a unit becomes data either out of nothing (unallocated, no backing file, a
//! place that reads as zero), or under the stripe lock of its cluster.** In the first case the host
//! bytes are right before anyone writes them, so any number of writers may follow at once. In the
//! second case (compressed, marked zero with a host cluster behind it, over a backing file, or in a
//! data file that held something before) the unit's host bytes must first be made what the guest
//! reads; whoever does that owns the unit, because nobody else can make it data meanwhile, and data
//! is written only where the entry says data. Once a unit is data, it is written without any lock.
//!
//! A guest cluster keeps its host cluster for good. So a writer that was overtaken by a zero still
//! writes into the cluster it looked up, where the zero mark hides it, and whoever lifts the mark
//! clears the unit first.

use super::step::{Piece, Touch, becoming_data, mapped};
use super::write::write_sparse;
use super::{NewImage, in_memory};
use crate::error::{Error, Result};
use crate::layout::entry::{L2Entry, StandardEntry, Subclusters};
use crate::layout::units::{GuestOffset, HostOffset};
use crate::storage::StorageExt;

impl NewImage {
    /// Makes the units that `piece` touches data, with the guest's content around it, and answers
    /// with their host cluster. `spare` is a new host cluster for a guest cluster without one.
    pub(super) fn convert(&self, piece: Piece, spare: Option<HostOffset>) -> Result<HostOffset> {
        let _alone = self.stripe(piece.cluster);
        let touch = piece.touch(self.header.size, self.geometry);
        let mut spare = spare;
        loop {
            let entry = self.map.get(piece.cluster)?;
            let known = match entry {
                L2Entry::Standard(s) if touch.any & !s.subclusters.allocated == 0 => s.cluster,
                _ => None,
            };
            if let Some(host) = known {
                return Ok(host);
            }
            let (host, new) = self.converted(piece.cluster, entry, touch, &mut spare)?;
            if self.map.replace(piece.cluster, &self.space, (entry, new))? {
                return Ok(host);
            }
        }
    }

    /// The entry with the touched units as data, after their surroundings were put in place. Takes
    /// the spare cluster if it needs it: a second try must not find what the first one wrote.
    fn converted(
        &self,
        cluster: u64,
        entry: L2Entry,
        touch: Touch,
        spare: &mut Option<HostOffset>,
    ) -> Result<(HostOffset, L2Entry)> {
        match entry {
            L2Entry::Compressed(c) => {
                let host = self.new_cluster(cluster, spare.take())?;
                if touch.whole != u32::MAX {
                    let content = self.decompressed(c)?;
                    self.write_new(&content, host.0)?;
                }
                Ok((host, mapped(host, Subclusters::DATA)))
            }
            L2Entry::Standard(s) => {
                let host = match s.cluster {
                    Some(host) => host,
                    None => self.new_cluster(cluster, spare.take())?,
                };
                let need = touch.any & !s.subclusters.allocated;
                self.surround(cluster, s, host, need & !touch.whole)?;
                Ok((host, mapped(host, becoming_data(s, need))))
            }
        }
    }

    fn new_cluster(&self, cluster: u64, spare: Option<HostOffset>) -> Result<HostOffset> {
        match spare {
            Some(host) => Ok(host),
            None if self.data.is_some() => Ok(HostOffset(cluster << self.geometry.cluster_bits())),
            None => self.space.allocate(1),
        }
    }

    /// Puts into `units` of the host cluster what the guest reads there.
    fn surround(
        &self,
        cluster: u64,
        entry: StandardEntry,
        host: HostOffset,
        units: u32,
    ) -> Result<()> {
        let g = self.geometry;
        let size = g.subcluster_size();
        let is_clear = entry.cluster.is_none() && self.rules.is_virgin;
        let count = g.cluster_size() / size;
        for unit in (0..count).filter(|unit| units >> unit & 1 != 0) {
            let is_zero = entry.subclusters.zero >> unit & 1 != 0;
            let place = host.0 + unit * size;
            if self.rules.has_backing && !is_zero {
                self.copy_up((cluster << g.cluster_bits()) + unit * size, place)?;
            } else if !is_clear {
                self.clear(place, size)?;
            }
        }
        Ok(())
    }

    /// Writes to a new cluster, leaving holes where that may be done.
    fn write_new(&self, bytes: &[u8], host: u64) -> Result<()> {
        let data = self.data();
        if self.rules.is_virgin { write_sparse(data, bytes, host) } else { data.write(bytes, host) }
    }

    /// Copies one unit from the backing file.
    fn copy_up(&self, at: u64, host: u64) -> Result<()> {
        let unit = self.geometry.subcluster_size();
        let mut buf = vec![0; in_memory(unit)];
        let inside = in_memory(self.header.size.saturating_sub(at).min(unit));
        self.read_backing(buf.get_mut(..inside).unwrap_or_default(), at)?;
        self.data().write(&buf, host)
    }

    /// Reads what shines through.
    pub(super) fn read_backing(&self, buf: &mut [u8], at: u64) -> Result<()> {
        match &self.backing {
            Some(reader) => reader.read_at(buf, GuestOffset(at)),
            None => Err(Error::Refused {
                file: self.file.name(),
                reason: format!(
                    "the content at guest offset {at} is in the backing file, which was not given"
                ),
            }),
        }
    }
}
