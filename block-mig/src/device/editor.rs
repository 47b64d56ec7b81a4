//! An existing qcow2 image, written in place, as a sink.

use mig_core::Result;
use mig_core::block::BlockSink;
use qcow2_file::edit::{Editor, ZeroMode};
use qcow2_file::{GuestOffset, LayerKind};

use super::failed;
use crate::recheck::ReadBack;

/// An image that is open for writing. Whoever owns it closes it.
#[derive(Debug, Clone, Copy)]
pub struct EditorSink<'a> {
    editor: &'a Editor,
    has_backing: bool,
}

impl<'a> EditorSink<'a> {
    /// A sink that writes through `editor`.
    pub fn new(editor: &'a Editor) -> Self {
        Self { editor, has_backing: editor.header().backing_file.is_some() }
    }

    fn is_zero_extent(&self, offset: u64, max_len: u64) -> Option<u64> {
        let extent = self.editor.extent(GuestOffset(offset), max_len).ok()?;
        let is_zero = match extent.kind {
            LayerKind::Zero => true,
            LayerKind::Unallocated => !self.has_backing,
            LayerKind::Data | LayerKind::Compressed => false,
        };
        is_zero.then_some(extent.len)
    }
}

impl BlockSink for EditorSink<'_> {
    fn size(&self) -> u64 {
        self.editor.virtual_size()
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.editor.write_at(buf, GuestOffset(offset)).map_err(failed("write", offset))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let done = self.editor.write_zeroes(GuestOffset(offset), len, ZeroMode::Free);
        done.map_err(failed("write zeroes", offset))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.editor.discard(GuestOffset(offset), len).map_err(failed("discard", offset))
    }

    fn reads_as_zero(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            match self.is_zero_extent(at, end - at) {
                Some(len) => at = at.saturating_add(len),
                None => return false,
            }
        }
        true
    }

    fn allocation_unit(&self) -> u64 {
        self.editor.geometry().subcluster_size()
    }

    fn flush(&self) -> Result<()> {
        self.editor.flush().map_err(failed("flush", 0))
    }

    fn sync(&self) -> Result<()> {
        self.editor.sync().map_err(failed("sync", 0))
    }
}

impl ReadBack for EditorSink<'_> {
    fn read_back(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.editor.read_at(buf, GuestOffset(offset)).map_err(failed("read back", offset))
    }
}
