//! Writing into a destination that exists: a raw file, a block device, an unfinished journal none.

use std::sync::Arc;

use block_mig::device::RawSink;
use qcow2_file::lock::{self, Mode};
use qcow2_file::{Access, HostFile, Storage};

use super::plan::Job;
use super::target::Target;
use super::{Done, new, prove};
use crate::disk::Request;
use crate::{Error, Observer, Phase, Result};

/// Copies into the existing destination. An interruption leaves it half written: the report says so.
pub(super) fn copy(job: &Job<'_>, observer: &dyn Observer) -> Result<Done> {
    match job.target {
        Target::Qcow2InPlace => Err(Error::Usage {
            reason: "writing into an existing qcow2 image is not supported yet; \
                     use --force to replace it"
                .into(),
        }),
        _ => raw(job, observer),
    }
}

fn raw(job: &Job<'_>, observer: &dyn Observer) -> Result<Done> {
    let path = &job.options.destination;
    let file = Arc::new(HostFile::open(path, Access::ReadWrite)?);
    let _lock = lock::acquire(file.file(), &file.name(), Mode::Write)?;
    let size = fit(job, &file)?;
    observer.warning(&format!(
        "{} is written in place: until the copy is complete it holds neither the old nor the new \
         content, and nothing in it says so",
        path.display()
    ));
    let moved = new::move_data(job, &RawSink::new(file.clone(), size), observer)?;
    observer.phase(Phase::Seal);
    file.file().sync_all().map_err(|source| Error::File {
        action: "sync",
        path: path.clone(),
        source,
    })?;
    drop(_lock);
    let request = Request::new(path, Some(job.target.format()));
    let proof = prove::prove(job, &request, &moved, &[], observer)?;
    Ok(Done { moved, proof, invalidated: Vec::new() })
}

/// Makes the destination as long as the disk, where it can be, and answers that size.
fn fit(job: &Job<'_>, file: &HostFile) -> Result<u64> {
    let size = job.source.disk.chain.virtual_size();
    let failed = |action| {
        move |source| Error::File { action, path: job.options.destination.clone(), source }
    };
    let len = file.len().map_err(failed("find the size of"))?;
    if len == size {
        return Ok(size);
    }
    if file.is_device() || len > size {
        let reason = format!(
            "{} has {len} bytes and the source {size}: a disk of another size would not be a copy",
            job.options.destination.display()
        );
        return Err(Error::Usage { reason });
    }
    file.set_len(size).map_err(failed("set the length of"))?;
    Ok(size)
}
