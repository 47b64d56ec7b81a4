//! The journal of an in-place copy, which the same command goes on with.

use block_mig::journal::{Identity, Keeper};
use block_mig::limits::{UNIT_BYTES, workers};
use block_mig::recheck::{ReadBack, Recheck, recheck};

use super::super::new;
use super::super::plan::Job;
use crate::berth::Log;
use crate::observe::Progress;
use crate::{Observer, Phase, Result};

/// A journal beside the destination.
pub(super) struct Continued {
    log: Log,
    pub(super) keeper: Keeper,
    /// Whether an earlier try is gone on with.
    pub(super) is_resumed: bool,
    /// Bytes that it had copied and that have to be copied again.
    pub(super) repeated: u64,
}

impl Continued {
    /// Finds the journal of an earlier try and reads again what it claims of `disk`, or starts one.
    /// `None` where none is kept: beside a device there is no place for files. Whoever calls holds
    /// the lock of the destination.
    pub(super) fn begin(
        job: &Job<'_>,
        disk: &dyn ReadBack,
        observer: &dyn Observer,
    ) -> Result<Option<Self>> {
        let path = &job.options.destination;
        let is_file = std::fs::metadata(path).is_ok_and(|found| found.is_file());
        let Some(session) = new::session(job)?.filter(|_| is_file) else { return Ok(None) };
        let log = Log::beside(path)?;
        let size = job.source.disk.chain.virtual_size();
        let identity = Identity { session, size, target: format!("{:?}", job.target) };
        let found = if job.options.fresh { None } else { log.find(&identity)? };
        let resumed = found.map_or(Ok(None), |found| log.resume(found))?;
        let is_resumed = resumed.is_some();
        let journal = resumed.map_or_else(|| log.start(identity), |journal| Ok(Some(journal)))?;
        let Some(keeper) = journal.map(Keeper::new).transpose()? else { return Ok(None) };
        let repeated = if is_resumed { again(job, disk, &keeper, observer)? } else { 0 };
        Ok(Some(Self { log, keeper, is_resumed, repeated }))
    }

    /// Nothing is left to be gone on with.
    pub(super) fn end(self) -> Result<()> {
        self.log.remove()
    }
}

fn again(
    job: &Job<'_>,
    disk: &dyn ReadBack,
    keeper: &Keeper,
    observer: &dyn Observer,
) -> Result<u64> {
    let progress = Progress::begin(observer, Phase::Recheck, keeper.claimed_bytes());
    let source = job.source.blocks();
    let workers = workers(job.options.workers);
    let request = Recheck { disk, source: Some(&*source), workers, monitor: &progress };
    let found = keeper.with_claims(|claims| recheck(request, claims))?;
    progress.end();
    Ok(found.lost.saturating_mul(UNIT_BYTES))
}
