//! A bitmap in memory.

use format_spec::content_hash::{BitmapDigest, HashError};
use format_spec::native::block::{BitmapShape, PIECE_BYTES};
use mig_core::bitmap::BitmapInfo;
use qcow2_file::bitmaps::{Bitmaps, Bits, Entry, PersistentBitmap, State};

use crate::running_digest::RunningDigest;

/// A consistent bitmap with its bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Name, 1 to 1023 bytes.
    pub name: String,
    /// log2 of the guest bytes per bit.
    pub granularity_bits: u8,
    /// Whether new writes are recorded.
    pub is_enabled: bool,
    /// One bit per granule of the disk.
    pub bits: Bits,
}

impl Bitmap {
    /// Its digest. SPEC 2. Costs what holds bits.
    pub fn digest(&self) -> Result<BitmapDigest, HashError> {
        let granularity = 1u32.checked_shl(self.granularity_bits.into()).unwrap_or(0);
        let shape = BitmapShape { granularity, bits: self.bits.len() };
        let mut digest = RunningDigest::new(shape)?;
        self.bits.blocks(PIECE_BYTES as u64 * 8).for_each(|piece| digest.touch(piece));
        digest.hash(|offset, bytes| self.bits.read_bytes(offset, bytes))?;
        Ok(digest.digest())
    }

    /// The same bitmap under another name, as an image stores it.
    pub fn into_stored_as(self, name: &str) -> PersistentBitmap {
        PersistentBitmap {
            name: name.to_owned(),
            granularity_bits: self.granularity_bits,
            is_enabled: self.is_enabled,
            bits: self.bits,
        }
    }
}

/// As an image stores it.
impl From<PersistentBitmap> for Bitmap {
    fn from(stored: PersistentBitmap) -> Self {
        let PersistentBitmap { name, granularity_bits, is_enabled, bits } = stored;
        Self { name, granularity_bits, is_enabled, bits }
    }
}

/// Loads a consistent bitmap of an image.
pub fn load(bitmaps: &Bitmaps, name: &str) -> qcow2_file::Result<Bitmap> {
    let entry = bitmaps.find(name)?;
    let (granularity_bits, is_enabled) = (entry.granularity_bits(), entry.is_enabled());
    Ok(Bitmap { name: name.to_owned(), granularity_bits, is_enabled, bits: bitmaps.load(name)? })
}

/// What an image's directory says of a bitmap. One that uses what is not known here counts as
/// inconsistent: it cannot be used either.
pub fn summary(entry: &Entry) -> BitmapInfo {
    BitmapInfo {
        name: entry.name().to_owned(),
        granularity: entry.granularity(),
        is_enabled: entry.is_enabled(),
        is_persistent: true,
        is_inconsistent: entry.state != State::Consistent,
    }
}

#[cfg(test)]
mod tests {
    use format_spec::content_hash::bitmap_digest;

    use super::*;

    #[test]
    fn the_digest_is_that_of_all_bits() {
        // Half a leaf, one that is full, and a tail.
        let len = 3 * 524_288 + 777;
        for (step, run) in [(u64::MAX, 0), (len - 1, 1), (70_000, 3), (9_000, 1), (1_000, 999)] {
            let mut bits = Bits::new(len);
            let starts = (0..len).step_by(usize::try_from(step.min(len)).unwrap());
            starts.for_each(|start| bits.set_range(start..start + run));
            let mut words = vec![0; usize::try_from(len.div_ceil(64)).unwrap()];
            bits.runs()
                .flatten()
                .for_each(|n| words[usize::try_from(n / 64).unwrap()] |= 1 << (n % 64));
            let expected = bitmap_digest(65536, len, &words).unwrap();
            let bitmap =
                Bitmap { name: "b".to_owned(), granularity_bits: 16, is_enabled: true, bits };
            assert_eq!(bitmap.digest().unwrap(), expected, "{step} {run}");
        }
    }
}
