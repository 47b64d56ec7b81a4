//! New disks of a receiving command: places by name, gone on with where an earlier attempt of the
//! same session left them.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use format_spec::native::hello::SessionState;
use mig_core::section::Fate;
use mig_core::stream;

use super::log::Log;
use super::place::{FilePlace, Known, bitmaps_of};
use super::receipt::Receipt;
use super::recover::recover;
use super::unfinished::{NewDisk, NewKind, publish_together};
use crate::copy::{DataFileTarget, Format, Shape, TargetOptions};
use crate::incoming::{Destination, Place, SessionId, Wanted};
use crate::publish::directory;
use crate::{Error, Renames, Result};

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
    /// New names for its bitmaps.
    pub renames: Renames,
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
    /// Worker threads for reading back.
    pub workers: Option<std::num::NonZeroUsize>,
}

/// New files for the disks of one migration.
pub struct Files {
    disks: Vec<DiskPlace>,
    options: FileOptions,
    state: Mutex<State>,
}

struct State {
    session: SessionId,
    found: SessionState,
    places: Vec<Arc<FilePlace>>,
}

impl Files {
    /// Places for these disks. Nothing is touched yet.
    pub fn new(disks: Vec<DiskPlace>, options: FileOptions) -> Self {
        let state = State { session: [0; 16], found: SessionState::Fresh, places: Vec::new() };
        Self { disks, options, state: Mutex::new(state) }
    }

    /// What is on the disk of this session.
    fn look(&self, session: SessionId) -> Result<SessionState> {
        let (mut prepared, mut unprepared) = (0, 0);
        let mut published = 0;
        self.finish()?;
        for disk in &self.disks {
            let log = Log::beside(&disk.path)?;
            let found = log.peek()?.filter(|found| found.identity.session == session);
            let receipt = Receipt::read(&log)?.filter(|receipt| receipt.session == session);
            match (receipt, found) {
                (Some(receipt), _) if place_size(disk)? == Some(receipt.size) => published += 1,
                (Some(_), _) => {}
                (None, Some(found)) if found.prepared.is_some() => prepared += 1,
                (None, Some(_)) => unprepared += 1,
                (None, None) => {}
            }
        }
        // One receipt does not speak for other disks. What was proved is of no use without proof.
        let is_published = published > 0 && published == self.disks.len();
        Ok(match (self.options.is_fresh, is_published, prepared, unprepared) {
            (true, ..) => SessionState::Fresh,
            (_, true, ..) => SessionState::Committed,
            (_, _, 1.., _) if self.options.no_verify => SessionState::Fresh,
            (_, _, 1.., 0) => SessionState::Ready,
            (_, _, 0, 0) => SessionState::Fresh,
            _ => SessionState::Resumable,
        })
    }

    /// Finishes a publication that a crash interrupted.
    fn finish(&self) -> Result<()> {
        for disk in &self.disks {
            let data = data_file(disk);
            let targets = data.iter().map(|d| d.path.as_path()).chain([disk.path.as_path()]);
            let targets: Vec<_> = targets.collect();
            recover(&targets, self.options.replaces, |log, found| {
                let data = data.as_ref().map(|data| data.path.as_path());
                let bitmaps = bitmaps_of(&disk.path, disk.format, data)?;
                let (session, size, content) = (found.session, found.size, found.content);
                Receipt { session, size, content, bitmaps }.write(log)
            })?;
        }
        Ok(())
    }

    fn new_place(&self, wanted: &Wanted<'_>) -> Result<Arc<FilePlace>> {
        let Some(disk) = self.disks.iter().find(|disk| disk.name == wanted.name) else {
            let names: Vec<_> = self.disks.iter().map(|disk| disk.name.as_str()).collect();
            let reason = format!(
                "the source sends a disk named {:?}, and there are places for {names:?}",
                wanted.name
            );
            return Err(Error::Usage { reason });
        };
        if wanted.keeps_rest {
            let reason = format!(
                "disk {:?} builds on content that a new file does not have: use --in-place",
                wanted.name
            );
            return Err(Error::Usage { reason });
        }
        let state = self.lock();
        if state.places.iter().any(|place| place.name() == wanted.name) {
            let reason = format!("disk {:?} is sent twice", wanted.name);
            return Err(Error::Usage { reason });
        }
        let data = data_file(disk);
        let kind = match disk.format {
            Format::Raw => NewKind::Raw,
            Format::Qcow2 => NewKind::Qcow2 {
                shape: Shape::decide(None, &disk.target)?,
                data_file: data.as_ref(),
                backing: None,
            },
        };
        let new = NewDisk {
            path: &disk.path,
            size: wanted.size,
            kind,
            session: (!self.options.no_verify).then_some(state.session),
            is_fresh: self.options.is_fresh,
        };
        let (found, options) = (state.found, self.options);
        drop(state);
        let known = match found {
            SessionState::Committed => Known::published(&new)?,
            SessionState::Ready => Some(Known::prepared(&new, disk.format)?.ok_or_else(|| {
                let path = disk.path.display();
                let reason = format!(
                    "what was proved of {path} is gone, or was for other options; use --fresh"
                );
                Error::Usage { reason }
            })?),
            _ => {
                self.check_free(&new)?;
                None
            }
        };
        let place = FilePlace::open((disk, &new), known, options)?;
        let place = Arc::new(place);
        self.lock().places.push(Arc::clone(&place));
        Ok(place)
    }

    /// What exists is replaced only where that was asked for.
    fn check_free(&self, disk: &NewDisk<'_>) -> Result<()> {
        let taken = disk.targets().into_iter().find(|path| path.symlink_metadata().is_ok());
        match taken {
            Some(path) if !self.options.replaces => Err(Error::Exists { path: path.to_owned() }),
            _ => Ok(()),
        }
    }

    fn commit_all(&self) -> Result<()> {
        let places = std::mem::take(&mut self.lock().places);
        let open: Vec<_> = places.iter().filter(|place| place.unfinished().is_some()).collect();
        let disks: Vec<_> = open.iter().filter_map(|place| place.unfinished()).collect();
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

    fn place(&self, wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        let place = self.new_place(wanted).map_err(failed)?;
        Ok(place)
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

/// What a stream hears of an error here.
pub(super) fn failed(error: Error) -> stream::Error {
    stream::Error::handler(error.blame(), error)
}

fn data_file(disk: &DiskPlace) -> Option<DataFileTarget> {
    let name = disk.target.data_file.clone()?;
    let path = directory(&disk.path).join(&name);
    Some(DataFileTarget { name, path, is_raw: disk.target.data_file_raw.unwrap_or(false) })
}

/// Guest-visible bytes of a disk that was published.
fn place_size(disk: &DiskPlace) -> Result<Option<u64>> {
    if !disk.path.exists() {
        return Ok(None);
    }
    let opener =
        qcow2_file::Opener::new().format(Some(disk.format.into())).without_named_files(true);
    Ok(opener.open(&disk.path).ok().map(|chain| chain.virtual_size()))
}
