//! The digest of a bitmap that changes, kept up to date piece by piece.

use std::collections::BTreeMap;
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
    /// Pieces that changed since they were hashed: by leaf, one bit for each.
    stale: BTreeMap<u64, u64>,
}

impl RunningDigest {
    /// Of a bitmap without bits.
    pub(crate) fn new(shape: BitmapShape) -> Result<Self, HashError> {
        let digest = PatchedDigest::new(shape.granularity.into(), shape.bits)?;
        Ok(Self { digest, stale: BTreeMap::new() })
    }

    /// A piece has changed.
    pub(crate) fn touch(&mut self, piece: u64) {
        let pieces = self.stale.entry(piece / PIECES_PER_LEAF).or_default();
        *pieces |= 1 << (piece % PIECES_PER_LEAF);
    }

    /// How many pieces were touched and not hashed.
    pub(crate) fn stale_pieces(&self) -> u64 {
        self.stale.values().map(|pieces| u64::from(pieces.count_ones())).sum()
    }

    /// Hashes what was touched; `read` as in [`PatchedDigest::patch`]. What changes meanwhile is to
    /// be touched again.
    pub(crate) fn hash(&mut self, read: impl Fn(u64, &mut [u8])) -> Result<(), HashError> {
        for (leaf, pieces) in std::mem::take(&mut self.stale) {
            self.digest.patch(leaf, pieces, &read)?;
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
