//! Named dirty bitmaps as a mover sees them.

use crate::error::Result;

/// What is known of a bitmap besides its bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Name, unique on its disk.
    pub name: String,
    /// Guest bytes per bit: a power of two from 512 to 2 GiB.
    pub granularity: u64,
    /// Whether new writes are recorded ("recording" in QEMU, `auto` on disk).
    pub is_enabled: bool,
    /// Whether it is kept with the disk when the disk is closed.
    pub is_persistent: bool,
    /// Whether its content is not to be trusted (`in_use` found at open). Only removable.
    pub is_inconsistent: bool,
}

/// The bitmaps of one disk. Bits travel as bytes: bit `n` is granule `n`, in byte `n / 8`, least
/// significant first; bits beyond the disk are zero.
pub trait BitmapStore: Send + Sync {
    /// All bitmaps in the store's order.
    fn list(&self) -> Result<Vec<BitmapInfo>>;

    /// Reads `buf.len()` bytes of the bitmap's bits from byte `offset`. Bytes beyond the last
    /// granule's word are zero. Fails for an inconsistent bitmap.
    fn read_bits(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Creates a bitmap with all bits clear, in the state *loading*: it records what the guest
    /// writes from now on if it is enabled, and is not valid on disk until
    /// [`store`](BitmapStore::store). Fails if the name exists.
    fn create(&self, info: &BitmapInfo) -> Result<()>;

    /// Replaces bytes of a loading bitmap's transferred content. May come in any order and again.
    fn put_bits(&self, name: &str, offset: u64, bits: &[u8]) -> Result<()>;

    /// Ends loading: what the guest wrote meanwhile is merged in and the bitmap is usable.
    fn seal(&self, name: &str) -> Result<()>;

    /// Makes all sealed persistent bitmaps valid on disk, durably.
    fn store(&self) -> Result<()>;

    /// Marks a bitmap as not to be trusted, durably.
    fn invalidate(&self, name: &str) -> Result<()>;

    /// Removes a bitmap.
    fn remove(&self, name: &str) -> Result<()>;
}

/// Number of granules of a disk of `size` bytes.
pub fn granules(size: u64, granularity: u64) -> u64 {
    size.div_ceil(granularity.max(1))
}
