//! A new qcow2 image as a sink.

use std::ops::Deref;

use mig_core::Result;
use mig_core::block::{BlockSink, CompressedUnit, Extent};
use qcow2_file::GuestOffset;
use qcow2_file::create::NewImage;

use super::{compression_type, failed, layer_extent};
use crate::recheck::ReadBack;

/// A qcow2 image that is being made, borrowed or shared. Whoever owns it finishes it.
#[derive(Debug, Clone, Copy)]
pub struct NewImageSink<I>(pub I);

impl<I: Deref<Target = NewImage> + Send + Sync> BlockSink for NewImageSink<I> {
    fn size(&self) -> u64 {
        self.0.virtual_size()
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, GuestOffset(offset)).map_err(failed("write", offset))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.write_zeroes(GuestOffset(offset), len).map_err(failed("write zeroes", offset))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.0.discard(GuestOffset(offset), len).map_err(failed("discard", offset))
    }

    fn reads_as_zero(&self, offset: u64, len: u64) -> bool {
        self.0.reads_as_zero(GuestOffset(offset), len)
    }

    fn allocation_unit(&self) -> u64 {
        self.0.geometry().subcluster_size()
    }

    fn write_compressed(&self, offset: u64, unit: CompressedUnit, bytes: &[u8]) -> Result<bool> {
        let kind = compression_type(unit.compression);
        let stored = self.0.write_compressed(GuestOffset(offset), kind, unit.len, bytes);
        stored.map_err(failed("write compressed data", offset))
    }

    fn flush(&self) -> Result<()> {
        self.0.flush().map_err(failed("flush", 0))
    }

    fn sync(&self) -> Result<()> {
        self.0.sync().map_err(failed("sync", 0))
    }
}

impl<I: Deref<Target = NewImage> + Send + Sync> ReadBack for NewImageSink<I> {
    fn read_back(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, GuestOffset(offset)).map_err(failed("read back", offset))
    }

    fn placed(&self, offset: u64, max_len: u64) -> Result<Extent> {
        let found = self.0.placed(GuestOffset(offset), max_len);
        Ok(layer_extent(found.map_err(failed("look up", offset))?))
    }
}
