//! The digest of a bitmap: its bits as a disk of their own.

use super::{BitmapDigest, DIGEST_KEY, HashError, LEAF_BYTES, Tree, hash_run};

/// Bits below one leaf of a bitmap.
const LEAF_WORDS: usize = LEAF_BYTES / 8;

/// Makes the digest of a bitmap from its bytes, in any order. What is never put is zero and costs
/// nothing. SPEC 2.
#[derive(Debug, Clone)]
pub struct DigestBuilder {
    granularity: u64,
    bits: u64,
    tree: Tree,
}

impl DigestBuilder {
    /// For a bitmap of `bits` granules of `granularity` bytes.
    pub fn new(granularity: u64, bits: u64) -> Result<Self, HashError> {
        let bytes = bits.div_ceil(64).saturating_mul(8);
        Ok(Self { granularity, bits, tree: Tree::new(bytes)? })
    }

    /// Bytes of the bitmap: whole 64-bit words.
    pub fn byte_len(&self) -> u64 {
        self.tree.size()
    }

    /// Puts bytes that stand at byte `offset`, a multiple of [`LEAF_BYTES`]: whole leaves, or up to
    /// the end. Each leaf is put once; for bitmaps that change there is
    /// [`PatchedDigest`](super::PatchedDigest). Bits beyond the last granule are taken as zero,
    /// whatever they are.
    pub fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<(), HashError> {
        let leaf = offset.checked_div(LEAF_BYTES as u64).unwrap_or_default();
        let end = offset.saturating_add(bytes.len() as u64);
        let aligned = offset.is_multiple_of(LEAF_BYTES as u64);
        let whole = end == self.byte_len() || end.is_multiple_of(LEAF_BYTES as u64);
        if !aligned || !whole || end > self.byte_len() {
            return Err(HashError::Outside {
                height: 0,
                leaf,
                leaves: super::leaf_count(self.byte_len()),
            });
        }
        let spare = end.saturating_mul(8).saturating_sub(self.bits);
        if end < self.byte_len() || spare == 0 {
            return self.put_clean(leaf, bytes);
        }
        let at = bytes.len().saturating_sub(1).checked_div(LEAF_BYTES).unwrap_or_default();
        let (head, tail) =
            bytes.split_at_checked(at.saturating_mul(LEAF_BYTES)).unwrap_or((bytes, &[]));
        let mut last = tail.to_vec();
        clear_last_bits(&mut last, spare);
        self.put_clean(leaf, head)?;
        self.put_clean(leaf.saturating_add(at as u64), &last)
    }

    /// The digest of what was put so far.
    pub fn digest(&self) -> BitmapDigest {
        let mut hasher = blake3::Hasher::new_keyed(DIGEST_KEY);
        hasher.update(&self.granularity.to_le_bytes()).update(&self.bits.to_le_bytes());
        hasher.update(&self.tree.top());
        BitmapDigest(*hasher.finalize().as_bytes())
    }

    /// The digest.
    pub fn finish(self) -> BitmapDigest {
        self.digest()
    }

    fn put_clean(&mut self, leaf: u64, bytes: &[u8]) -> Result<(), HashError> {
        for placed in hash_run(leaf, bytes, |b| b.iter().all(|b| *b == 0)) {
            self.tree.put(placed.height, placed.index, placed.node)?;
        }
        Ok(())
    }
}

/// The digest of a bitmap that stands in memory as words of which bit `n % 64` of word `n / 64` is
/// granule `n`. Words that are not there count as zero; words beyond the last granule are ignored.
pub fn bitmap_digest(
    granularity: u64,
    bits: u64,
    words: &[u64],
) -> Result<BitmapDigest, HashError> {
    let mut builder = DigestBuilder::new(granularity, bits)?;
    let needed = usize::try_from(bits.div_ceil(64)).unwrap_or(usize::MAX);
    let words = words.get(..needed).unwrap_or(words);
    let mut bytes = Vec::new();
    for (leaf, words) in (0u64..).zip(words.chunks(LEAF_WORDS)) {
        if words.iter().fold(0, |acc, w| acc | w) == 0 {
            continue;
        }
        bytes.clear();
        bytes.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        let offset = leaf.saturating_mul(LEAF_BYTES as u64);
        let room = builder.byte_len().saturating_sub(offset).min(LEAF_BYTES as u64);
        bytes.resize(usize::try_from(room).unwrap_or(LEAF_BYTES), 0);
        builder.put(offset, &bytes)?;
    }
    Ok(builder.finish())
}

/// Clears the last `count` bits of `bytes`.
fn clear_last_bits(bytes: &mut [u8], mut count: u64) {
    for byte in bytes.iter_mut().rev() {
        if count == 0 {
            break;
        }
        let here = u32::try_from(count.min(8)).unwrap_or(8);
        *byte &= 0xffu8.checked_shr(here).unwrap_or(0);
        count = count.saturating_sub(8);
    }
}
