//! Where the content of a new disk goes.

use block_mig::device::{NewImageSink, RawSink};
use block_mig::recheck::ReadBack;
use mig_core::block::{BlockSink, CompressedUnit, Extent};
use mig_core::{Blame, Error, Result};
use qcow2_file::create::NewImage;

/// A new disk of either format, as a sink that owns it.
#[derive(Debug)]
pub(crate) enum Sink {
    /// A qcow2 image that is being made.
    Image(Box<NewImage>),
    /// A raw file.
    Raw(RawSink),
    /// A disk of so many bytes that is complete.
    Closed(u64),
}

impl Sink {
    /// The image, where it is one.
    pub(crate) fn image(&self) -> Option<&NewImage> {
        match self {
            Self::Image(image) => Some(image),
            Self::Raw(_) | Self::Closed(_) => None,
        }
    }

    fn with<T>(&self, f: impl FnOnce(&dyn ReadBack) -> T) -> T {
        match self {
            Self::Image(image) => f(&NewImageSink(&**image)),
            Self::Raw(raw) => f(raw),
            Self::Closed(size) => f(&Closed(*size)),
        }
    }
}

impl BlockSink for Sink {
    fn size(&self) -> u64 {
        self.with(|sink| sink.size())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.with(|sink| sink.write_at(buf, offset))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.with(|sink| sink.write_zeroes(offset, len))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.with(|sink| sink.discard(offset, len))
    }

    fn reads_as_zero(&self, offset: u64, len: u64) -> bool {
        self.with(|sink| sink.reads_as_zero(offset, len))
    }

    fn allocation_unit(&self) -> u64 {
        self.with(|sink| sink.allocation_unit())
    }

    fn write_compressed(&self, offset: u64, unit: CompressedUnit, bytes: &[u8]) -> Result<bool> {
        self.with(|sink| sink.write_compressed(offset, unit, bytes))
    }

    fn flush(&self) -> Result<()> {
        self.with(|sink| sink.flush())
    }

    fn sync(&self) -> Result<()> {
        self.with(|sink| sink.sync())
    }
}

impl ReadBack for Sink {
    fn read_back(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.with(|sink| sink.read_back(buf, offset))
    }

    fn placed(&self, offset: u64, max_len: u64) -> Result<Extent> {
        self.with(|sink| sink.placed(offset, max_len))
    }
}

/// Takes nothing more.
#[derive(Debug)]
pub(crate) struct Closed(pub(crate) u64);

impl Closed {
    fn refuse<T>(operation: &'static str, offset: u64) -> Result<T> {
        let source = "the disk is complete since an earlier attempt".into();
        Err(Error::Device { operation, offset, blame: Blame::PeerBehaviour, source })
    }
}

impl BlockSink for Closed {
    fn size(&self) -> u64 {
        self.0
    }

    fn write_at(&self, _buf: &[u8], offset: u64) -> Result<()> {
        Self::refuse("write", offset)
    }

    fn write_zeroes(&self, offset: u64, _len: u64) -> Result<()> {
        Self::refuse("write zeroes", offset)
    }

    fn discard(&self, offset: u64, _len: u64) -> Result<()> {
        Self::refuse("discard", offset)
    }

    fn reads_as_zero(&self, _offset: u64, _len: u64) -> bool {
        false
    }

    fn allocation_unit(&self) -> u64 {
        mig_core::block::SECTOR_BYTES
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

impl ReadBack for Closed {
    fn read_back(&self, _buf: &mut [u8], offset: u64) -> Result<()> {
        Self::refuse("read back", offset)
    }
}
