//! What the destination is to be, and whether its place is free.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use qcow2_file::lock::{self, Lock, Mode};
use qcow2_file::{Access, HostFile, Storage};

use super::in_place;
use super::options::{CopyOptions, Existing, Format};
use super::resolve::Source;
use super::shape::Shape;
use crate::publish::directory;
use crate::{Error, Observer, Result, destinations};

/// The file that holds the guest's data beside a qcow2 destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DataFileTarget {
    /// What the destination records.
    pub(crate) name: String,
    /// Where it stands.
    pub(crate) path: PathBuf,
    /// Whether it reads as a raw disk by itself.
    pub(crate) is_raw: bool,
}

/// What the destination is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// A new raw file.
    Raw,
    /// A new qcow2 file.
    Qcow2 {
        /// Its shape.
        shape: Shape,
        /// Where its data goes, if not into itself.
        data_file: Option<DataFileTarget>,
    },
    /// An existing raw file or device, written in place.
    RawInPlace,
    /// An existing qcow2 file, written in place.
    Qcow2InPlace,
}

impl Target {
    /// Decides what the destination is to be. Wishes that contradict one another are usage errors.
    pub(super) fn decide(
        options: &CopyOptions,
        source: &Source,
        observer: &dyn Observer,
    ) -> Result<Self> {
        destinations::check(&[&options.destination])?;
        if options.existing == Existing::InPlace {
            return Self::in_place(options, source, observer);
        }
        let default =
            if options.target.data_file.is_some() { Format::Qcow2 } else { source.disk.format() };
        let format = options.target_format.unwrap_or(default);
        match format {
            Format::Raw => Self::raw(options, source),
            Format::Qcow2 => Self::qcow2(options, source),
        }
    }

    fn raw(options: &CopyOptions, source: &Source) -> Result<Self> {
        if options.target != super::TargetOptions::default() {
            return usage("a raw destination takes no -o options".into());
        }
        if source.kept.is_some() {
            return usage("a raw destination has no backing file: use --flatten".into());
        }
        Ok(Self::Raw)
    }

    fn qcow2(options: &CopyOptions, source: &Source) -> Result<Self> {
        let header = source.disk.image().map(qcow2_file::Image::header);
        let shape = Shape::decide(header, &options.target)?;
        let data_file = data_file(options)?;
        let mut create = shape.create_options(source.disk.chain.virtual_size());
        create.backing = source.kept.as_ref().map(|kept| qcow2_file::create::Backing {
            name: kept.name.clone(),
            format: Some(kept.format.to_string()),
            reader: None,
        });
        // The storage is only a stand-in: the check is about names and shapes.
        create.data_file = data_file.as_ref().map(|data| qcow2_file::create::DataFile {
            name: data.name.clone().into(),
            is_raw: data.is_raw,
            storage: std::sync::Arc::new(qcow2_file::Memory::new()),
        });
        match create.check(&options.destination.to_string_lossy().into()) {
            Err(qcow2_file::Error::Refused { reason, .. }) => usage(reason),
            Err(e) => Err(e.into()),
            Ok(()) => Ok(Self::Qcow2 { shape, data_file }),
        }
    }

    fn in_place(options: &CopyOptions, source: &Source, observer: &dyn Observer) -> Result<Self> {
        if options.target != super::TargetOptions::default() {
            return usage("-o options shape new images; --in-place writes into what exists".into());
        }
        if source.kept.is_some() {
            return usage("--backing is for new images; --in-place writes into what exists".into());
        }
        Ok(match in_place::format(options, observer)? {
            Format::Raw => Self::RawInPlace,
            Format::Qcow2 => Self::Qcow2InPlace,
        })
    }

    /// Its format.
    pub(super) fn format(&self) -> Format {
        match self {
            Self::Raw | Self::RawInPlace => Format::Raw,
            Self::Qcow2 { .. } | Self::Qcow2InPlace => Format::Qcow2,
        }
    }

    /// The data file of a new image, if it has one.
    pub(super) fn data_file(&self) -> Option<&Path> {
        match self {
            Self::Qcow2 { data_file, .. } => data_file.as_ref().map(|data| data.path.as_path()),
            _ => None,
        }
    }

    /// The file that takes the guest's data.
    pub(super) fn data_path<'a>(&'a self, options: &'a CopyOptions) -> &'a Path {
        match self {
            Self::Qcow2 { data_file: Some(data), .. } => &data.path,
            _ => &options.destination,
        }
    }
}

fn is_device(metadata: &fs::Metadata) -> bool {
    metadata.file_type().is_block_device()
}

fn data_file(options: &CopyOptions) -> Result<Option<DataFileTarget>> {
    let wish = &options.target;
    let Some(name) = &wish.data_file else {
        return match wish.data_file_raw {
            Some(true) => usage("data_file_raw=on needs data_file=".into()),
            _ => Ok(None),
        };
    };
    // As whoever opens the destination will find it.
    let path = directory(&options.destination).join(name);
    destinations::check(&[&options.destination, &path])?;
    let is_raw = wish.data_file_raw.unwrap_or(false);
    Ok(Some(DataFileTarget { name: name.clone(), path, is_raw }))
}

/// What stands where files are to be made.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Why they cannot be made there.
    pub(super) refusals: Vec<Error>,
    /// Hold everybody else off what will be replaced.
    _locks: Vec<Lock>,
}

/// Looks at the places where files are to be made. What stands in the way is answered, not returned
/// as a failure.
pub(super) fn places(options: &CopyOptions, source: &Source, target: &Target) -> Places {
    let mut found = Places::default();
    let mut places = vec![options.destination.as_path()];
    if let Target::Qcow2 { data_file: Some(data), .. } = target {
        places.push(&data.path);
    }
    for path in places {
        match look_at(path, options, source) {
            Ok(lock) => found._locks.extend(lock),
            Err(refusal) => found.refusals.push(refusal),
        }
    }
    found
}

/// Looks at one place; what is to be replaced is locked.
fn look_at(path: &Path, options: &CopyOptions, source: &Source) -> Result<Option<Lock>> {
    let failed = |source| Error::File { action: "look at", path: path.to_owned(), source };
    let found = match fs::metadata(path) {
        Ok(found) => Some(found),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(failed(e)),
    };
    let Some(found) = found else { return missing(path, options).map(|()| None) };
    if found.is_dir() {
        return usage(format!("{} is a directory: name the file in it", path.display()));
    }
    if !found.is_file() && !is_device(&found) {
        return usage(format!("{} is neither a file nor a block device", path.display()));
    }
    let file = HostFile::open(path, Access::Read)?;
    let id = file.id();
    let backing =
        source.kept.as_ref().map(|k| HostFile::open(&k.path, Access::Read)).transpose()?;
    if source.disk.has_file(id) || backing.is_some_and(|b| b.id() == id) {
        return usage(format!(
            "{} is the source, or a file that it or the destination stands on",
            path.display()
        ));
    }
    match options.existing {
        Existing::Refuse => Err(Error::Exists { path: path.to_owned() }),
        Existing::Replace if !found.is_file() => {
            usage(format!("{} is a device: only --in-place writes to it", path.display()))
        }
        Existing::Replace => Ok(Some(lock::acquire(file.file(), &file.name(), Mode::Write)?)),
        // Whoever writes takes the lock.
        Existing::InPlace => Ok(None),
    }
}

fn missing(path: &Path, options: &CopyOptions) -> Result<()> {
    if options.existing == Existing::InPlace {
        let source = io::Error::from(io::ErrorKind::NotFound);
        return Err(Error::File { action: "write in place to", path: path.to_owned(), source });
    }
    // A link that leads nowhere is there all the same.
    let is_dangling = fs::symlink_metadata(path).is_ok();
    if is_dangling && options.existing == Existing::Refuse {
        return Err(Error::Exists { path: path.to_owned() });
    }
    let parent = directory(path);
    fs::metadata(parent).map(drop).map_err(|source| Error::File {
        action: "look at",
        path: parent.to_owned(),
        source,
    })
}

fn usage<T>(reason: String) -> Result<T> {
    Err(Error::Usage { reason })
}
