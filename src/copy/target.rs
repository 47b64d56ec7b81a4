//! What the destination is to be, and whether its place is free.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use qcow2_file::chain::has_protocol;
use qcow2_file::lock::{self, Lock, Mode};
use qcow2_file::{Access, HostFile, Storage};

use super::in_place;
use super::options::{CopyOptions, Existing, Format, TargetOptions};
use super::resolve::Source;
use super::shape::Shape;
use crate::publish::{directory, followed, leads_elsewhere};
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

impl DataFileTarget {
    /// The data file that is asked for beside a new image. It stands where whoever opens that image
    /// by this path will look for it.
    pub(crate) fn of(destination: &Path, wish: &TargetOptions) -> Option<Self> {
        let given = wish.data_file.as_deref()?;
        // As QEMU does: it says that what follows is a path.
        let given = given.strip_prefix("file:").unwrap_or(given);
        let path = directory(destination).join(given);
        let name = match has_protocol(OsStr::new(given)) {
            true => format!("./{given}"),
            false => given.to_owned(),
        };
        Some(Self { name, path, is_raw: wish.data_file_raw.unwrap_or(false) })
    }

    /// Refuses names by which nobody would find it.
    pub(crate) fn check(destination: &Path, wish: &TargetOptions) -> Result<()> {
        let Some(given) = wish.data_file.as_deref() else { return Ok(()) };
        if given.starts_with("json:") || given.contains("://") {
            return usage(format!(
                "data_file={given} is no plain path: a data file is a file here, and one of that \
                 name is ./{given}"
            ));
        }
        let is_relative = !Path::new(given.strip_prefix("file:").unwrap_or(given)).is_absolute();
        if is_relative && leads_elsewhere(destination) {
            return usage(format!(
                "{} is a symbolic link into another directory, and data_file={given} would be \
                 looked for beside the one or the other: give the path that the link leads to, or \
                 an absolute data_file",
                destination.display()
            ));
        }
        Ok(())
    }
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
            let reason = "-o options shape new images, and --in-place writes into what exists, with \
                          the shape and the data file that it has: leave -o out, or make the image \
                          with `qemu-img create -o` first";
            return usage(reason.into());
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
    let (destination, wish) = (options.destination.as_path(), &options.target);
    let Some(data) = DataFileTarget::of(destination, wish) else {
        return match wish.data_file_raw {
            Some(true) => usage("data_file_raw=on needs data_file=".into()),
            _ => Ok(None),
        };
    };
    DataFileTarget::check(destination, wish)?;
    destinations::check(&[destination, &data.path])?;
    Ok(Some(data))
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
        Existing::Refuse | Existing::Replace if !found.is_file() => {
            Err(Error::IsDevice { path: path.to_owned(), hint: device_hint(path, options, source) })
        }
        Existing::Refuse => Err(Error::Exists { path: path.to_owned() }),
        Existing::Replace => {
            may_make(path)?;
            Ok(Some(lock::acquire(file.file(), &file.name(), Mode::Write)?))
        }
        // Whoever writes takes the lock.
        Existing::InPlace => Ok(None),
    }
}

/// What leads to a copy on a device.
fn device_hint(path: &Path, options: &CopyOptions, source: &Source) -> String {
    let (device, size) = (path.display(), source.disk.chain.virtual_size());
    let image = options.destination.display();
    if path != options.destination {
        let raw = if options.target.data_file_raw == Some(true) { ",data_file_raw=on" } else { "" };
        return format!(
            "`qemu-img create -f qcow2 -o data_file={device}{raw} {image} {size}` makes an image \
             whose data is there; then copy into it with --in-place --allow-backing and without -o"
        );
    }
    match options.target_format.unwrap_or(source.disk.format()) {
        Format::Raw => "--in-place writes to it".to_owned(),
        Format::Qcow2 => format!(
            "--in-place -O raw writes the disk to it as it is; for an image on it, first \
             `qemu-img create -f qcow2 {device} {size}`, then --in-place -O qcow2"
        ),
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
    })?;
    may_make(path)
}

/// Whether this user may make files beside `path`, where it will stand.
fn may_make(path: &Path) -> Result<()> {
    let place = followed(path)?;
    let parent = directory(&place);
    let asked = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(parent, asked).map_err(|errno| Error::File {
        action: "make files in",
        path: parent.to_owned(),
        source: errno.into(),
    })
}

fn usage<T>(reason: String) -> Result<T> {
    Err(Error::Usage { reason })
}
