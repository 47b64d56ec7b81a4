//! Compressed clusters: stored as they come, decoded where a write needs what is in them.

use super::{NewImage, in_memory};
use crate::error::{Error, Result};
use crate::layout::entry::{CompressedEntry, L2Entry};
use crate::layout::header::CompressionType;
use crate::storage::StorageExt;

impl NewImage {
    /// [`NewImage::write_compressed`] without its gate; the offset and the form have been checked.
    pub(super) fn store_compressed(&self, cluster: u64, bytes: &[u8]) -> Result<bool> {
        if has_host_cluster(self.map.get(cluster)?) {
            return Ok(false);
        }
        let host = self.space.pack(bytes.len() as u64)?;
        let Some(new) = CompressedEntry::covering(host, bytes.len() as u64, self.geometry) else {
            return Ok(false);
        };
        // Written before it is mapped: whoever converts the cluster decodes what is mapped.
        self.file.write(bytes, host.0)?;
        self.map.with(cluster, &self.space, |entries| {
            let is_free = !has_host_cluster(entries.get(cluster)?);
            if is_free {
                entries.set(cluster, L2Entry::Compressed(new));
            }
            Ok(is_free)
        })
    }

    /// Whether a compressed cluster of this form can stand in this image as it is.
    pub(super) fn holds(
        &self,
        compression: CompressionType,
        cluster_size: u64,
        len: usize,
    ) -> bool {
        self.data.is_none()
            && compression == self.header.compression_type
            && cluster_size == self.geometry.cluster_size()
            && (1..cluster_size).contains(&(len as u64))
    }

    /// The content of a compressed cluster.
    pub(super) fn decompressed(&self, entry: CompressedEntry) -> Result<Vec<u8>> {
        let len = entry.max_bytes().min(2 * self.geometry.cluster_size());
        let mut content = vec![0; in_memory(self.geometry.cluster_size())];
        let decoded = self.decoders.with(self.header.compression_type, |decoder| {
            decoder.stored.resize(in_memory(len), 0);
            self.file.read(&mut decoder.stored, entry.offset.0)?;
            Ok(decoder.decode_into(&mut content))
        })?;
        decoded.map(|_| content).ok_or_else(|| Error::Refused {
            file: self.file.name(),
            reason: format!(
                "the compressed cluster stored at offset {} does not decode, so a part of it \
                 cannot be written",
                entry.offset
            ),
        })
    }
}

fn has_host_cluster(entry: L2Entry) -> bool {
    matches!(entry, L2Entry::Standard(s) if s.cluster.is_some())
}
