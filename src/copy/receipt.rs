//! Receipts of copies on one host (SPEC 10): the same command finds out that it had finished.

use std::path::{Path, PathBuf};

use bitmap_mig::Bitmap;
use format_spec::content_hash::ContentHash;
use qcow2_file::bitmaps::PersistentBitmap;
use qcow2_file::{Chain, Opener};

use super::new::session;
use super::plan::Job;
use super::prove::Proof;
use super::target::Target;
use crate::Result;
use crate::berth::{Log, Receipt, ReceiptBitmap, log_of, short_words};

/// What an earlier run of this very copy had proved, if it had finished and nobody has touched the
/// copy since. The inner `None`: it was to prove nothing.
pub(super) fn finished(job: &Job<'_>) -> Result<Option<Option<ContentHash>>> {
    if job.options.fresh {
        return Ok(None);
    }
    let Some(log) = log_of(&job.options.destination, None)? else { return Ok(None) };
    let Some(receipt) = Receipt::read(&log)? else { return Ok(None) };
    // A proof that is wanted now is not there by having done without.
    let is_enough = job.options.no_verify || receipt.content.is_some();
    if !is_enough || receipt.session != session(job)? {
        return Ok(None);
    }
    let files = files(job);
    let is_there = receipt.is_unchanged(files.iter().map(PathBuf::as_path));
    Ok(is_there.then_some(receipt.content))
}

/// Says durably that the copy has all of its names.
pub(super) fn write(
    job: &Job<'_>,
    log: &Log,
    proof: &Proof,
    stored: &[PersistentBitmap],
) -> Result<()> {
    let bitmap = |stored: &PersistentBitmap| {
        let bitmap = Bitmap::from(stored.clone());
        let digest = bitmap.digest()?;
        Ok(ReceiptBitmap::of(bitmap.name.clone(), &bitmap, digest))
    };
    let bitmaps = stored.iter().map(bitmap).collect::<Result<_>>()?;
    let size = job.source.disk.chain.virtual_size();
    let target = short_words(&format!("{:?}", job.target));
    let mut receipt = Receipt::of_stored((session(job)?, size, target), proof.content, bitmaps);
    let files = files(job);
    receipt.write(log, files.iter().map(PathBuf::as_path))
}

/// All files that the copy reads from.
fn files(job: &Job<'_>) -> Vec<PathBuf> {
    let destination = &job.options.destination;
    let mut files = vec![destination.clone()];
    match &job.target {
        Target::Qcow2 { data_file, .. } => {
            files.extend(data_file.iter().map(|data| data.path.clone()));
            files.extend(job.source.kept.iter().map(|kept| kept.path.clone()));
        }
        Target::Qcow2InPlace => {
            let opener = Opener::new().allow_named_files(job.options.allow_backing);
            let chain = opener.format(Some(qcow2_file::Format::Qcow2)).open(destination);
            // One that does not open is told apart by its own file.
            files.extend(chain.iter().flat_map(Chain::paths).map(Path::to_owned));
        }
        Target::Raw | Target::RawInPlace => {}
    }
    files
}
