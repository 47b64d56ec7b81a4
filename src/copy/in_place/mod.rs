//! Writing into a destination that exists.
//!
//! A qcow2 destination says by a feature bit that it is unfinished (SPEC 3.3), so that nobody takes
//! it for a disk; a raw one cannot say it. The journal of either stands beside it, that of a device
//! in a directory for the purpose.

mod qcow2;
mod raw;
mod resume;

use std::sync::Arc;

use qcow2_file::chain::{PROBE_BYTES, probe};
use qcow2_file::{Access, GuestOffset, HostFile, Opener, Storage};

pub(crate) use self::qcow2::{backing, invalidated, open_editor, open_editor_in, suspend};

use super::Done;
use super::options::{CopyOptions, Format};
use super::plan::Job;
use super::resolve::Source;
use super::target::Target;
use crate::disk::{Disk, Request, Stored, is_named_raw};
use crate::{Error, Observer, Result};

/// What stands at the destination.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Found {
    /// Names of its bitmaps.
    pub(super) bitmaps: Vec<String>,
    /// Whether it is a qcow2 image that cannot have bitmaps.
    pub(super) is_version_2: bool,
}

/// Copies into the existing destination. An interruption leaves it half written.
pub(super) fn copy(job: &Job<'_>, observer: &dyn Observer) -> Result<Done> {
    match job.target {
        Target::Qcow2InPlace => qcow2::copy(job, observer),
        _ => raw::copy(job, observer),
    }
}

/// The format of a destination that exists: asked for, or what it is.
pub(super) fn format(options: &CopyOptions, observer: &dyn Observer) -> Result<Format> {
    let path = options.destination.as_path();
    let file = HostFile::open(path, Access::Read)?;
    if options.target_format.is_none() && file.is_device() && !holds_qcow2(&file)? {
        return Ok(Format::Raw);
    }
    let opener = Opener::new().without_named_files(true).accept_unfinished(true);
    match options.target_format {
        Some(format) => Ok(format),
        None => Disk::guess((path, "-O "), &opener, observer),
    }
}

/// Whether a file begins as qcow2 images do.
fn holds_qcow2(file: &HostFile) -> Result<bool> {
    let mut first = [0; PROBE_BYTES];
    file.read_at(&mut first, 0).map_err(|source| qcow2_file::Error::Io {
        file: file.name(),
        action: "read",
        offset: 0,
        source,
    })?;
    Ok(probe(&first) == qcow2_file::Format::Qcow2)
}

/// Looks at the destination, and whether the source fits it.
pub(super) fn inspect(options: &CopyOptions, source: &Source, target: &Target) -> Result<Found> {
    match target {
        Target::Qcow2InPlace => inspect_qcow2(options, source),
        Target::RawInPlace => keep_image(options, source).map(|()| Found::default()),
        _ => Ok(Found::default()),
    }
}

/// Refuses to write a raw disk over the header of an image, with which all that the image holds
/// would be gone. Not where the name says raw, or a device has none that says anything, and not
/// where the source begins the same: it is what an earlier try has written.
fn keep_image(options: &CopyOptions, source: &Source) -> Result<()> {
    let path = options.destination.as_path();
    let file = HostFile::open(path, Access::Read)?;
    if file.is_device() || is_named_raw(path) || !holds_qcow2(&file)? {
        return Ok(());
    }
    let (mut found, mut wanted) = ([0; PROBE_BYTES], [0; PROBE_BYTES]);
    let chain = &source.disk.chain;
    if chain.virtual_size() >= PROBE_BYTES as u64 {
        chain.read_at(&mut wanted, GuestOffset(0))?;
        let read = file.read_at(&mut found, 0);
        if read.is_ok() && found == wanted {
            return Ok(());
        }
    }
    Err(Error::WouldLose {
        reason: format!(
            "{} is a qcow2 image, and a raw disk written over it would destroy its header and with \
             it its snapshots and bitmaps",
            path.display()
        ),
        hint: "-O qcow2 writes into the image, and --force in the place of --in-place replaces it \
               by a raw file"
            .to_owned(),
    })
}

/// Looks at a qcow2 destination.
fn inspect_qcow2(options: &CopyOptions, source: &Source) -> Result<Found> {
    let file = HostFile::open(&options.destination, Access::Read)?;
    if !holds_qcow2(&file)? {
        let condition = qcow2_file::Condition::NoImage;
        return Err(qcow2_file::Error::Condition { file: file.name(), condition }.into());
    }
    let opener = Opener::new()
        .format(Some(qcow2_file::Format::Qcow2))
        .without_named_files(true)
        .accept_unfinished(true);
    let chain = opener.open(&options.destination)?;
    let (size, wanted) = (chain.virtual_size(), source.disk.chain.virtual_size());
    if size != wanted {
        return Err(other_size(options, size, wanted));
    }
    let Some(image) = chain.top().as_qcow2() else { return Ok(Found::default()) };
    let stored = Stored::of(image);
    let listed = stored.directory().map(|d| d.list()).unwrap_or_default();
    Ok(Found {
        bitmaps: listed.iter().map(|entry| entry.name().to_owned()).collect(),
        is_version_2: image.header().version < 3,
    })
}

/// Looks whether the destination can be opened for writing now, and fits: what [`copy`] does before
/// it writes. Nothing is kept open.
pub(super) fn check(job: &Job<'_>) -> Result<()> {
    match job.target {
        Target::RawInPlace => raw::open(job).map(drop),
        Target::Qcow2InPlace => qcow2::open(job).map(drop),
        Target::Raw | Target::Qcow2 { .. } => Ok(()),
    }
}

fn other_size(options: &CopyOptions, found: u64, wanted: u64) -> Error {
    Error::Usage {
        reason: format!(
            "{} has {found} bytes and the source {wanted}: a disk of another size would not be a \
             copy",
            options.destination.display()
        ),
    }
}

/// How the destination is opened for the proof: as it is, without locks, since we hold them.
fn own<'a>(job: &'a Job<'_>) -> Request<'a> {
    Request {
        allow_named: job.options.allow_backing,
        accepts_unfinished: true,
        is_locked_already: true,
        ..Request::new(&job.options.destination, Some(job.target.format()))
    }
}

fn sync(file: &Arc<HostFile>, job: &Job<'_>) -> Result<()> {
    file.file().sync_all().map_err(|source| Error::File {
        action: "sync",
        path: job.options.destination.clone(),
        source,
    })
}
