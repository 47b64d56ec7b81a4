//! A raw file or device as a layer.

use std::sync::Arc;

use crate::error::Result;
use crate::image::{LayerExtent, LayerKind};
use crate::layout::units::{GuestOffset, HostOffset};
use crate::storage::{Storage, StorageExt};

/// A raw file or device. Its holes read as zero, and so does everything beyond its end.
#[derive(Debug)]
pub struct RawLayer {
    file: Arc<dyn Storage>,
    virtual_size: u64,
}

impl RawLayer {
    /// Takes a file as it is. A length that is no multiple of 512 is rounded up (SPEC 2).
    pub fn open(file: Arc<dyn Storage>) -> Result<Self> {
        let virtual_size = file.length()?.checked_next_multiple_of(512).unwrap_or(!511);
        Ok(Self { file, virtual_size })
    }

    /// Guest-visible size in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// The file.
    pub fn file(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    pub(super) fn extent(&self, at: GuestOffset, max_len: u64) -> Result<LayerExtent> {
        let run = self.file.run(at.0, max_len)?;
        let kind = if run.is_hole { LayerKind::Zero } else { LayerKind::Data };
        Ok(LayerExtent { kind, len: run.len, ..self.whole(at, max_len) })
    }

    /// All of it as data, without asking for holes.
    pub(super) fn whole(&self, at: GuestOffset, max_len: u64) -> LayerExtent {
        LayerExtent { len: max_len, kind: LayerKind::Data, host: Some(HostOffset(at.0)) }
    }

    pub(super) fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<()> {
        self.file.read(buf, at.0)
    }
}
