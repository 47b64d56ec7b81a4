//! Content of one layer, straight into the caller's buffer.

use std::sync::{Arc, Mutex, PoisonError};

use format_spec::{Malformed, Problem};

use super::decode::{Decoded, Decoder};
use super::map::LayerKind;
use super::{DataFile, Image};
use crate::error::{Error, Result};
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

/// The last compressed cluster that somebody read a part of. Who reads in small pieces in order
/// decodes each cluster once.
#[derive(Debug, Default)]
pub(super) struct RecentCluster(Mutex<Option<(GuestOffset, Arc<[u8]>)>>);

impl RecentCluster {
    fn find(&self, cluster: GuestOffset) -> Option<Arc<[u8]>> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.as_ref().filter(|(at, _)| *at == cluster).map(|(_, content)| content.clone())
    }

    fn keep(&self, cluster: GuestOffset, content: &[u8]) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((cluster, content.into()));
    }

    pub(super) fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
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
    pub fn read_compressed(
        &self,
        at: GuestOffset,
        stored: &mut Vec<u8>,
    ) -> Result<Option<CompressedCluster>> {
        self.pass_on(at, stored, None)
    }

    /// [`read_compressed`](Self::read_compressed), and the content of the same cluster into
    /// `content`, which is one cluster long, for a caller who needs both: decoding is the dearer part.
    pub fn read_compressed_and_content(
        &self,
        at: GuestOffset,
        stored: &mut Vec<u8>,
        content: &mut [u8],
    ) -> Result<Option<CompressedCluster>> {
        self.pass_on(at, stored, Some(content))
    }

    fn pass_on(
        &self,
        at: GuestOffset,
        stored: &mut Vec<u8>,
        content: Option<&mut [u8]>,
    ) -> Result<Option<CompressedCluster>> {
        let cluster_size = self.geometry.cluster_size();
        if self.geometry.in_cluster(at.0) != 0 || at.0 >= self.virtual_size() {
            return Ok(None);
        }
        let Some(entry) = self.compressed_at(at)? else { return Ok(None) };
        let size = self.cluster_len();
        self.decoders.with(|decoder| {
            self.fetch(decoder, entry)?;
            let decoded = match content {
                Some(content) if content.len() == size => decoder.decode_into(content),
                _ => decoder.decode_inside(size),
            };
            let Decoded::Exact(len) = decoded.ok_or_else(|| self.undecodable(entry))? else {
                return Ok(None);
            };
            let Some(used) = decoder.stored.get(..len) else { return Ok(None) };
            stored.extend_from_slice(used);
            let compression = self.header.compression_type;
            Ok(Some(CompressedCluster { compression, cluster_size }))
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
        self.decoders.with(|decoder| {
            self.fetch(decoder, entry)?;
            decoder.decode_into(out).ok_or_else(|| self.undecodable(entry))?;
            Ok(())
        })
    }

    fn decode_part(&self, out: &mut [u8], cluster: GuestOffset, into: usize) -> Result<()> {
        let part = |content: &[u8], out: &mut [u8]| {
            if let Some(source) = content.get(into..into.saturating_add(out.len())) {
                out.copy_from_slice(source);
            }
        };
        if let Some(content) = self.recent.find(cluster) {
            part(&content, out);
            return Ok(());
        }
        let Some(entry) = self.compressed_at(cluster)? else {
            out.fill(0);
            return Ok(());
        };
        self.decoders.with(|decoder| {
            self.fetch(decoder, entry)?;
            decoder.decode_inside(self.cluster_len()).ok_or_else(|| self.undecodable(entry))?;
            part(&decoder.content, out);
            self.recent.keep(cluster, &decoder.content);
            Ok(())
        })
    }

    /// Reads the sectors of a compressed cluster: at most two clusters, by the width of the field.
    fn fetch(&self, decoder: &mut Decoder, entry: CompressedEntry) -> Result<()> {
        debug_assert!(matches!(self.data, DataFile::Inside), "refused by check_inside");
        let len = usize::try_from(entry.max_bytes()).unwrap_or(usize::MAX);
        decoder.stored.resize(len.min(2 * self.cluster_len() + 512), 0);
        self.file.read(&mut decoder.stored, entry.offset.0)
    }

    fn undecodable(&self, entry: CompressedEntry) -> Error {
        let problem = Problem::Other("does not decode to one cluster");
        self.file.malformed(Malformed::new(entry.offset.0, "compressed cluster", problem))
    }

    fn cluster_len(&self) -> usize {
        1 << self.geometry.cluster_bits()
    }
}
