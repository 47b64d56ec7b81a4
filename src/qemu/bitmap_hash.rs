//! QEMU's own hash of a bitmap's bits.

use qcow2_file::bitmaps::Bits;
use sha2::{Digest, Sha256};

/// Bytes that are hashed at once.
const PIECE_BYTES: usize = 4096;

/// The hash that the QMP command `x-debug-block-dirty-bitmap-sha256` of a 64-bit little-endian QEMU
/// answers for the same bits: SHA-256 of the words of the lowest level, of which an empty disk has
/// one. In hexadecimal digits.
pub fn bitmap_sha256(bits: &Bits) -> String {
    let mut hasher = Sha256::new();
    let mut piece = [0; PIECE_BYTES];
    let mut left = bits.byte_len().max(8);
    let mut offset = 0u64;
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(PIECE_BYTES);
        let piece = piece.get_mut(..len).unwrap_or_default();
        bits.read_bytes(offset, piece);
        hasher.update(&*piece);
        offset = offset.saturating_add(len as u64);
        left = left.saturating_sub(len as u64);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of eight zero bytes, as `sha256sum` says.
    const EIGHT_ZEROES: &str = "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc";

    #[test]
    fn whole_words_are_hashed() {
        assert_eq!(bitmap_sha256(&Bits::new(0)), EIGHT_ZEROES);
        assert_eq!(bitmap_sha256(&Bits::new(64)), EIGHT_ZEROES);
        assert_ne!(bitmap_sha256(&Bits::new(65)), EIGHT_ZEROES);
        let mut bits = Bits::new(1);
        bits.set_range(0..1);
        // `printf '\1\0\0\0\0\0\0\0' | sha256sum`.
        let one = "7c9fa136d4413fa6173637e883b6998d32e1d675f88cddff9dcbcf331820f4b8";
        assert_eq!(bitmap_sha256(&bits), one);
    }

    #[test]
    fn long_bitmaps_are_hashed_in_pieces() {
        let mut bits = Bits::new(8 * PIECE_BYTES as u64 + 64);
        bits.set_range(8 * PIECE_BYTES as u64..8 * PIECE_BYTES as u64 + 1);
        let mut bytes = vec![0u8; PIECE_BYTES + 8];
        bytes[PIECE_BYTES] = 1;
        let whole: String =
            Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(bitmap_sha256(&bits), whole);
    }
}
