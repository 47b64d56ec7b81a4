//! A bitmap in memory.

use format_spec::content_hash::{BitmapDigest, DigestBuilder, HashError, LEAF_BYTES};
use mig_core::bitmap::BitmapInfo;
use qcow2_file::bitmaps::{Bitmaps, Bits, Entry, PersistentBitmap, State};

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
    /// Its digest. SPEC 2. Costs what the leaves take that have bits.
    pub fn digest(&self) -> Result<BitmapDigest, HashError> {
        let mut digest = DigestBuilder::new(1 << self.granularity_bits, self.bits.len())?;
        let mut bytes = vec![0; LEAF_BYTES];
        for leaf in self.bits.blocks(LEAF_BYTES as u64 * 8) {
            let offset = leaf.saturating_mul(LEAF_BYTES as u64);
            let len = self.bits.byte_len().saturating_sub(offset).min(LEAF_BYTES as u64);
            bytes.resize(usize::try_from(len).unwrap_or(LEAF_BYTES), 0);
            self.bits.read_bytes(offset, &mut bytes);
            digest.put(offset, &bytes)?;
        }
        Ok(digest.finish())
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
