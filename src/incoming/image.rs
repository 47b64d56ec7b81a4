//! New qcow2 images as a destination. They do not outlive an attempt that fails.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_mig::Landing;
use block_mig::device::NewImageSink;
use block_mig::limits::workers;
use format_spec::content_hash::ContentHash;
use format_spec::native::hello::SessionState;
use mig_core::block::BlockSink;
use mig_core::section::{Fate, Registry};
use mig_core::stream;
use mig_core::transport::Listen;
use qcow2_file::create::{CreateOptions, NewImage};

use super::block::caller;
use super::{Destination, IncomingOptions, Place, Received, Sealed, SessionId, Wanted, receive};
use crate::disk::{Disk, Request};
use crate::hash::content_of;
use crate::publish::{Draft, publish};
use crate::{DiskProof, Error, Phase, Result, Silent};

/// New images: the disk of each name on the wire goes to a path, which must not exist.
pub struct NewImages {
    targets: Vec<(String, PathBuf)>,
    places: Mutex<Vec<Arc<NewPlace>>>,
}

struct NewPlace {
    image: Arc<NewImage>,
    sink: NewImageSink<Arc<NewImage>>,
    temporary: PathBuf,
    draft: Mutex<Option<Draft>>,
}

impl NewImages {
    /// Names on the wire and where their disks go.
    pub fn new(targets: Vec<(String, PathBuf)>) -> Self {
        Self { targets, places: Mutex::default() }
    }

    fn create(&self, wanted: &Wanted<'_>) -> Result<Arc<NewPlace>> {
        let target = self.targets.iter().find(|(name, _)| name == wanted.name);
        let Some((_, target)) = target else {
            let reason = format!("there is no place for a disk {:?}", wanted.name);
            return Err(Error::Usage { reason });
        };
        let draft = Draft::create(target)?;
        let image = NewImage::create(draft.storage(), &CreateOptions::new(wanted.size))?;
        let (image, temporary) = (Arc::new(image), draft.temporary().to_owned());
        let sink = NewImageSink(image.clone());
        let place = NewPlace { image, sink, temporary, draft: Mutex::new(Some(draft)) };
        Ok(Arc::new(place))
    }
}

impl Destination for NewImages {
    fn begin(&self, _session: SessionId) -> stream::Result<SessionState> {
        Ok(SessionState::Fresh)
    }

    fn place(&self, wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        if wanted.keeps_rest {
            let reason = format!("disk {:?} builds on content, and has none", wanted.name);
            return Err(caller(reason));
        }
        let place = self.create(wanted)?;
        lock(&self.places).push(place.clone());
        Ok(place)
    }

    fn commit(&self) -> stream::Result<()> {
        let drafts =
            lock(&self.places).iter().filter_map(|place| lock(&place.draft).take()).collect();
        Ok(publish(drafts, false)?)
    }

    fn abort(&self, _fate: Fate) {
        lock(&self.places).clear();
    }
}

impl Landing for NewPlace {
    fn sink(&self) -> &dyn BlockSink {
        &self.sink
    }
}

impl Place for NewPlace {
    fn prepare(&self, sealed: &Sealed) -> stream::Result<Option<DiskProof>> {
        let bitmaps = sealed.bitmaps.iter();
        let stored: Vec<_> = bitmaps.map(|b| b.clone().into_stored_as(&b.name)).collect();
        self.image.finish(&stored).map_err(Error::from)?;
        match sealed.content {
            None => Ok(None),
            Some(said) => Ok(Some(read_back(&self.temporary, said, sealed)?)),
        }
    }
}

/// Opens what was written as anybody would, and holds it against what the source says.
fn read_back(path: &Path, said: ContentHash, sealed: &Sealed) -> Result<DiskProof> {
    let disk = Disk::open(&Request::new(path, Some(crate::copy::Format::Qcow2)), &Silent)?;
    let content = content_of(&disk, workers(None), None, (Phase::Prove, &Silent))?;
    let mismatch = |reason| Error::ProofMismatch { path: path.to_owned(), reason };
    if content != said {
        return Err(mismatch(format!("{said} was sent, {content} was read")));
    }
    let mut bitmaps = Vec::new();
    for bitmap in &sealed.bitmaps {
        let directory = disk.bitmaps.directory();
        let directory = directory.ok_or_else(|| mismatch("the bitmaps are gone".to_owned()))?;
        bitmaps.push(bitmap_mig::load(directory, &bitmap.name)?.digest()?);
    }
    Ok(DiskProof { content, bitmaps })
}

/// Receives one image, whatever its name on the wire, and publishes it at `target`, which must not
/// exist, as qcow2. Until the source has agreed to the proof the image has a temporary name.
pub fn receive_image(listen: &dyn Listen, target: &Path) -> Result<Received> {
    let main = listen.accept(None).map_err(stream::Error::Connect)?;
    let destination = NewImages::new(vec![("disk0".to_owned(), target.to_owned())]);
    let options = IncomingOptions { resumes: false, ..IncomingOptions::new(&block_mig::Unwatched) };
    Ok(receive(main, listen, Arc::new(destination), Registry::new(), &options)?)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
