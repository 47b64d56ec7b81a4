//! Places that exist and are written into: `--in-place`.
//!
//! A qcow2 image refuses to open elsewhere from its first write until the source has let go (SPEC
//! 3.3); its own bitmaps follow what is written. A raw file or a device cannot say that it is
//! unfinished. An attempt that fails is begun again.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bitmap_mig::Bitmap;
use block_mig::Landing;
use block_mig::device::{ChainSource, EditorSink, RawSink, StartOf};
use block_mig::limits::workers;
use format_spec::Blame;
use format_spec::native::hello::SessionState;
use mig_core::block::BlockSink;
use mig_core::section::Fate;
use mig_core::stream;
use qcow2_file::bitmaps::PersistentBitmap;
use qcow2_file::edit::Editor;
use qcow2_file::{Access, Chain, HostFile, Opener, Storage as _};

use super::ReceiveOptions;
use crate::copy::{Format, difference, invalidated, open_editor};
use crate::disk::{Disk, Request, check_probe};
use crate::hash::content;
use crate::incoming::{Destination, Place, Sealed, SessionId, Wanted};
use crate::options::DiskOption;
use crate::renames::{self, NO_PLACE_IN_RAW, NO_PLACE_IN_VERSION_2, Renames};
use crate::report::BitmapReport;
use crate::{DiskProof, Error, Observer, Phase, Result, Silent};

/// Existing images, open and locked.
pub(super) struct InPlace {
    targets: Vec<Arc<Target>>,
    /// Those whose disk has come.
    places: Mutex<Vec<Arc<Written>>>,
    /// Bitmaps that were there and cannot be trusted, by disk.
    invalidated: Mutex<Vec<(String, Vec<BitmapReport>)>>,
}

/// An existing image, before its disk has come.
struct Target {
    id: String,
    path: PathBuf,
    format: Format,
    allow_backing: bool,
    renames: Renames,
    /// Holds the locks.
    chain: Chain,
}

/// An existing image that is written.
struct Written {
    target: Arc<Target>,
    /// Bytes of the disk that came.
    size: u64,
    sink: Sink,
    stored: Mutex<Vec<PersistentBitmap>>,
}

/// How it is written.
enum Sink {
    Raw(RawSink),
    /// Taken and closed when the source has let go.
    Qcow2 {
        editor: Box<RwLock<Option<Editor>>>,
        size: u64,
    },
}

impl InPlace {
    /// Opens and locks all images. Nothing is written.
    pub(super) fn open(options: &ReceiveOptions, observer: &dyn Observer) -> Result<Self> {
        let target = |disk| Ok(Arc::new(Target::open(disk, options, observer)?));
        let targets = options.disks.iter().map(target).collect::<Result<_>>()?;
        Ok(Self { targets, places: Mutex::default(), invalidated: Mutex::default() })
    }

    /// The destination's own bitmaps of a disk that are not valid.
    pub(super) fn take_invalidated(&self, id: &str) -> Vec<BitmapReport> {
        let mut found = lock(&self.invalidated);
        let index = found.iter().position(|(of, _)| of == id);
        index.map(|index| found.swap_remove(index).1).unwrap_or_default()
    }

    fn finish(&self) -> Result<()> {
        for place in std::mem::take(&mut *lock(&self.places)) {
            let invalidated = place.finish()?;
            lock(&self.invalidated).push((place.target.id.clone(), invalidated));
        }
        Ok(())
    }
}

impl Destination for InPlace {
    fn begin(&self, _session: SessionId) -> stream::Result<SessionState> {
        Ok(SessionState::Fresh)
    }

    fn place(&self, wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        let known = self.targets.iter().find(|target| target.id == wanted.name);
        let target = known.ok_or_else(|| no_place(wanted.name, &self.targets))?;
        let place = Arc::new(Written::begin(Arc::clone(target), wanted.size)?);
        lock(&self.places).push(Arc::clone(&place));
        Ok(place)
    }

    fn commit(&self) -> stream::Result<()> {
        Ok(self.finish()?)
    }

    fn abort(&self, _fate: Fate) {
        // The marks of what was written stay.
        lock(&self.places).clear();
    }
}

fn no_place(name: &str, targets: &[Arc<Target>]) -> Error {
    let names: Vec<_> = targets.iter().map(|target| target.id.as_str()).collect();
    let reason =
        format!("the source sends a disk named {name:?}, and there are places for {names:?}");
    Error::Usage { reason }
}

impl Target {
    fn open(disk: &DiskOption, options: &ReceiveOptions, observer: &dyn Observer) -> Result<Self> {
        let path = disk.path.as_path();
        let is_device = HostFile::open(path, Access::Read)?.is_device();
        let format = disk.format.or(is_device.then_some(Format::Raw));
        let chain = Opener::new()
            .format(format.map(Into::into))
            .access(Access::ReadWrite)
            .allow_named_files(options.allow_backing)
            .accept_unfinished(true)
            .lock(true)
            .open(path)?;
        check_probe(path, &chain, observer)?;
        let header = chain.top().as_qcow2().map(qcow2_file::Image::header);
        if header.is_none_or(|header| header.version < 3) {
            observer.warning(&format!(
                "{} is written in place: until the migration is complete it holds neither the old \
                 nor the new content, and nothing in it says so",
                path.display()
            ));
        }
        Ok(Self {
            id: disk.id.clone(),
            path: path.to_owned(),
            format: chain.top().format().into(),
            allow_backing: options.allow_backing,
            renames: Renames::of(&options.renames, &disk.id),
            chain,
        })
    }

    /// Makes a raw file as long as the disk. A device that is longer will do.
    fn fit(&self, file: &HostFile, size: u64) -> Result<()> {
        let failed = |action| move |source| Error::File { action, path: self.path.clone(), source };
        let len = file.len().map_err(failed("find the size of"))?;
        match file.is_device() {
            true if len < size => Err(self.other_size(len, size)),
            false if len > size => Err(self.other_size(len, size)),
            false if len < size => file.set_len(size).map_err(failed("set the length of")),
            _ => Ok(()),
        }
    }

    fn other_size(&self, found: u64, wanted: u64) -> Error {
        let path = self.path.display();
        let reason = format!("{path} has {found} bytes and the source's disk {wanted}");
        Error::Usage { reason }
    }

    /// How it is opened to be read back: as it is, without locks, since we hold them.
    fn reopen(&self) -> Result<Disk> {
        let request = Request {
            allow_named: self.allow_backing,
            accepts_unfinished: true,
            is_locked_already: true,
            ..Request::new(&self.path, Some(self.format))
        };
        Disk::open(&request, &Silent)
    }

    /// Why it can hold no bitmaps, if so.
    fn cannot_hold(&self) -> Option<&'static str> {
        match self.chain.top().as_qcow2() {
            None => Some(NO_PLACE_IN_RAW),
            Some(image) => (image.header().version < 3).then_some(NO_PLACE_IN_VERSION_2),
        }
    }
}

impl Written {
    /// The disk of an image comes, with so many bytes.
    fn begin(target: Arc<Target>, size: u64) -> Result<Self> {
        let sink = match target.format {
            Format::Raw => {
                let file = target.chain.files().first().map(|files| Arc::clone(&files.file));
                let file = file.ok_or_else(|| target.other_size(0, size))?;
                target.fit(&file, size)?;
                Sink::Raw(RawSink::new(file, size))
            }
            Format::Qcow2 => {
                let found = target.chain.virtual_size();
                if found != size {
                    return Err(target.other_size(found, size));
                }
                let editor = open_editor(&target.chain, target.allow_backing)?;
                Sink::Qcow2 { editor: Box::new(RwLock::new(Some(editor))), size }
            }
        };
        Ok(Self { target, size, sink, stored: Mutex::default() })
    }

    fn prove(&self, sealed: &Sealed) -> Result<Option<DiskProof>> {
        self.sink.sync()?;
        *lock(&self.stored) = self.sink.add(&sealed.bitmaps)?;
        let Some(said) = sealed.content else { return Ok(None) };
        let found = self.target.reopen()?;
        let whole = ChainSource(&found.chain);
        let disk = StartOf { disk: &whole, size: self.size };
        let read = content(&disk, workers(None), None, (Phase::Prove, &Silent))?;
        if read != said {
            let reason = format!("{said} was sent, {read} was read");
            return Err(Error::ProofMismatch { path: self.target.path.clone(), reason });
        }
        // They become valid, and are read back, when the source has let go.
        let bitmaps = sealed.bitmaps.iter().map(Bitmap::digest).collect::<Result<_, _>>()?;
        Ok(Some(DiskProof { content: read, bitmaps }))
    }

    /// The source has let go: bitmaps become valid, and the image opens again. Answers which of the
    /// destination's own cannot be trusted.
    fn finish(&self) -> Result<Vec<BitmapReport>> {
        let Some(editor) = self.sink.take() else { return Ok(Vec::new()) };
        editor.close()?;
        let found = self.target.reopen()?;
        match difference(&lock(&self.stored), &found.bitmaps)? {
            None => Ok(invalidated(&found)),
            Some(reason) => Err(Error::ProofMismatch { path: self.target.path.clone(), reason }),
        }
    }
}

impl Sink {
    fn take(&self) -> Option<Editor> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2 { editor, .. } => {
                editor.write().unwrap_or_else(PoisonError::into_inner).take()
            }
        }
    }

    /// Bitmaps come last, so that enabled ones do not record the migration itself.
    fn add(&self, bitmaps: &[Bitmap]) -> Result<Vec<PersistentBitmap>> {
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
        call: impl FnOnce(&dyn BlockSink) -> mig_core::Result<T>,
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

impl Landing for Written {
    fn sink(&self) -> &dyn BlockSink {
        &self.sink
    }
}

impl Place for Written {
    fn bitmap_name(&self, sent: &str) -> stream::Result<String> {
        match self.target.cannot_hold() {
            None => Ok(self.target.renames.stored(sent)),
            Some(why) => Err(renames::no_place(&self.target.id, sent, why).into()),
        }
    }

    fn prepare(&self, sealed: &Sealed) -> stream::Result<Option<DiskProof>> {
        Ok(self.prove(sealed)?)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
