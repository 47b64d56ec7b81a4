//! Writing a new image, append-only: data first, metadata last, the header made valid last of all.
//!
//! Nothing here can corrupt an image, since until [`NewImage::finish`] the file has none: its first
//! cluster stays zero. What this module does not do: write into an image that exists (see `edit`),
//! create or rename files.

mod options;

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::layout::geometry::Geometry;
use crate::layout::header::{CompressionType, Header};
use crate::layout::units::GuestOffset;
use crate::storage::Storage;

pub use options::{Backing, BackingReader, CreateOptions, DataFile};

/// A qcow2 image that is being made. All methods may be called from any thread at any time.
///
/// Two writes of overlapping ranges at the same time leave one or the other in each sector. After an
/// error other than [`Error::Refused`] for its arguments the image cannot be finished.
#[derive(Debug)]
pub struct NewImage {
    file: Arc<dyn Storage>,
    header: Header,
}

impl NewImage {
    /// Starts an image in `file`, which must be empty: that what is not written reads as zero is
    /// what makes this writer fast. Nothing but the length of the file changes before the first
    /// write.
    pub fn create(file: Arc<dyn Storage>, options: &CreateOptions) -> Result<Self> {
        options.check(&file.name())?;
        let header = options.header(&file.name())?;
        Ok(Self { file, header })
    }

    /// Virtual size in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.header.size
    }

    /// Cluster arithmetic.
    pub fn geometry(&self) -> Geometry {
        self.header.geometry()
    }

    /// Writes all of `buf` at any alignment. Units that are all zero are stored as zeroes are, not as
    /// data. With a backing file and no reader for it, a unit that is not written yet must be
    /// covered whole (the end of the disk completes the last one).
    pub fn write_at(&self, _buf: &[u8], _at: GuestOffset) -> Result<()> {
        Err(self.not_yet())
    }

    /// Makes the range read as zero. The rule of [`write_at`](Self::write_at) for units covered in
    /// part holds here too.
    pub fn write_zeroes(&self, _at: GuestOffset, _len: u64) -> Result<()> {
        Err(self.not_yet())
    }

    /// Gives up the content of the units that lie in the range whole; it reads as anything
    /// afterwards.
    pub fn discard(&self, _at: GuestOffset, _len: u64) -> Result<()> {
        Err(self.not_yet())
    }

    /// Whether the range is known to read as zero now. `false` means "not known".
    pub fn reads_as_zero(&self, _at: GuestOffset, _len: u64) -> bool {
        false
    }

    /// Stores a compressed cluster as it is: `bytes` are exactly what its decoder consumes and decode
    /// to `cluster_size` bytes. `false`, and nothing is changed, where this image cannot hold it in
    /// that form (other cluster size or compression type, an external data file, a cluster that is
    /// stored as data already): the caller then writes the content.
    pub fn write_compressed(
        &self,
        _at: GuestOffset,
        _compression: CompressionType,
        _cluster_size: u64,
        _bytes: &[u8],
    ) -> Result<bool> {
        Err(self.not_yet())
    }

    /// Reads what was written. Fails where the backing file would have to be read and no reader was
    /// given.
    pub fn read_at(&self, _buf: &mut [u8], _at: GuestOffset) -> Result<()> {
        Err(self.not_yet())
    }

    /// Hands buffered tables to the system. Not durable, and the image is not valid before
    /// [`finish`](Self::finish).
    pub fn flush(&self) -> Result<()> {
        Err(self.not_yet())
    }

    /// Makes everything written before durable. The image is still not valid.
    pub fn sync(&self) -> Result<()> {
        self.flush()
    }

    fn not_yet(&self) -> Error {
        Error::Unsupported { file: self.file.name(), feature: "writing a new image".into() }
    }
}
