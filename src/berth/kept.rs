//! The journal of a disk that is written in place.

use std::path::Path;
use std::sync::Arc;

use block_mig::journal::{Identity, Keeper};
use block_mig::limits::UNIT_BYTES;
use block_mig::recheck::{ReadBack, Recheck, recheck};
use mig_core::block::BlockSource;
use mig_core::section::Have;
use mig_core::stream;
use qcow2_file::Storage;

use super::device::Device;
use super::log::Log;
use crate::error::is_full;
use crate::observe::Progress;
use crate::{Observer, Phase, Result};

/// A journal beside a destination that exists.
pub(crate) struct Kept {
    log: Log,
    keeper: Keeper,
    /// Whether another try can go on with what has arrived.
    resumes: bool,
    /// Whether an earlier try is gone on with.
    pub(crate) is_resumed: bool,
}

impl Kept {
    /// Finds the journal of an earlier try, or starts one: anew if it `is_fresh`, and where nothing
    /// `resumes`. `None` where none is kept: there is no identity, or no place for it (see
    /// [`log_of`]).
    ///
    /// Whoever calls holds the lock of the destination and is about to write to it. What an earlier
    /// transfer said of it is not so any more, and goes.
    pub(crate) fn begin(
        (path, devices): (&Path, Option<&Path>),
        identity: Option<Identity>,
        (resumes, is_fresh): (bool, bool),
    ) -> Result<Option<Self>> {
        let Some(log) = log_of(path, devices)? else { return Ok(None) };
        let is_of_device = log.is_of_device();
        // Whatever happens below, this is not so any more.
        log.remove_receipt().or_else(|error| if is_of_device { Ok(()) } else { Err(error) })?;
        match Self::open(log, identity, (resumes, is_fresh)) {
            // It saves work: where there is no place for it, the transfer goes on.
            Err(error) if is_of_device || is_full(&error) => {
                tracing::warn!(%error, "no journal is kept, so that a cut means to begin again");
                Ok(None)
            }
            opened => opened,
        }
    }

    fn open(
        log: Log,
        identity: Option<Identity>,
        (resumes, is_fresh): (bool, bool),
    ) -> Result<Option<Self>> {
        let Some(identity) = identity else { return log.remove().map(|()| None) };
        let found = if is_fresh || !resumes { None } else { log.find(&identity)? };
        let resumed = found.map_or(Ok(None), |found| log.resume(found))?;
        let is_resumed = resumed.is_some();
        let journal = resumed.map_or_else(|| log.start(identity), |journal| Ok(Some(journal)))?;
        let keeper = journal.map(Keeper::new).transpose()?;
        Ok(keeper.map(|keeper| Self { log, keeper, resumes, is_resumed }))
    }

    /// Reads again what the journal claims of `disk`, and forgets what is not so; how many bytes
    /// that are. With a source, what differs from it is forgotten too.
    pub(crate) fn recheck(
        &self,
        disk: &dyn ReadBack,
        source: Option<&dyn BlockSource>,
        workers: usize,
        observer: &dyn Observer,
    ) -> Result<u64> {
        let progress = Progress::begin(observer, Phase::Recheck, self.keeper.claimed_bytes());
        let request = Recheck { disk, source, workers, monitor: &progress };
        let found = self.keeper.with_claims(|claims| recheck(request, claims))?;
        progress.end();
        Ok(found.lost.saturating_mul(UNIT_BYTES))
    }

    /// Makes what has arrived durable with `sync`, and the journal say so.
    pub(crate) fn checkpoint(&self, sync: impl FnOnce() -> mig_core::Result<()>) -> Result<()> {
        self.keeper.checkpoint(|| sync().map_err(block_mig::Error::Sink))?;
        match self.log.compact(&self.keeper) {
            Err(error) if self.log.is_of_device() => {
                tracing::warn!(%error, "the journal is not written anew");
                Ok(())
            }
            compacted => compacted,
        }
    }

    /// What notes which parts have arrived, where they can be gone on with.
    pub(crate) fn keeper(&self) -> Option<&Keeper> {
        self.resumes.then_some(&self.keeper)
    }

    /// Tells what an earlier try has left, after it was read again.
    pub(crate) fn tell(
        &self,
        tell: &mut dyn FnMut(Have) -> stream::Result<()>,
    ) -> stream::Result<()> {
        self.keeper.tell(tell)
    }

    /// Its names.
    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// Nothing is left to be gone on with.
    pub(crate) fn end(&self) -> Result<()> {
        self.log.remove()
    }
}

/// The names of the journal and the receipt of what is written in place: beside a file; of a block
/// device in `devices`, if there is such a directory.
pub(crate) fn log_of(path: &Path, devices: Option<&Path>) -> Result<Option<Log>> {
    let Ok(found) = std::fs::metadata(path) else { return Ok(None) };
    match (Device::of(&found), devices) {
        (Some(device), Some(devices)) => Ok(Some(Log::of_device(&device, devices))),
        (None, _) if found.is_file() => Log::beside(path).map(Some),
        _ => Ok(None),
    }
}

impl Log {
    /// Writes a journal that has grown too much anew.
    pub(super) fn compact(&self, keeper: &Keeper) -> Result<()> {
        keeper.compact(|| Ok(self.anew()? as Arc<dyn Storage>), || self.replace())
    }
}
