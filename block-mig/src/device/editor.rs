//! An existing qcow2 image, written in place: as a sink, and as the disk of a running guest.

use mig_core::Result;
use mig_core::block::{BlockSink, BlockSource, Extent, ExtentKind};
use qcow2_file::edit::{Editor, ZeroMode};
use qcow2_file::{GuestOffset, LayerKind};

use super::{failed, layer_extent};
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

    fn placed(&self, offset: u64, max_len: u64) -> Result<Extent> {
        let found = self.editor.extent(GuestOffset(offset), max_len);
        let found = layer_extent(found.map_err(failed("look up", offset))?);
        // What a backing file decides has its place elsewhere.
        let is_elsewhere = self.has_backing && found.kind == ExtentKind::Hole;
        let kind = if is_elsewhere { ExtentKind::Data } else { found.kind };
        Ok(Extent { kind, ..found })
    }
}

/// An image that a guest reads and writes.
#[derive(Debug)]
pub struct EditorDisk {
    editor: Editor,
}

impl EditorDisk {
    /// The disk that `editor` writes. Its backing file, if it has one, is read through it.
    pub fn new(editor: Editor) -> Self {
        Self { editor }
    }

    /// The editor.
    pub fn editor(&self) -> &Editor {
        &self.editor
    }

    /// The editor, to be closed.
    pub fn into_editor(self) -> Editor {
        self.editor
    }

    fn sink(&self) -> EditorSink<'_> {
        EditorSink::new(&self.editor)
    }
}

impl BlockSource for EditorDisk {
    fn size(&self) -> u64 {
        self.editor.virtual_size()
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<Extent> {
        let found = self.editor.extent(GuestOffset(offset), max_len);
        let found = found.map_err(failed("map", offset))?;
        let kind = match found.kind {
            LayerKind::Zero => ExtentKind::Zero,
            LayerKind::Unallocated if self.sink().has_backing => ExtentKind::Data,
            LayerKind::Unallocated => ExtentKind::Hole,
            // Compressed clusters may be rewritten at any time: they are read, not passed on.
            LayerKind::Data | LayerKind::Compressed => ExtentKind::Data,
        };
        Ok(Extent { len: found.len, kind, host: None })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.editor.read_at(buf, GuestOffset(offset)).map_err(failed("read", offset))
    }

    fn has_base(&self) -> bool {
        self.sink().has_backing
    }

    fn held(&self, offset: u64, max_len: u64) -> Result<Extent> {
        let found = self.editor.extent(GuestOffset(offset), max_len);
        let found = layer_extent(found.map_err(failed("map", offset))?);
        let kind = match found.kind {
            ExtentKind::Compressed => ExtentKind::Data,
            // It is above nothing.
            ExtentKind::Hole if !self.has_base() => ExtentKind::Zero,
            other => other,
        };
        Ok(Extent { kind, host: None, ..found })
    }
}

impl BlockSink for EditorDisk {
    fn size(&self) -> u64 {
        self.editor.virtual_size()
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.sink().write_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.sink().write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.sink().discard(offset, len)
    }

    fn reads_as_zero(&self, offset: u64, len: u64) -> bool {
        self.sink().reads_as_zero(offset, len)
    }

    fn allocation_unit(&self) -> u64 {
        self.sink().allocation_unit()
    }

    fn flush(&self) -> Result<()> {
        self.sink().flush()
    }

    fn sync(&self) -> Result<()> {
        self.sink().sync()
    }
}
