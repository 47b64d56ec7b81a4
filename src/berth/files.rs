//! New disks of a receiving command: places by name, gone on with where an earlier attempt of the
//! same session left them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use format_spec::native::answer::Published;
use format_spec::native::hello::SessionState;
use mig_core::section::Fate;
use mig_core::stream;
use qcow2_file::lock::Lock;

use super::base::Base;
use super::log::Log;
use super::place::{FilePlace, Known, bitmaps_of};
use super::receipt::Receipt;
use super::recover::{Half, give_up, recover};
use super::room::{self, Need};
use super::size;
use super::trace::{Trace, of_another, state};
use super::unfinished::{NewDisk, NewKind, publish_together};
use crate::copy::{DataFileTarget, Format, Shape, TargetOptions};
use crate::incoming::{Destination, Introduced, Place, SessionId, Wanted};
use crate::publish::{hold, left_bytes};
use crate::{Error, Observer, Renames, Result, Silent};

/// Where one disk goes, as the user configured it.
#[derive(Debug, Clone)]
pub struct DiskPlace {
    /// Its name on the wire.
    pub name: String,
    /// Its final name here.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// `-o` options, for qcow2.
    pub target: TargetOptions,
    /// What it stands on, where the source sends only what stands above that; for qcow2.
    pub base: Option<Base>,
    /// New names for its bitmaps.
    pub renames: Renames,
}

impl DiskPlace {
    /// The file that takes its data, where that is another.
    pub(super) fn data_file(&self) -> Option<DataFileTarget> {
        DataFileTarget::of(&self.path, &self.target)
    }

    /// All files that it reads from, once it is published: what its receipt is of.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let data = self.data_file().map(|data| data.path);
        data.into_iter().chain([self.path.clone()]).chain(self.below()).collect()
    }

    /// All files that it stands on.
    fn below(&self) -> Vec<PathBuf> {
        self.base.iter().flat_map(Base::files).map(Path::to_owned).collect()
    }

    /// What is to be made of it, for nobody's session yet.
    pub(super) fn new_disk<'a>(
        &'a self,
        size: u64,
        data_file: Option<&'a DataFileTarget>,
    ) -> Result<NewDisk<'a>> {
        let kind = match self.format {
            Format::Raw => NewKind::Raw,
            Format::Qcow2 => {
                let shape = Shape::decide(None, &self.target)?;
                let backing = self.base.as_ref().map(Base::backing);
                NewKind::Qcow2 { shape, data_file, backing }
            }
        };
        let (below, wishes) = (self.below(), self.renames.text());
        let (session, resumes, is_fresh) = (None, false, false);
        Ok(NewDisk { path: &self.path, size, kind, below, session, resumes, is_fresh, wishes })
    }
}

/// How disks are received.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileOptions {
    /// Replace what exists, at the end, by rename.
    pub replaces: bool,
    /// Ignore what an earlier try left.
    pub is_fresh: bool,
    /// Do not hash what arrives: nothing can be gone on with then.
    pub no_verify: bool,
    /// Keep nothing for another attempt: no journal, no receipt.
    pub keeps_nothing: bool,
    /// Worker threads for reading back.
    pub workers: Option<std::num::NonZeroUsize>,
}

impl FileOptions {
    /// Whether another attempt can go on with what an attempt leaves.
    fn resumes(&self) -> bool {
        !self.no_verify && !self.keeps_nothing
    }
}

/// New files for the disks of one migration.
pub struct Files {
    disks: Vec<DiskPlace>,
    options: FileOptions,
    observer: Arc<dyn Observer>,
    state: Mutex<State>,
}

struct State {
    session: SessionId,
    found: SessionState,
    /// Whether what an earlier try left is removed.
    is_fresh: bool,
    places: Vec<Arc<FilePlace>>,
}

impl Files {
    /// Places for these disks. Nothing is touched yet.
    pub fn new(disks: Vec<DiskPlace>, options: FileOptions) -> Self {
        let (found, is_fresh, places) = (SessionState::Fresh, options.is_fresh, Vec::new());
        let state = State { session: [0; 16], found, is_fresh, places };
        Self { disks, options, observer: Arc::new(Silent), state: Mutex::new(state) }
    }

    /// Lets `observer` be told what takes long.
    pub fn watched_by(self, observer: Arc<dyn Observer>) -> Self {
        Self { observer, ..self }
    }

    /// What is on the disk of this session.
    fn look(&self, session: SessionId) -> Result<SessionState> {
        if self.options.is_fresh {
            let anew = |disk: &DiskPlace| {
                let data = disk.data_file();
                let new = disk.new_disk(0, data.as_ref())?;
                give_up(&new.targets())
            };
            return self.disks.iter().try_for_each(anew).map(|()| SessionState::Fresh);
        }
        self.finish()?;
        for disk in &self.disks {
            if of_another(disk, session)? == Some(true) {
                return Err(Error::Awaited { path: disk.path.clone() });
            }
        }
        let traces = self.disks.iter().map(|disk| Trace::of(disk, session));
        Ok(state(&traces.collect::<Result<Vec<_>>>()?, self.options.resumes()))
    }

    /// Finishes a publication that a crash interrupted.
    fn finish(&self) -> Result<()> {
        let data: Vec<_> = self.disks.iter().map(DiskPlace::data_file).collect();
        let mut places = Vec::new();
        for (disk, data) in self.disks.iter().zip(&data) {
            let new = disk.new_disk(0, data.as_ref())?;
            let (files, target) = (new.targets(), Some(new.target()));
            places.push(Half { files, below: new.below, target });
        }
        let done = recover(&places, self.options.replaces, |index, log, found| {
            let (Some(disk), Some(data)) = (self.disks.get(index), data.get(index)) else {
                return Ok(());
            };
            let data = data.as_ref().map(|data| data.path.as_path());
            found.receipt(bitmaps_of(&disk.path, disk.format, data)?).write(log)
        });
        done.map(drop)
    }

    fn new_place(&self, wanted: &Wanted<'_>) -> Result<Arc<FilePlace>> {
        let Some(disk) = self.disks.iter().find(|disk| disk.name == wanted.name) else {
            return Err(no_place(wanted.name, self.disks.iter().map(|disk| disk.name.as_str())));
        };
        let name = wanted.name;
        let refusal = match (wanted.keeps_rest, &disk.base) {
            (true, None) => Some(format!(
                "disk {name:?} builds on content that a new file does not have: --in-place takes \
                 bitmaps alone, --backing what stands above a base"
            )),
            (false, Some(_)) => Some(format!(
                "all of disk {name:?} is sent, and nothing of it would be left for the backing \
                 file: use send --shared-base, or leave --backing out here"
            )),
            _ => None,
        };
        if let Some(reason) = refusal {
            return Err(Error::Unfit { reason });
        }
        let state = self.lock();
        if state.places.iter().any(|place| place.name() == wanted.name) {
            let reason = format!("disk {:?} is sent twice", wanted.name);
            return Err(Error::Unfit { reason });
        }
        let data = disk.data_file();
        let mut new = disk.new_disk(wanted.size, data.as_ref())?;
        size::check(name, &new)?;
        new.session = (!self.options.keeps_nothing).then_some(state.session);
        (new.resumes, new.is_fresh) = (self.options.resumes(), state.is_fresh);
        let (session, found, options) = (state.session, state.found, self.options);
        drop(state);
        let known = match found {
            SessionState::Ready => Some(Known::prepared(&new, disk.format)?.ok_or_else(|| {
                let path = disk.path.display();
                let reason = format!("what was proved of {path} is gone; use --fresh");
                Error::Usage { reason }
            })?),
            _ => None,
        };
        let held = self.clear(&new)?;
        self.tell_what_goes(disk, session)?;
        let place =
            Arc::new(FilePlace::open((disk, &new), (known, held), options, &self.observer)?);
        self.lock().places.push(Arc::clone(&place));
        Ok(place)
    }

    /// What another session has sent so far goes: its user may not know that it is another one.
    fn tell_what_goes(&self, disk: &DiskPlace, session: SessionId) -> Result<()> {
        if !self.options.is_fresh && of_another(disk, session)?.is_some() {
            let (path, bytes) = (disk.path.display(), left_bytes(&disk.path));
            self.observer.warning(&format!(
                "another migration had left {bytes} bytes of {path}, which are thrown away: only \
                 the same source, sent to the same address, goes on with what is there"
            ));
        }
        Ok(())
    }

    /// What exists is replaced only where that was asked for, and nobody uses it. It is held until
    /// then.
    fn clear(&self, disk: &NewDisk<'_>) -> Result<Vec<Lock>> {
        let mut held = Vec::new();
        for path in disk.targets() {
            if path.symlink_metadata().is_err() {
                continue;
            }
            if !self.options.replaces {
                return Err(Error::Exists { path: path.to_owned() });
            }
            held.extend(hold(path)?);
        }
        Ok(held)
    }

    /// All disks have come that will.
    fn judge(&self, disks: &[Introduced]) -> Result<()> {
        let came = disks.iter().map(|disk| disk.name.as_str());
        all_came(self.disks.iter().map(|disk| disk.name.as_str()), came)?;
        let place = |disk: &Introduced| self.disks.iter().find(|place| place.name == disk.name);
        let placed = disks.iter().filter_map(|disk| place(disk).zip(Some(disk)));
        Renames::check_introduced(placed.clone().map(|(place, disk)| (&place.renames, disk)))?;
        // All that was proved is there.
        if self.lock().found == SessionState::Ready {
            return Ok(());
        }
        let need = |(place, disk): (&DiskPlace, &Introduced)| {
            let path = place.data_file().map_or_else(|| place.path.clone(), |data| data.path);
            disk.content.map(|bytes| Need::of_new(&path, bytes))
        };
        room::check(placed.filter_map(need))
    }

    fn commit_all(&self) -> Result<()> {
        let places = std::mem::take(&mut self.lock().places);
        let open: Vec<_> = places.iter().filter(|place| place.unfinished().is_some()).collect();
        let disks: Vec<_> = open.iter().filter_map(|place| place.unfinished()).collect();
        disks.iter().try_for_each(|disk| disk.hold())?;
        disks.iter().try_for_each(|disk| disk.open_to_others())?;
        publish_together(&disks, self.options.replaces, |index| {
            open.get(index).map_or(Ok(()), |place| place.write_receipt())
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Destination for Files {
    fn begin(&self, session: SessionId) -> stream::Result<SessionState> {
        let found = self.look(session).map_err(failed)?;
        let mut state = self.lock();
        (state.session, state.found) = (session, found);
        Ok(found)
    }

    fn forget(&self) -> stream::Result<()> {
        let mut state = self.lock();
        (state.found, state.is_fresh) = (SessionState::Fresh, true);
        Ok(())
    }

    fn published(&self) -> stream::Result<Vec<Published>> {
        let of = |disk: &DiskPlace| {
            let receipt = Receipt::read(&Log::beside(&disk.path)?)?;
            let receipt = receipt.ok_or_else(|| gone(&disk.path))?;
            let files = disk.files();
            let files = files.iter().map(PathBuf::as_path);
            Ok(receipt.published(files, (&disk.name, &disk.renames)))
        };
        self.disks.iter().map(of).collect::<Result<_>>().map_err(failed)
    }

    fn place(&self, wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        let place = self.new_place(wanted).map_err(failed)?;
        Ok(place)
    }

    fn introduced(&self, disks: &[Introduced]) -> stream::Result<()> {
        self.judge(disks).map_err(failed)
    }

    fn commit(&self) -> stream::Result<()> {
        self.commit_all().map_err(failed)
    }

    fn abort(&self, fate: Fate) {
        for place in std::mem::take(&mut self.lock().places) {
            if let Err(error) = place.leave(fate) {
                tracing::warn!(%error, "what arrived last will be sent again");
            }
        }
    }
}

/// A receipt that was there is not there any more.
pub(crate) fn gone(disk: &Path) -> Error {
    Error::Usage { reason: format!("the receipt of {} is gone", disk.display()) }
}

/// A disk comes that nobody made a place for.
pub(crate) fn no_place<'a>(name: &str, places: impl Iterator<Item = &'a str>) -> Error {
    let names: Vec<_> = places.collect();
    let reason =
        format!("the source sends a disk named {name:?}, and there are places for {names:?}");
    Error::Unfit { reason }
}

/// Fails where a place stays empty: who named it would miss its disk. A migration of no disk at all
/// is no user's wish.
pub(crate) fn all_came<'a>(
    mut places: impl Iterator<Item = &'a str>,
    came: impl Iterator<Item = &'a str>,
) -> Result<()> {
    let came: Vec<_> = came.collect();
    let Some(missing) = places.find(|place| !came.contains(place)) else { return Ok(()) };
    let reason = format!("there is a place for a disk {missing:?}, and the source sends {came:?}");
    Err(if came.is_empty() { Error::Unfit { reason } } else { Error::Usage { reason } })
}

/// What a stream hears of an error here.
pub(super) fn failed(error: Error) -> stream::Error {
    stream::Error::handler(error.blame_there(), error)
}
