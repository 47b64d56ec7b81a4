//! A qcow2 image with its bitmaps while a guest of this process uses it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitmap_mig::LiveBitmaps;
use block_mig::TrackedDisk;
use block_mig::device::EditorDisk;
use mig_core::bitmap::BitmapInfo;
use qcow2_file::bitmaps::{Bitmaps, PersistentBitmap, State};
use qcow2_file::edit::{Editor, EditorOptions};
use qcow2_file::{Access, Chain, Opener, Storage};

use crate::copy::backing;
use crate::{Error, Result};

/// An image that is open for a guest, locked, its enabled bitmaps marked as in use on disk.
/// Dropping it is like a power cut: they stay marked. See [`close`](Self::close).
pub struct LiveImage {
    path: PathBuf,
    disk: Arc<TrackedDisk<EditorDisk>>,
    bitmaps: Arc<LiveBitmaps>,
    /// Holds the image's lock.
    _chain: Chain,
}

impl LiveImage {
    /// Opens an image that stands alone. Its consistent bitmaps are loaded; others stay as they are
    /// on disk and take no part.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_as(path, false)
    }

    /// The same with an image that stands on others: it is opened with the files that it names,
    /// which takes trust in it.
    pub fn open_above(path: &Path) -> Result<Self> {
        Self::open_as(path, true)
    }

    fn open_as(path: &Path, allow_named: bool) -> Result<Self> {
        let opener = Opener::new().format(Some(qcow2_file::Format::Qcow2)).lock(true);
        let opener = opener.access(Access::ReadWrite).allow_named_files(allow_named);
        let chain = opener.open(path)?;
        let file = chain.top().file().clone();
        let header = qcow2_file::preflight::read_header(&*file)?;
        let stored = Bitmaps::open(file.clone(), &header)?;
        let bitmaps = Arc::new(LiveBitmaps::new(header.size & !511));
        for entry in stored.iter().flat_map(Bitmaps::list) {
            if let (State::Consistent, Some(stored)) = (&entry.state, &stored) {
                let loaded = bitmap_mig::load(stored, entry.name())?;
                bitmaps.add_loaded(&loaded).map_err(unusable)?;
            }
        }
        let data = chain.files().first().and_then(|files| files.data.clone());
        let data = data.map(|data| data as Arc<dyn Storage>);
        let backing = backing(&chain, allow_named)?;
        let editor = Editor::open(file, EditorOptions { data, backing, ..Default::default() })?;
        let disk = Arc::new(TrackedDisk::new(EditorDisk::new(editor), bitmaps.clone()));
        Ok(Self { path: path.to_owned(), disk, bitmaps, _chain: chain })
    }

    /// The disk, through which everybody reads and writes.
    pub fn disk(&self) -> &Arc<TrackedDisk<EditorDisk>> {
        &self.disk
    }

    /// Its bitmaps.
    pub fn bitmaps(&self) -> &Arc<LiveBitmaps> {
        &self.bitmaps
    }

    /// Stores the bitmaps and closes the image. Nobody else may hold the disk any more. Those that
    /// have become inconsistent are left out.
    pub fn close(self) -> Result<()> {
        // Before anything is taken away: what cannot be stored leaves the image as it is.
        let bitmaps = self.stored()?;
        let path = self.path;
        let disk = Arc::into_inner(self.disk).ok_or_else(|| Error::Usage {
            reason: format!("{} is still used by somebody", path.display()),
        })?;
        let editor = disk.into_inner().into_editor();
        if let Some(guard) = editor.guard() {
            for found in guard.list().iter().filter(|found| found.state == State::Consistent) {
                guard.remove(&found.name)?;
            }
            bitmaps.into_iter().try_for_each(|bitmap| guard.add(bitmap))?;
        }
        Ok(editor.close()?)
    }

    fn stored(&self) -> Result<Vec<PersistentBitmap>> {
        let all = self.bitmaps.all().into_iter();
        let kept = all.filter(|info| info.is_persistent && !info.is_inconsistent);
        let stored = kept.map(|info| {
            let bits = self.bitmaps.snapshot(&info.name).map_err(unusable)?;
            let granularity_bits = u8::try_from(info.granularity.trailing_zeros()).unwrap_or(0);
            let BitmapInfo { name, is_enabled, .. } = info;
            Ok(PersistentBitmap { name, granularity_bits, is_enabled, bits })
        });
        stored.collect()
    }
}

fn unusable(error: bitmap_mig::live::JobError) -> Error {
    Error::Usage { reason: error.to_string() }
}
