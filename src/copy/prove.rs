//! The proof: the destination is opened afresh, as somebody else would find it, read back, and held
//! against what was sent.

use std::path::Path;

use block_mig::device::{ChainSource, StartOf};
use block_mig::fingerprint::Seed;
use block_mig::{Transferred, fingerprint_of};
use format_spec::content_hash::ContentHash;
use mig_core::block::BlockSource;
use qcow2_file::bitmaps::PersistentBitmap;
use qcow2_file::chain::Backing;

use super::bitmaps;
use super::plan::Job;
use super::target::Target;
use crate::berth::Unfinished;
use crate::disk::{Disk, Request};
use crate::hash::{content as content_hash, content_of};
use crate::observe::Progress;
use crate::report::Verified;
use crate::{Error, Observer, Phase, Result, Silent};

/// What the proof found.
#[derive(Debug)]
pub(super) struct Proof {
    pub(super) verified: Verified,
    /// The source's content, where it was hashed.
    pub(super) content: Option<ContentHash>,
    /// What differs.
    pub(super) mismatch: Option<String>,
}

/// The key under which what was read and what is read back are held against one another; none where
/// nothing is to be proved.
pub(super) fn seed(job: &Job<'_>) -> Result<Option<Seed>> {
    if job.options.no_verify {
        return Ok(None);
    }
    Ok(Some(crate::session::random_id().map_err(|source| Error::File {
        action: "read",
        path: "/dev/urandom".into(),
        source,
    })?))
}

/// Proves a new destination that still has its temporary names.
pub(super) fn new_destination(
    job: &Job<'_>,
    unfinished: &Unfinished,
    moved: &Transferred,
    stored: &[PersistentBitmap],
    observer: &dyn Observer,
) -> Result<Proof> {
    let [first, .., last] = unfinished.drafts.as_slice() else {
        let Some(only) = unfinished.drafts.first() else { return Ok(unproved(moved)) };
        let request = request(job, only.temporary());
        return prove(job, &request, moved, stored, observer);
    };
    let request =
        Request { data_file: Some(first.temporary().to_owned()), ..request(job, last.temporary()) };
    prove(job, &request, moved, stored, observer)
}

/// How the destination is opened: with the files that we made or that the user named, in no other.
fn request<'a>(job: &'a Job<'_>, path: &'a Path) -> Request<'a> {
    let kept = job.source.kept.as_ref();
    Request {
        allow_named: job.options.allow_backing,
        backing: kept
            .map_or(Backing::Named, |k| Backing::File(k.path.clone(), Some(k.format.into()))),
        ..Request::new(path, Some(job.target.format()))
    }
}

/// Opens the destination as `request` says and holds it against what was moved.
pub(super) fn prove(
    job: &Job<'_>,
    request: &Request<'_>,
    moved: &Transferred,
    stored: &[PersistentBitmap],
    observer: &dyn Observer,
) -> Result<Proof> {
    if job.options.no_verify {
        return Ok(unproved(moved));
    }
    let found = Disk::open(request, &Silent)?;
    let whole = ChainSource(&found.chain);
    let size = match job.target {
        // A device may be longer than the disk on it.
        Target::RawInPlace => moved.size().min(whole.size()),
        _ => whole.size(),
    };
    let copied = StartOf { disk: &whole, size };
    let (root, mut mismatch) = content(job, &copied, moved, observer)?;
    if mismatch.is_none() && !matches!(job.target, Target::Raw | Target::RawInPlace) {
        mismatch = bitmaps::difference(stored, &found.bitmaps)?;
    }
    let verified = if mismatch.is_none() { Verified::Yes } else { Verified::Mismatch };
    Ok(Proof { verified, content: Some(root), mismatch })
}

/// What the source's content hashes to, and in what the copy's differs, if it does.
fn content(
    job: &Job<'_>,
    copied: &StartOf<'_>,
    moved: &Transferred,
    observer: &dyn Observer,
) -> Result<(ContentHash, Option<String>)> {
    let workers = block_mig::limits::workers(job.options.workers);
    // What was written is what is there to read, but for a backing file below.
    let written = moved.bytes_data.saturating_add(moved.bytes_kept).min(job.survey.content);
    let total = job.source.kept.is_none().then_some(written);
    if let (Some(hash), Some(sent)) = (moved.content_hash, moved.fingerprint) {
        let progress = Progress::begin(observer, Phase::Prove, moved.bytes_data);
        let read = fingerprint_of(copied, sent.seed, workers, &progress)?;
        progress.end();
        if read == sent {
            return Ok((hash, None));
        }
    }
    let sent = match moved.content_hash {
        Some(hash) => hash,
        // Only a part was moved: the whole is read on both sides.
        None => content_of(&job.source.disk, workers, None, (Phase::Prove, observer))?,
    };
    let read = content_hash(copied, workers, total, (Phase::Prove, observer))?;
    let is_same = sent == read && moved.fingerprint.is_none();
    Ok((sent, (!is_same).then(|| format!("sent {sent}, read {read}"))))
}

fn unproved(moved: &Transferred) -> Proof {
    Proof { verified: Verified::No, content: moved.content_hash, mismatch: None }
}
