//! How an existing image is written.

use std::sync::{PoisonError, RwLock};

use bitmap_mig::Bitmap;
use block_mig::device::{EditorSink, RawSink};
use block_mig::recheck::ReadBack;
use format_spec::Blame;
use mig_core::block::{BlockSink, Extent};
use qcow2_file::bitmaps::PersistentBitmap;
use qcow2_file::edit::Editor;

use crate::Result;

/// How an existing image is written.
pub(super) enum Sink {
    Raw(RawSink),
    /// Taken and closed when the source has let go.
    Qcow2 {
        editor: Box<RwLock<Option<Editor>>>,
        size: u64,
    },
}

impl Sink {
    pub(super) fn take(&self) -> Option<Editor> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2 { editor, .. } => {
                editor.write().unwrap_or_else(PoisonError::into_inner).take()
            }
        }
    }

    /// Bitmaps come last, so that enabled ones do not record the migration itself.
    pub(super) fn add(&self, bitmaps: &[Bitmap]) -> Result<Vec<PersistentBitmap>> {
        let stored = bitmaps.iter().map(|b| b.clone().into_stored_as(&b.name));
        let stored: Vec<PersistentBitmap> = stored.collect();
        let Self::Qcow2 { editor, .. } = self else { return Ok(stored) };
        let editor = editor.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(guard) = editor.as_ref().and_then(Editor::guard) {
            for bitmap in &stored {
                if guard.list().iter().any(|found| found.name == bitmap.name) {
                    guard.remove(&bitmap.name)?;
                }
                guard.add(bitmap.clone())?;
            }
        }
        Ok(stored)
    }

    fn with<T>(
        &self,
        operation: &'static str,
        offset: u64,
        call: impl FnOnce(&dyn ReadBack) -> mig_core::Result<T>,
    ) -> mig_core::Result<T> {
        let editor = match self {
            Self::Raw(raw) => return call(raw),
            Self::Qcow2 { editor, .. } => editor.read().unwrap_or_else(PoisonError::into_inner),
        };
        match &*editor {
            Some(editor) => call(&EditorSink::new(editor)),
            None => Err(closed(operation, offset)),
        }
    }
}

/// The source has let go, and something still comes.
fn closed(operation: &'static str, offset: u64) -> mig_core::Error {
    let source = "the image is closed".into();
    mig_core::Error::Device { operation, offset, blame: Blame::PeerBehaviour, source }
}

impl BlockSink for Sink {
    fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2 { size, .. } => *size,
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> mig_core::Result<()> {
        self.with("write", offset, |sink| sink.write_at(buf, offset))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> mig_core::Result<()> {
        self.with("write zeroes", offset, |sink| sink.write_zeroes(offset, len))
    }

    fn discard(&self, offset: u64, len: u64) -> mig_core::Result<()> {
        self.with("discard", offset, |sink| sink.discard(offset, len))
    }

    fn reads_as_zero(&self, offset: u64, len: u64) -> bool {
        self.with("look", offset, |sink| Ok(sink.reads_as_zero(offset, len))).unwrap_or(false)
    }

    fn allocation_unit(&self) -> u64 {
        self.with("look", 0, |sink| Ok(sink.allocation_unit())).unwrap_or(1)
    }

    fn flush(&self) -> mig_core::Result<()> {
        self.with("flush", 0, |sink| sink.flush())
    }

    fn sync(&self) -> mig_core::Result<()> {
        self.with("sync", 0, |sink| sink.sync())
    }
}

impl ReadBack for Sink {
    fn read_back(&self, buf: &mut [u8], offset: u64) -> mig_core::Result<()> {
        self.with("read back", offset, |sink| sink.read_back(buf, offset))
    }

    fn placed(&self, offset: u64, max_len: u64) -> mig_core::Result<Extent> {
        self.with("look", offset, |sink| sink.placed(offset, max_len))
    }
}
