//! Content of one layer, straight into the caller's buffer.

use format_spec::{Malformed, Problem};

use super::decode::{Decoded, Decoder};
use super::map::LayerKind;
use super::{DataFile, Image};
use crate::error::Result;
use crate::layout::entry::CompressedEntry;
use crate::layout::header::CompressionType;
use crate::layout::units::GuestOffset;
use crate::storage::StorageExt;

/// A compressed cluster as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressedCluster {
    /// How it is compressed.
    pub compression: CompressionType,
    /// Guest bytes it stands for: one cluster, also at the end of the disk.
    pub cluster_size: u64,
}

impl Image {
    /// Fills `buf` with this layer's content from `at`. Never short. What is not allocated in this
    /// layer, and what lies beyond its end, reads as zero.
    pub fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<()> {
        let (mut rest, mut at) = (buf, at);
        while !rest.is_empty() {
            let found = self.mapped(at, rest.len() as u64)?;
            let len = usize::try_from(found.len).unwrap_or(usize::MAX).clamp(1, rest.len());
            let (piece, tail) = rest.split_at_mut(len);
            match (found.kind, found.host) {
                (LayerKind::Data, Some(host)) => self.data_file()?.read(piece, host.0)?,
                (LayerKind::Compressed, _) => self.read_decoded(piece, at)?,
                _ => piece.fill(0),
            }
            rest = tail;
            at = GuestOffset(at.0.saturating_add(len as u64));
        }
        Ok(())
    }

    /// Where a compressed cluster starts at `at`: appends its stored bytes, exactly those that a
    /// decoder consumes, to `stored`. `None`, and nothing is appended, where there is none, or one
    /// that must not be passed on as it is; its content is then read as any other.
    ///
    /// How many bytes a decoder consumes is known only after decoding. Whoever needs the content as
    /// well reads it first: what was found then is remembered for a while.
    pub fn read_compressed(
        &self,
        at: GuestOffset,
        stored: &mut Vec<u8>,
    ) -> Result<Option<CompressedCluster>> {
        let (compression, g) = (self.header.compression_type, self.geometry);
        let found = CompressedCluster { compression, cluster_size: g.cluster_size() };
        if g.in_cluster(at.0) != 0 || at.0 >= self.virtual_size() {
            return Ok(None);
        }
        let Some(entry) = self.compressed_at(at)? else { return Ok(None) };
        if let Some(len) = self.shared.lengths.find(self.layer, entry) {
            let old_len = stored.len();
            stored.resize(old_len.saturating_add(len), 0);
            let room = stored.get_mut(old_len..).unwrap_or_default();
            return match self.file.read(room, entry.offset.0) {
                Ok(()) => Ok(Some(found)),
                Err(e) => {
                    stored.truncate(old_len);
                    Err(e)
                }
            };
        }
        self.shared.decoders.with(self.header.compression_type, |decoder| {
            let content_len = self.cluster_len();
            let decoded = self.decode(decoder, entry, |d| d.decode_inside(content_len))?;
            let Decoded::Exact(len) = decoded else { return Ok(None) };
            let Some(used) = decoder.stored.get(..len) else { return Ok(None) };
            stored.extend_from_slice(used);
            Ok(Some(found))
        })
    }

    /// Fills `buf` from a run of compressed clusters.
    fn read_decoded(&self, buf: &mut [u8], at: GuestOffset) -> Result<()> {
        let (mut rest, mut at) = (buf, at);
        while !rest.is_empty() {
            let into = self.geometry.in_cluster(at.0);
            let left = usize::try_from(self.geometry.cluster_size() - into).unwrap_or(usize::MAX);
            let (piece, tail) = rest.split_at_mut(left.min(rest.len()));
            let cluster = GuestOffset(at.0 - into);
            if piece.len() == self.cluster_len() {
                self.decode_whole(piece, cluster)?;
            } else {
                self.decode_part(piece, cluster, usize::try_from(into).unwrap_or(0))?;
            }
            at = GuestOffset(at.0.saturating_add(piece.len() as u64));
            rest = tail;
        }
        Ok(())
    }

    fn decode_whole(&self, out: &mut [u8], cluster: GuestOffset) -> Result<()> {
        let Some(entry) = self.compressed_at(cluster)? else {
            out.fill(0);
            return Ok(());
        };
        self.shared.decoders.with(self.header.compression_type, |decoder| {
            self.decode(decoder, entry, |d| d.decode_into(out))?;
            Ok(())
        })
    }

    fn decode_part(&self, out: &mut [u8], cluster: GuestOffset, into: usize) -> Result<()> {
        let part = |content: &[u8], out: &mut [u8]| {
            if let Some(source) = content.get(into..into.saturating_add(out.len())) {
                out.copy_from_slice(source);
            }
        };
        if let Some(content) = self.shared.recent.find(self.layer, cluster) {
            part(&content, out);
            return Ok(());
        }
        let Some(entry) = self.compressed_at(cluster)? else {
            out.fill(0);
            return Ok(());
        };
        self.shared.decoders.with(self.header.compression_type, |decoder| {
            self.decode(decoder, entry, |d| d.decode_inside(self.cluster_len()))?;
            part(&decoder.content, out);
            self.shared.recent.keep(self.layer, cluster, &decoder.content);
            Ok(())
        })
    }

    /// Reads the sectors of a compressed cluster, at most two clusters by the width of the field,
    /// and has them decoded.
    fn decode(
        &self,
        decoder: &mut Decoder,
        entry: CompressedEntry,
        work: impl FnOnce(&mut Decoder) -> Option<Decoded>,
    ) -> Result<Decoded> {
        debug_assert!(matches!(self.data, DataFile::Inside), "refused by check_inside");
        let len = usize::try_from(entry.max_bytes()).unwrap_or(usize::MAX);
        decoder.stored.resize(len.min(2 * self.cluster_len() + 512), 0);
        self.file.read(&mut decoder.stored, entry.offset.0)?;
        let Some(decoded) = work(decoder) else {
            let problem = Problem::Other("does not decode to one cluster");
            let what = Malformed::new(entry.offset.0, "compressed cluster", problem);
            return Err(self.file.malformed(what));
        };
        if let Decoded::Exact(len) = decoded {
            self.shared.lengths.keep(self.layer, entry, len);
        }
        Ok(decoded)
    }

    fn cluster_len(&self) -> usize {
        1 << self.geometry.cluster_bits()
    }
}
