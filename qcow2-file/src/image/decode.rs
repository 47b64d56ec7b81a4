//! Compressed clusters back into guest bytes, with reused contexts. qcow2 spec, "Compressed
//! Clusters Descriptor".

use std::sync::{Mutex, PoisonError};

use flate2::{Decompress, FlushDecompress, Status};
use zstd::zstd_safe::{self, DCtx};

use crate::layout::header::CompressionType;

/// Decoders not in use, for both compression types. As many come to exist as threads decode at the
/// same time.
#[derive(Default)]
pub(crate) struct Decoders {
    deflate: Mutex<Vec<Decoder>>,
    zstd: Mutex<Vec<Decoder>>,
}

impl std::fmt::Debug for Decoders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoders").finish_non_exhaustive()
    }
}

/// A context and the buffers that go with it.
pub(crate) struct Decoder {
    codec: Codec,
    /// Stored bytes of the cluster at hand.
    pub(crate) stored: Vec<u8>,
    /// Decoded bytes, for callers who want only a part of them.
    pub(crate) content: Vec<u8>,
}

enum Codec {
    Deflate(Box<Decompress>),
    Zstd(DCtx<'static>),
}

/// What a decoder found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decoded {
    /// The stream ended where the cluster is full; it took this many bytes.
    Exact(usize),
    /// The cluster is full, but the stream goes on. QEMU takes that as good.
    Full,
}

impl Decoders {
    /// Runs `work` with a decoder of its own.
    pub(crate) fn with<T>(
        &self,
        compression: CompressionType,
        work: impl FnOnce(&mut Decoder) -> T,
    ) -> T {
        let idle = match compression {
            CompressionType::Zlib => &self.deflate,
            CompressionType::Zstd => &self.zstd,
        };
        let found = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut decoder = found.unwrap_or_else(|| Decoder::new(compression));
        let result = work(&mut decoder);
        idle.lock().unwrap_or_else(PoisonError::into_inner).push(decoder);
        result
    }
}

impl Decoder {
    fn new(compression: CompressionType) -> Self {
        let codec = match compression {
            CompressionType::Zlib => Codec::Deflate(Box::new(Decompress::new(false))),
            CompressionType::Zstd => Codec::Zstd(DCtx::create()),
        };
        Self { codec, stored: Vec::new(), content: Vec::new() }
    }

    /// Decodes `self.stored` into `out`, which is exactly one cluster. `None` when the bytes do not
    /// decode to at least that much.
    pub(crate) fn decode_into(&mut self, out: &mut [u8]) -> Option<Decoded> {
        decode(&mut self.codec, &self.stored, out)
    }

    /// Decodes `self.stored` into `self.content`.
    pub(crate) fn decode_inside(&mut self, cluster_size: usize) -> Option<Decoded> {
        self.content.resize(cluster_size, 0);
        decode(&mut self.codec, &self.stored, &mut self.content)
    }
}

fn decode(codec: &mut Codec, stored: &[u8], out: &mut [u8]) -> Option<Decoded> {
    match codec {
        Codec::Deflate(context) => inflate(context, stored, out),
        Codec::Zstd(context) => unzstd(context, stored, out),
    }
}

fn inflate(context: &mut Decompress, stored: &[u8], out: &mut [u8]) -> Option<Decoded> {
    context.reset(false);
    // All input and all room are given at once, so one call does all it can.
    let status = context.decompress(stored, out, FlushDecompress::Finish).ok()?;
    if context.total_out() != out.len() as u64 {
        return None;
    }
    let consumed = usize::try_from(context.total_in()).ok()?;
    Some(if status == Status::StreamEnd { Decoded::Exact(consumed) } else { Decoded::Full })
}

/// Frame by frame, so that no window is allocated whatever the frame header asks for, and the
/// padding behind the last frame is never looked at.
fn unzstd(context: &mut DCtx<'static>, stored: &[u8], out: &mut [u8]) -> Option<Decoded> {
    let (mut used, mut filled) = (0, 0);
    while filled < out.len() {
        let rest = stored.get(used..)?;
        let frame_len = zstd_safe::find_frame_compressed_size(rest).ok().filter(|len| *len > 0)?;
        let frame = rest.get(..frame_len)?;
        filled += context.decompress(out.get_mut(filled..)?, frame).ok()?;
        used += frame_len;
    }
    Some(Decoded::Exact(used))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::DeflateEncoder};

    use super::*;

    fn run(compression: CompressionType, stored: &[u8], len: usize) -> (Option<Decoded>, Vec<u8>) {
        let decoders = Decoders::default();
        let mut out = vec![0xee; len];
        let found = decoders.with(compression, |d| {
            d.stored.extend_from_slice(stored);
            d.decode_into(&mut out)
        });
        (found, out)
    }

    fn sample() -> Vec<u8> {
        (0..4096u32).flat_map(|n| (n / 3 * 7).to_le_bytes()).collect()
    }

    #[test]
    fn consumed_length_is_exact_whatever_follows() {
        let plain = sample();
        let mut deflate = DeflateEncoder::new(Vec::new(), Compression::default());
        deflate.write_all(&plain).unwrap();
        let deflated = deflate.finish().unwrap();
        let zstd = zstd::bulk::compress(&plain, 3).unwrap();
        for (kind, bytes) in [(CompressionType::Zlib, deflated), (CompressionType::Zstd, zstd)] {
            for slack in [&[][..], &[0; 100], &[0xff; 511]] {
                let stored = [bytes.as_slice(), slack].concat();
                let (found, out) = run(kind, &stored, plain.len());
                assert_eq!(found, Some(Decoded::Exact(bytes.len())), "{kind:?}");
                assert_eq!(out, plain);
            }
            assert_eq!(run(kind, &bytes, plain.len() + 1).0, None, "too short for the cluster");
            for cut in 0..bytes.len() {
                let found = run(kind, &bytes[..cut], plain.len()).0;
                assert!(matches!(found, None | Some(Decoded::Full)), "{kind:?} cut at {cut}");
            }
        }
    }
}
