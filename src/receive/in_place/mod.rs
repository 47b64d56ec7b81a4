//! Places that exist and are written into: `--in-place`.
//!
//! A qcow2 image refuses to open elsewhere from its first write until the source has let go (SPEC
//! 3.3); its own bitmaps follow what is written. A raw file or a device cannot say that it is
//! unfinished. An attempt that fails is gone on with by the journal beside the image, or, of a
//! device, in a directory for the purpose; without one it is begun again. A disk that comes without
//! content has its bitmaps replaced in one step, and nothing else of it is written.

mod bitmaps;
mod sink;
mod target;
#[cfg(test)]
mod tests;
mod written;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use format_spec::native::answer::Published;
use format_spec::native::hello::SessionState;
use mig_core::section::Fate;
use mig_core::stream;

use self::bitmaps::OnlyBitmaps;
use self::target::Target;
use self::written::Written;
use super::ReceiveOptions;
use crate::berth::room::{self, Need};
use crate::berth::{all_came, no_place, state};
use crate::incoming::{Destination, Introduced, Place, SessionId, Wanted};
use crate::renames::Renames;
use crate::report::BitmapReport;
use crate::{Observer, Result};

/// Existing images, open and locked.
pub(super) struct InPlace {
    targets: Vec<Arc<Target>>,
    /// Whether another attempt can go on with what an attempt leaves.
    resumes: bool,
    observer: Arc<dyn Observer>,
    state: Mutex<State>,
    /// Bitmaps that were there and cannot be trusted, by disk.
    invalidated: Mutex<Vec<(String, Vec<BitmapReport>)>>,
}

struct State {
    session: SessionId,
    /// Whether what an earlier attempt left is of no use.
    is_fresh: bool,
    /// Those whose disk has come.
    places: Vec<Arc<dyn Existing>>,
}

/// An existing image whose disk has come.
trait Existing: Place {
    /// What was there.
    fn target(&self) -> &Target;

    /// The source has let go: bitmaps become valid, and the image opens again. Answers which of the
    /// destination's own cannot be trusted.
    fn finish(&self) -> Result<Vec<BitmapReport>>;

    /// All images are finished.
    fn end(&self) -> Result<()>;

    /// The attempt has failed.
    fn leave(&self, fate: Fate) -> Result<()>;
}

impl InPlace {
    /// Opens and locks all images. Nothing is written. `watching` is told what takes long later.
    pub(super) fn open(
        options: &ReceiveOptions,
        observer: &dyn Observer,
        watching: Arc<dyn Observer>,
    ) -> Result<Self> {
        let target = |disk| Ok(Arc::new(Target::open(disk, options, observer)?));
        let targets = options.disks.iter().map(target).collect::<Result<_>>()?;
        let state = State { session: [0; 16], is_fresh: options.fresh, places: Vec::new() };
        Ok(Self {
            targets,
            resumes: !options.no_verify,
            observer: watching,
            state: Mutex::new(state),
            invalidated: Mutex::default(),
        })
    }

    /// Another attempt follows, which goes on with what this one left.
    pub(super) fn go_on(&self) {
        lock(&self.state).is_fresh = false;
    }

    /// The destination's own bitmaps of a disk that are not valid.
    pub(super) fn take_invalidated(&self, id: &str) -> Vec<BitmapReport> {
        let mut found = lock(&self.invalidated);
        let index = found.iter().position(|(of, _)| of == id);
        index.map(|index| found.swap_remove(index).1).unwrap_or_default()
    }

    /// What is known of a session.
    fn look(&self, session: SessionId) -> Result<SessionState> {
        let traces = self.targets.iter().map(|target| target.trace(session));
        Ok(state(&traces.collect::<Result<Vec<_>>>()?, self.resumes))
    }

    fn begin_disk(&self, wanted: &Wanted<'_>) -> Result<Arc<dyn Existing>> {
        let known = self.targets.iter().find(|target| target.id == wanted.name);
        let target = known.ok_or_else(|| {
            no_place(wanted.name, self.targets.iter().map(|target| target.id.as_str()))
        })?;
        let target = target.clone();
        let mut state = lock(&self.state);
        let (session, size, observer) = (state.session, wanted.size, &self.observer);
        let place: Arc<dyn Existing> = if wanted.keeps_rest {
            Arc::new(OnlyBitmaps::begin(target, size, session, observer)?)
        } else {
            let how = (session, self.resumes, state.is_fresh);
            Arc::new(Written::begin(target, size, how, observer)?)
        };
        state.places.push(Arc::clone(&place));
        Ok(place)
    }

    /// All disks have come that will.
    fn judge(&self, disks: &[Introduced]) -> Result<()> {
        let came = disks.iter().map(|disk| disk.name.as_str());
        all_came(self.targets.iter().map(|target| target.id.as_str()), came)?;
        let place = |disk: &'_ Introduced| self.targets.iter().find(|t| t.id == disk.name);
        let placed = disks.iter().filter_map(|disk| place(disk).zip(Some(disk)));
        let renames = placed.clone().map(|(target, disk)| (&target.renames, disk));
        Renames::check_introduced(renames)?;
        let need = |(target, disk): (&Arc<Target>, &Introduced)| {
            disk.content.map(|bytes| Need::of_existing(target.data_path(), bytes))
        };
        room::check(placed.filter_map(need))
    }

    fn finish(&self) -> Result<()> {
        let places = std::mem::take(&mut lock(&self.state).places);
        for place in &places {
            let invalidated = place.finish()?;
            lock(&self.invalidated).push((place.target().id.clone(), invalidated));
        }
        // Until all are finished each of them can be gone on with.
        places.iter().try_for_each(|place| place.end())
    }
}

impl Destination for InPlace {
    fn begin(&self, session: SessionId) -> stream::Result<SessionState> {
        let is_fresh = {
            let mut state = lock(&self.state);
            state.session = session;
            state.is_fresh
        };
        if is_fresh { Ok(SessionState::Fresh) } else { Ok(self.look(session)?) }
    }

    fn forget(&self) -> stream::Result<()> {
        lock(&self.state).is_fresh = true;
        Ok(())
    }

    fn published(&self) -> stream::Result<Vec<Published>> {
        let published = self.targets.iter().map(|target| target.published());
        Ok(published.collect::<Result<_>>()?)
    }

    fn place(&self, wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        Ok(self.begin_disk(wanted)?)
    }

    fn introduced(&self, disks: &[Introduced]) -> stream::Result<()> {
        Ok(self.judge(disks)?)
    }

    fn commit(&self) -> stream::Result<()> {
        Ok(self.finish()?)
    }

    fn abort(&self, fate: Fate) {
        for place in std::mem::take(&mut lock(&self.state).places) {
            if let Err(error) = place.leave(fate) {
                tracing::warn!(%error, "what arrived last will be sent again");
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
