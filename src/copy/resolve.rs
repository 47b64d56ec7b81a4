//! What is copied: the source with whatever below it may be opened, and which of its layers count.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use block_mig::device::{AboveSource, ChainSource};
use block_mig::plan::Scope;
use mig_core::block::BlockSource;
use qcow2_file::chain::{Backing, has_protocol, named_path};
use qcow2_file::{Access, HostFile, Opener, Storage};

use super::options::{BackingChoice, CopyOptions, Format};
use crate::disk::{Disk, Request};
use crate::publish::{directory, leads_elsewhere};
use crate::{Error, Observer, Result};

/// The backing file that the destination is to keep.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    /// Where it is, as the user said.
    pub(super) path: PathBuf,
    /// What the destination records.
    pub(super) name: OsString,
    /// Its format.
    pub(super) format: Format,
    /// How many layers of the source stand above it.
    pub(super) layers: usize,
}

/// What is copied.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) disk: Disk,
    pub(super) kept: Option<Kept>,
    /// Its files as they were when it was opened.
    opened: Vec<FileState>,
}

/// What shows that a file was changed by somebody who does not ask for locks.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FileState {
    len: u64,
    /// Seconds and nanoseconds; a device has none that tells.
    modified: Option<(i64, i64)>,
}

impl FileState {
    fn of(file: &HostFile) -> Result<Self> {
        let failed = |source| Error::File { action: "look at", path: file.path().into(), source };
        let found = file.file().metadata().map_err(failed)?;
        let modified = (!file.is_device()).then(|| (found.mtime(), found.mtime_nsec()));
        Ok(Self { len: file.len().map_err(failed)?, modified })
    }
}

impl Source {
    /// Opens the source as the options allow.
    pub(super) fn open(options: &CopyOptions, observer: &dyn Observer) -> Result<Self> {
        let request = Request {
            allow_named: options.allow_backing || options.backing == BackingChoice::Flatten,
            ..Request::new(&options.source, options.source_format)
        };
        match &options.backing {
            BackingChoice::Keep(path) => Self::open_above(options, request, path, observer),
            _ => Self::new(Disk::open(&request, observer)?, None),
        }
    }

    /// Opens a source of which only what stands above `path` is copied.
    fn open_above(
        options: &CopyOptions,
        request: Request<'_>,
        path: &Path,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let id = HostFile::open(path, Access::Read)?.id();
        let backing = match options.allow_backing {
            true => Backing::Named,
            // What the user names may be opened; what the image names may not.
            false => {
                let (named, format) = recorded(&request)?;
                named.map_or(Ok(()), |named| is_that(&request, &named, (path, observer)))?;
                Backing::File(path.to_owned(), format)
            }
        };
        let disk = Disk::open(&Request { backing, ..request }, observer)?;
        if disk.chain.layers().len() < 2 {
            let reason = format!(
                "{} has no backing file, so nothing of it stands above {}",
                options.source.display(),
                path.display()
            );
            return Err(Error::Usage { reason });
        }
        let depth = disk.depth_of(id);
        if depth.is_none() && options.no_verify {
            let reason = format!(
                "{} is not in the source's backing chain, and only the proof can tell whether it \
                 reads the same",
                path.display()
            );
            let hint = "leave --no-verify out".to_owned();
            return Err(Error::WouldLose { reason, hint });
        }
        let layers = depth.unwrap_or_else(|| {
            observer.warning(&format!(
                "{} is not in the source's backing chain; whether it reads the same is only known \
                 from the proof",
                path.display()
            ));
            1
        });
        if layers == 0 {
            return Err(Error::Usage { reason: "the source cannot be its own backing".into() });
        }
        let format = match depth.and_then(|depth| disk.chain.layers().get(depth)) {
            Some(layer) => layer.format().into(),
            None => {
                let opener = Opener::new().without_named_files(true);
                Disk::guess((path, "-f "), &opener, observer)?
            }
        };
        let name = recorded_name(path, &options.destination)?;
        Self::new(disk, Some(Kept { path: path.to_owned(), name, format, layers }))
    }

    fn new(disk: Disk, kept: Option<Kept>) -> Result<Self> {
        let opened = disk.files().map(|file| FileState::of(file)).collect::<Result<_>>()?;
        Ok(Self { disk, kept, opened })
    }

    /// Looks whether the source is still what was opened: beyond the end of a file that was cut
    /// everything reads as zero, and nobody would see that.
    pub(super) fn check_unchanged(&self, observer: &dyn Observer) -> Result<()> {
        for (file, before) in self.disk.files().zip(&self.opened) {
            let now = FileState::of(file)?;
            if now.len < before.len {
                let source = io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("it was cut from {} to {} bytes meanwhile", before.len, now.len),
                );
                return Err(Error::File { action: "read", path: file.path().into(), source });
            }
            if now != *before {
                observer.warning(&format!(
                    "{} was written to while it was copied, by a program that takes no locks; the \
                     copy is what was read",
                    file.path().display()
                ));
            }
        }
        Ok(())
    }

    /// What is to be moved, as a disk.
    pub(super) fn blocks(&self) -> Box<dyn BlockSource + '_> {
        match &self.kept {
            Some(kept) => Box::new(AboveSource { chain: &self.disk.chain, layers: kept.layers }),
            None => Box::new(ChainSource(&self.disk.chain)),
        }
    }

    /// What its holes mean.
    pub(super) fn scope(&self) -> Scope {
        if self.kept.is_some() { Scope::Above } else { Scope::Whole }
    }
}

/// The backing file as the source records it, and its format. It is not opened.
fn recorded(request: &Request<'_>) -> Result<(Option<PathBuf>, Option<qcow2_file::Format>)> {
    let opener = Opener::new().format(request.format.map(Into::into)).without_named_files(true);
    let chain = opener.open(request.path)?;
    let header = chain.top().as_qcow2().map(qcow2_file::Image::header);
    let named = header.and_then(|header| header.backing_file.as_deref());
    let format = header.and_then(qcow2_file::layout::header::Header::backing_format);
    // What is no path is looked for as if it were one, and not found.
    let path = named.map(|named| {
        let path = named_path(request.path, named);
        path.unwrap_or_else(|| directory(request.path).join(named))
    });
    Ok((path, format.and_then(|name| name.parse().ok())))
}

/// Holds the backing file that the user names against the one that the image names, without opening
/// it: what is between them is not copied, and a proof that reads through the user's alone would
/// not miss it.
fn is_that(
    request: &Request<'_>,
    named: &Path,
    (path, observer): (&Path, &dyn Observer),
) -> Result<()> {
    let id = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino()));
    let (image, shown) = (request.path.display(), path.display());
    match (id(named), id(path)) {
        (Ok(named), Ok(found)) if named == found => Ok(()),
        (Err(error), _) if error.kind() == io::ErrorKind::NotFound => {
            observer.warning(&format!(
                "{image} names {} as its backing file, which is not there; {shown} is taken for it",
                named.display()
            ));
            Ok(())
        }
        _ => Err(Error::WouldLose {
            reason: format!(
                "{image} stands on {}, not directly on {shown}: what is between them would be lost \
                 unseen",
                named.display()
            ),
            hint: "use --allow-backing, so that all of it is read and proved".into(),
        }),
    }
}

/// How a backing file is named inside the destination: by its file name where both are in the same
/// directory and the user gave no absolute path, else absolutely.
pub(crate) fn recorded_name(path: &Path, destination: &Path) -> Result<OsString> {
    let is_neighbour = path.is_relative()
        && directory(path) == directory(destination)
        && !leads_elsewhere(destination);
    let named = match path.file_name() {
        // What has a colon would be taken for a protocol.
        Some(name) if is_neighbour && has_protocol(name) => Path::new(".").join(name),
        Some(name) if is_neighbour => PathBuf::from(name),
        _ => std::path::absolute(path).map_err(|source| Error::File {
            action: "find",
            path: path.to_owned(),
            source,
        })?,
    };
    Ok(named.into_os_string())
}
