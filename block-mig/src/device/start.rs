//! The start of a disk.

use mig_core::Result;
use mig_core::block::{BlockSource, CompressedUnit, Extent};

/// The first bytes of a disk that is longer, as a disk.
#[derive(Clone, Copy)]
pub struct StartOf<'a> {
    /// The whole disk.
    pub disk: &'a dyn BlockSource,
    /// How much of it counts: a multiple of 512, at most its size.
    pub size: u64,
}

impl BlockSource for StartOf<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<Extent> {
        self.disk.extent(offset, max_len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.disk.read_at(buf, offset)
    }

    fn read_compressed(&self, offset: u64, out: &mut Vec<u8>) -> Result<Option<CompressedUnit>> {
        self.disk.read_compressed(offset, out)
    }
}
