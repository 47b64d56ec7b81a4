//! Writing into a raw file or a block device.

use std::sync::Arc;

use block_mig::device::RawSink;
use mig_core::block::SECTOR_BYTES;
use qcow2_file::lock::{self, Lock, Mode};
use qcow2_file::{Access, HostFile, Storage};

use super::super::plan::Job;
use super::super::{Done, new, prove};
use super::resume::Continued;
use super::{other_size, own, sync};
use crate::{Error, Observer, Phase, Result};

/// Copies into a raw file or device.
pub(super) fn copy(job: &Job<'_>, observer: &dyn Observer) -> Result<Done> {
    let path = &job.options.destination;
    let (file, _lock, len) = open(job)?;
    let size = fit(job, (&*file, len), observer)?;
    observer.warning(&format!(
        "{} is written in place: until the copy is complete it holds neither the old nor the new \
         content, and nothing in it says so",
        path.display()
    ));
    let sink = RawSink::new(file.clone(), size);
    let continued = Continued::begin(job, &sink, observer)?;
    let (is_resumed, repeated) =
        continued.as_ref().map_or((false, 0), |c| (c.is_resumed, c.repeated));
    let moved =
        new::move_data(job, &sink, continued.as_ref().and_then(Continued::keeper), observer)?;
    observer.phase(Phase::Seal);
    sync(&file, job)?;
    let proof = prove::prove(job, &own(job), &moved, &[], observer)?;
    continued.map_or(Ok(()), |continued| continued.finish((job, observer), &proof, &[]))?;
    Ok(Done { moved, proof, invalidated: Vec::new(), is_resumed, repeated })
}

/// The destination with its lock and its length, which will do.
pub(super) fn open(job: &Job<'_>) -> Result<(Arc<HostFile>, Lock, u64)> {
    let path = &job.options.destination;
    let file = Arc::new(HostFile::open(path, Access::ReadWrite)?);
    let lock = lock::acquire(file.file(), &file.name(), Mode::Write)?;
    let size = job.source.disk.chain.virtual_size();
    let failed = |source| Error::File { action: "find the size of", path: path.clone(), source };
    let len = file.len().map_err(failed)?;
    let will_do = match file.is_device() {
        true => len >= size,
        false => len.checked_next_multiple_of(SECTOR_BYTES) == Some(size),
    };
    if will_do { Ok((file, lock, len)) } else { Err(other_size(job.options, len, size)) }
}

/// Answers the disk's size. Devices come in sizes of their own: one that is longer will do. A file
/// whose last sector is not whole is made so, as it is read.
fn fit(job: &Job<'_>, (file, len): (&HostFile, u64), observer: &dyn Observer) -> Result<u64> {
    let size = job.source.disk.chain.virtual_size();
    if len > size {
        observer.warning(&format!(
            "{} is {} bytes longer than the source; they stay as they are",
            job.options.destination.display(),
            len - size
        ));
    } else if len < size {
        let path = job.options.destination.clone();
        let failed = |source| Error::File { action: "set the length of", path, source };
        file.set_len(size).map_err(failed)?;
    }
    Ok(size)
}
