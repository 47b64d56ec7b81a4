//! The journal of an in-place copy, which the same command goes on with.

use block_mig::journal::{Identity, Keeper};
use block_mig::limits::workers;
use block_mig::recheck::ReadBack;

use super::super::new;
use super::super::plan::Job;
use crate::berth::Kept;
use crate::{Observer, Result};

/// The journal of the destination.
pub(super) struct Continued {
    kept: Kept,
    /// Whether an earlier try is gone on with.
    pub(super) is_resumed: bool,
    /// Bytes that it had copied and that have to be copied again.
    pub(super) repeated: u64,
}

impl Continued {
    /// Finds the journal of an earlier try and reads again what it claims of `disk`, or starts one.
    /// `None` where none is kept. Whoever calls holds the lock of the destination.
    pub(super) fn begin(
        job: &Job<'_>,
        disk: &dyn ReadBack,
        observer: &dyn Observer,
    ) -> Result<Option<Self>> {
        let size = job.source.disk.chain.virtual_size();
        let target = format!("{:?}", job.target);
        let identity = new::session(job)?.map(|session| Identity { session, size, target });
        let options = job.options;
        let place = (options.destination.as_path(), options.device_journals.as_deref());
        let kept = Kept::begin(place, identity, options.fresh)?;
        let Some(kept) = kept else { return Ok(None) };
        let (is_resumed, source) = (kept.is_resumed, job.source.blocks());
        let repeated = match is_resumed {
            true => kept.recheck(disk, Some(&*source), workers(job.options.workers), observer)?,
            false => 0,
        };
        Ok(Some(Self { kept, is_resumed, repeated }))
    }

    /// What says how far it is.
    pub(super) fn keeper(&self) -> &Keeper {
        &self.kept.keeper
    }

    /// Nothing is left to be gone on with.
    pub(super) fn end(self) -> Result<()> {
        self.kept.end()
    }
}
