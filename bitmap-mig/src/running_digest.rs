//! The digest of a bitmap that changes, kept up to date piece by piece.

use std::ops::Range;

use format_spec::content_hash::{BitmapDigest, HashError, Node, PATCH_BYTES, PatchedDigest};
use format_spec::native::block::{BitmapShape, PIECE_BYTES};
use mig_core::dirty::{AtomicBits, CHUNK_BYTES};
use mig_core::stream::{Error, Result};

/// Pieces of a bitmap in one leaf of its digest: as many as a word has bits.
const PIECES_PER_LEAF: u64 = CHUNK_BYTES / PIECE_BYTES as u64;
const _: () = assert!(PIECES_PER_LEAF == 64 && PIECE_BYTES == PATCH_BYTES);

/// A digest that costs only what changed since it was last asked for.
#[derive(Debug)]
pub(crate) struct RunningDigest {
    digest: PatchedDigest,
    /// Pieces that changed since they were hashed.
    stale: AtomicBits,
}

impl RunningDigest {
    /// Of a bitmap without bits.
    pub(crate) fn new(shape: BitmapShape) -> Result<Self, HashError> {
        let digest = PatchedDigest::new(shape.granularity.into(), shape.bits)?;
        Ok(Self { digest, stale: AtomicBits::new(shape.piece_count()) })
    }

    /// A piece has changed.
    pub(crate) fn touch(&self, piece: u64) {
        self.stale.set_range(piece..piece.saturating_add(1));
    }

    /// How many pieces were touched and not hashed.
    pub(crate) fn stale_pieces(&self) -> u64 {
        self.stale.count()
    }

    /// Hashes what was touched; `read` as in [`PatchedDigest::patch`]. What changes meanwhile is to
    /// be touched again.
    pub(crate) fn hash(&mut self, read: impl Fn(u64, &mut [u8])) -> Result<(), HashError> {
        if self.stale_pieces() == 0 {
            return Ok(());
        }
        let mut from = 0;
        while let Some(piece) = self.stale.next_run(from, 1) {
            let leaf = piece.start / PIECES_PER_LEAF;
            let (first, mut chunks) = (leaf * PIECES_PER_LEAF, [0; 8]);
            from = first + PIECES_PER_LEAF;
            self.stale.read_bytes(first / 8, &mut chunks);
            self.stale.clear_range(first..from);
            self.digest.patch(leaf, u64::from_le_bytes(chunks), &read)?;
        }
        self.digest.digest();
        Ok(())
    }

    /// The leaves that are not zero with their nodes, in rising order, of what was hashed.
    pub(crate) fn leaves(&self) -> Vec<(u64, Node)> {
        self.digest.leaves().collect()
    }

    /// The digest of what was hashed.
    pub(crate) fn digest(&mut self) -> BitmapDigest {
        self.digest.digest()
    }
}

/// The pieces of a leaf that a peer names, of a bitmap that has so many.
pub(crate) fn pieces_of(leaf: u64, pieces: u64) -> Result<Range<u64>> {
    match leaf.checked_mul(PIECES_PER_LEAF).filter(|first| *first < pieces) {
        Some(first) => Ok(first..first.saturating_add(PIECES_PER_LEAF).min(pieces)),
        None => Err(Error::protocol(0, 0, format!("it has leaf {leaf} of a shorter bitmap"))),
    }
}

/// The bytes of `bits` from `offset` on, up to [`CHUNK_BYTES`] or the end.
pub(crate) fn read_chunk(bits: &AtomicBits, offset: u64, bytes: &mut Vec<u8>) {
    let len = bits.byte_len().saturating_sub(offset).min(CHUNK_BYTES);
    bytes.resize(usize::try_from(len).unwrap_or(0), 0);
    bits.read_bytes(offset, bytes);
}
