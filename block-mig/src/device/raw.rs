//! A raw file or block device as a sink.

use std::sync::Arc;

use mig_core::Result;
use mig_core::block::{BlockSink, Extent, ExtentKind};
use qcow2_file::Storage;

use super::storage_failed;
use crate::recheck::ReadBack;

/// What file systems allocate, and the smallest zero run worth leaving out.
const PAGE_BYTES: u64 = 4096;

/// The guest's bytes at their own offsets.
#[derive(Debug, Clone)]
pub struct RawSink {
    storage: Arc<dyn Storage>,
    size: u64,
}

impl RawSink {
    /// A disk of `size` bytes at the start of `storage`, which is at least that long.
    pub fn new(storage: Arc<dyn Storage>, size: u64) -> Self {
        Self { storage, size }
    }
}

impl BlockSink for RawSink {
    fn size(&self) -> u64 {
        self.size
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.storage.write_at(buf, offset).map_err(storage_failed("write", offset))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.storage.write_zeroes(offset, len).map_err(storage_failed("write zeroes", offset))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.storage.discard(offset, len).map_err(storage_failed("discard", offset))
    }

    fn reads_as_zero(&self, offset: u64, len: u64) -> bool {
        if len == 0 {
            return true;
        }
        self.storage.run_at(offset, len).is_ok_and(|run| run.is_hole && run.len >= len)
    }

    fn allocation_unit(&self) -> u64 {
        PAGE_BYTES
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.storage.sync().map_err(storage_failed("sync", 0))
    }
}

impl ReadBack for RawSink {
    fn read_back(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.storage.read_at(buf, offset).map_err(storage_failed("read back", offset))
    }

    fn placed(&self, offset: u64, max_len: u64) -> Result<Extent> {
        Ok(Extent { len: max_len, kind: ExtentKind::Data, host: Some(offset) })
    }
}
