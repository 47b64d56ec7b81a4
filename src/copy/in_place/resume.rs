//! The journal of an in-place copy, which the same command goes on with.

use block_mig::journal::{Identity, Keeper};
use block_mig::limits::workers;
use block_mig::recheck::ReadBack;
use qcow2_file::bitmaps::PersistentBitmap;

use super::super::plan::Job;
use super::super::prove::Proof;
use super::super::{new, receipt};
use crate::berth::{Kept, log_of, short_words};
use crate::report::Verified;
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
        let target = short_words(&format!("{:?} {}", job.target, job.command));
        let identity = Identity { session: job.session, size, target };
        let options = job.options;
        let place = (options.destination.as_path(), options.device_journals.as_deref());
        if job.adopts()
            && let Some(log) = log_of(place.0, place.1)?
        {
            log.adopt(&identity)?;
        }
        let kept = Kept::begin(place, Some(identity), (new::resumes(job), options.fresh))?;
        let Some(kept) = kept else { return Ok(None) };
        let (is_resumed, source) = (kept.is_resumed, job.source.blocks());
        let repeated = match is_resumed {
            true => kept.recheck(disk, Some(&*source), workers(job.options.workers), observer)?,
            false => 0,
        };
        Ok(Some(Self { kept, is_resumed, repeated }))
    }

    /// What says how far it is, where that can be gone on with.
    pub(super) fn keeper(&self) -> Option<&Keeper> {
        self.kept.keeper()
    }

    /// Nothing is left to be gone on with.
    pub(super) fn end(self) -> Result<()> {
        self.kept.end()
    }

    /// All is there, as was asked for. A device has no receipt: nobody can tell what it holds
    /// without reading it.
    pub(super) fn finish(
        self,
        (job, observer): (&Job<'_>, &dyn Observer),
        proof: &Proof,
        stored: &[PersistentBitmap],
    ) -> Result<()> {
        if !self.kept.log().is_of_device() && proof.verified != Verified::Mismatch {
            receipt::write_or_warn(job, (self.kept.log(), observer), (proof, None), stored);
        }
        self.end()
    }
}
