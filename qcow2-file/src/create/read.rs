//! Reading back what was written.

use super::step::Piece;
use super::{NewImage, in_memory};
use crate::error::Result;
use crate::image::{LayerExtent, LayerKind, piece_at};
use crate::layout::entry::{L2Entry, StandardEntry};
use crate::layout::units::HostOffset;
use crate::storage::StorageExt;

impl NewImage {
    /// [`NewImage::read_at`] without its gate.
    pub(super) fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        if self.is_one_to_one {
            return self.data().read(buf, at);
        }
        let g = self.geometry;
        let end = at + buf.len() as u64;
        let mut rest = buf;
        while !rest.is_empty() {
            let at = end - rest.len() as u64;
            let piece = Piece::of(at >> g.cluster_bits(), at, end, g);
            let len = in_memory(piece.len()).min(rest.len());
            let Some((part, tail)) = rest.split_at_mut_checked(len) else {
                break;
            };
            match self.map.get(piece.cluster)? {
                L2Entry::Standard(s) => self.read_standard(part, at, s)?,
                L2Entry::Compressed(c) => {
                    let content = self.decompressed(c)?;
                    let from = in_memory(piece.from);
                    part.copy_from_slice(content.get(from..from + len).unwrap_or_default());
                }
            }
            rest = tail;
        }
        Ok(())
    }

    /// [`NewImage::placed`] without its gate.
    pub(super) fn place_of(&self, at: u64, max_len: u64) -> Result<LayerExtent> {
        if self.is_one_to_one {
            let host = Some(HostOffset(at));
            return Ok(LayerExtent { len: max_len, kind: LayerKind::Data, host });
        }
        let g = self.geometry;
        let end = at.saturating_add(max_len);
        let mut found = LayerExtent { len: 0, kind: LayerKind::Unallocated, host: None };
        let mut pos = at;
        while pos < end {
            let entry = self.map.get(pos >> g.cluster_bits())?;
            let piece = piece_at(&entry, g, g.in_cluster(pos));
            let piece = LayerExtent { len: piece.len.min(end - pos), ..piece };
            if pos == at {
                found = piece;
            } else if found.joins(&piece) {
                found.len += piece.len;
            } else {
                break;
            }
            pos += piece.len.max(1);
        }
        Ok(found)
    }

    /// Reads a part of one cluster, in stretches of units that are stored alike.
    fn read_standard(&self, buf: &mut [u8], at: u64, entry: StandardEntry) -> Result<()> {
        let g = self.geometry;
        let unit = g.subcluster_size();
        let end = at + buf.len() as u64;
        let states = |at: u64| {
            let unit = g.in_cluster(at) / unit;
            let bit = |mask: u32| mask >> unit & 1 != 0;
            (bit(entry.subclusters.allocated), bit(entry.subclusters.zero))
        };
        let mut rest = buf;
        while !rest.is_empty() {
            let at = end - rest.len() as u64;
            let state = states(at);
            let mut stop = at - at % unit + unit;
            while stop < end && states(stop) == state {
                stop += unit;
            }
            let Some((part, tail)) = rest.split_at_mut_checked(in_memory(stop.min(end) - at))
            else {
                break;
            };
            match (state, entry.cluster) {
                ((true, _), Some(host)) => self.data().read(part, host.0 + g.in_cluster(at))?,
                ((false, false), _) if self.rules.has_backing => self.read_backing(part, at)?,
                _ => part.fill(0),
            }
            rest = tail;
        }
        Ok(())
    }
}
