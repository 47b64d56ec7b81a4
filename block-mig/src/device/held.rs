//! What a disk holds itself, above a base.

use mig_core::Result;
use mig_core::block::{BlockSource, Extent};

/// A disk whose extents are those of [`BlockSource::held`]: what its base decides is a hole.
#[derive(Clone, Copy)]
pub struct HeldSource<'a>(pub &'a dyn BlockSource);

impl BlockSource for HeldSource<'_> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<Extent> {
        self.0.held(offset, max_len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
}
