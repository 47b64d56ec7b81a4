//! The digest of a bitmap that changes, kept up to date leaf by leaf.

use format_spec::content_hash::{BitmapDigest, DigestBuilder, HashError};
use format_spec::native::block::{BitmapShape, PIECE_BYTES};
use mig_core::dirty::{AtomicBits, CHUNK_BYTES};

/// Pieces of a bitmap in one leaf of its digest.
const PIECES_PER_LEAF: u64 = CHUNK_BYTES / PIECE_BYTES as u64;

/// A digest that costs only what changed since it was last asked for.
#[derive(Debug)]
pub(crate) struct RunningDigest {
    builder: DigestBuilder,
    /// Leaves that changed since they were hashed.
    stale: AtomicBits,
}

impl RunningDigest {
    /// Of a bitmap without bits.
    pub(crate) fn new(shape: BitmapShape) -> Result<Self, HashError> {
        Ok(Self {
            builder: DigestBuilder::replaceable(shape.granularity.into(), shape.bits)?,
            stale: AtomicBits::new(shape.piece_count().div_ceil(PIECES_PER_LEAF)),
        })
    }

    /// A piece has changed.
    pub(crate) fn touch(&self, piece: u64) {
        let leaf = piece / PIECES_PER_LEAF;
        self.stale.set_range(leaf..leaf.saturating_add(1));
    }

    /// Whether something was touched and not hashed.
    pub(crate) fn is_stale(&self) -> bool {
        self.stale.next_run(0, 1).is_some()
    }

    /// Hashes what was touched. What changes meanwhile is to be touched again.
    pub(crate) fn hash(&mut self, bits: &AtomicBits) -> Result<(), HashError> {
        let mut bytes = Vec::new();
        let mut from = 0;
        while let Some(leaf) = self.stale.take_run(from, 1) {
            from = leaf.end;
            let offset = leaf.start.saturating_mul(CHUNK_BYTES);
            read_chunk(bits, offset, &mut bytes);
            self.builder.put(offset, &bytes)?;
        }
        Ok(())
    }

    /// The digest of what was hashed.
    pub(crate) fn digest(&self) -> BitmapDigest {
        self.builder.digest()
    }
}

/// The bytes of `bits` from `offset` on, up to [`CHUNK_BYTES`] or the end.
pub(crate) fn read_chunk(bits: &AtomicBits, offset: u64, bytes: &mut Vec<u8>) {
    let len = bits.byte_len().saturating_sub(offset).min(CHUNK_BYTES);
    bytes.resize(usize::try_from(len).unwrap_or(0), 0);
    bits.read_bytes(offset, bytes);
}
