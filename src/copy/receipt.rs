//! Receipts of copies on one host (SPEC 10): the same command finds out that it had finished.

use std::path::{Path, PathBuf};

use bitmap_mig::Bitmap;
use format_spec::content_hash::ContentHash;
use qcow2_file::bitmaps::PersistentBitmap;
use qcow2_file::{Chain, Opener};

use super::new::session;
use super::options::Format;
use super::plan::Job;
use super::prove::Proof;
use super::target::Target;
use crate::berth::{Log, Receipt, ReceiptBitmap, Recovered, change_unseen, log_of, short_words};
use crate::facts::Stamp;
use crate::report::error_chain;
use crate::{Observer, Result};

/// What an earlier run of this very copy had proved, if it had finished and nobody has touched the
/// copy since. The inner `None`: it was to prove nothing.
pub(super) fn finished(job: &Job<'_>) -> Result<Option<Option<ContentHash>>> {
    if job.options.fresh || !is_known_by_its_files(job) {
        return Ok(None);
    }
    let Some(log) = log_of(&job.options.destination, None)? else { return Ok(None) };
    let Some(receipt) = Receipt::read(&log)? else { return Ok(None) };
    // A proof that is wanted now is not there by having done without.
    let is_enough = job.options.no_verify || receipt.content.is_some();
    if !is_enough || receipt.session != job.session {
        return Ok(None);
    }
    let files = files(job);
    let is_there = receipt.is_unchanged(files.iter().map(PathBuf::as_path));
    Ok(is_there.then_some(receipt.content))
}

/// Says durably that the copy has all of its names. It has them where that cannot be said, too.
/// With what its files were like when it was proved; what is written in place has it looked at now.
pub(super) fn write_or_warn(
    job: &Job<'_>,
    (log, observer): (&Log, &dyn Observer),
    (proof, stamp): (&Proof, Option<Stamp>),
    stored: &[PersistentBitmap],
) {
    if let Err(error) = write(job, log, (proof, stamp), stored) {
        let why = error_chain(&error);
        observer.warning(&format!("the same command will not know that it had finished: {why}"));
    }
}

fn write(
    job: &Job<'_>,
    log: &Log,
    (proof, stamp): (&Proof, Option<Stamp>),
    stored: &[PersistentBitmap],
) -> Result<()> {
    // Of a source that was written to meanwhile nobody knows what was read.
    if !is_known_by_its_files(job) || session(job.options, &job.source, &job.target)? != job.session
    {
        return Ok(());
    }
    let bitmap = |stored: &PersistentBitmap| {
        let bitmap = Bitmap::from(stored.clone());
        let digest = bitmap.digest()?;
        Ok(ReceiptBitmap::of(bitmap.name.clone(), &bitmap, digest))
    };
    let bitmaps = stored.iter().map(bitmap).collect::<Result<_>>()?;
    let size = job.source.disk.chain.virtual_size();
    let target = short_words(&format!("{:?}", job.target));
    let mut receipt = Receipt::of_stored((job.session, size, target), proof.content, bitmaps);
    match stamp {
        Some(stamp) => receipt.stamp = stamp,
        None => receipt.look(files(job).iter().map(PathBuf::as_path))?,
    }
    receipt.write(log)
}

/// Of a copy whose publication a crash interrupted.
pub(super) fn of_recovered(job: &Job<'_>, log: &Log, found: &Recovered) -> Result<()> {
    if !is_known_by_its_files(job) {
        return Ok(());
    }
    // Nobody asks a copy on one host which bitmaps it has.
    let receipt = found.receipt(Vec::new());
    // Is it what was proved that has the name, and not what somebody else has put there?
    match receipt.is_unchanged(files(job).iter().map(PathBuf::as_path)) {
        true => receipt.write(log),
        false => Ok(()),
    }
}

/// Whether a write to the source or to the copy shows in their files. One to a device need not:
/// there are other ways to it.
fn is_known_by_its_files(job: &Job<'_>) -> bool {
    !job.source.disk.files().any(|file| file.is_device()) && !change_unseen(files(job))
}

/// All files that the copy reads from: in the order of their renames, and those below.
fn files(job: &Job<'_>) -> Vec<PathBuf> {
    let destination = &job.options.destination;
    let own = job.target.data_file().into_iter().chain([destination.as_path()]);
    let mut files: Vec<_> = own.map(Path::to_owned).collect();
    match &job.target {
        Target::Qcow2InPlace => files.extend(chain_of(job, destination, Format::Qcow2)),
        _ => files.extend(below(job)),
    }
    files
}

/// All files that a new copy stands on.
pub(super) fn below(job: &Job<'_>) -> Vec<PathBuf> {
    let kept = job.source.kept.iter();
    kept.flat_map(|kept| chain_of(job, &kept.path, kept.format)).collect()
}

/// An image with what it stands on, as far as that may be opened.
fn chain_of(job: &Job<'_>, image: &Path, format: Format) -> Vec<PathBuf> {
    let opener = Opener::new().allow_named_files(job.options.allow_backing);
    let chain = opener.format(Some(format.into())).open(image);
    let own = [image.to_owned()];
    own.into_iter().chain(chain.iter().flat_map(Chain::paths).map(Path::to_owned)).collect()
}
