//! The only place that opens a file because an image names it, under the user's permission.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::PROBE_BYTES;
use super::{Chain, Format, Layer, LayerFiles, RawLayer, foreign_format, probe};
use crate::error::{Condition, Error, Result};
use crate::image::{Image, ImageOptions, Shared};
use crate::layout::header::Header;
use crate::limits;
use crate::lock::{self, Mode};
use crate::preflight::{self, Warning};
use crate::storage::{Access, FileId, HostFile, Storage, StorageExt};

const BACKING: &str = "backing file";
const DATA: &str = "external data file";

/// What is read below the top layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Backing {
    /// What the image names, if naming is allowed.
    #[default]
    Named,
    /// This file, whatever the image names. Without a format it is probed, with a warning.
    File(PathBuf, Option<Format>),
    /// Nothing: what the top layer does not hold reads as a hole.
    Ignored,
}

/// Opens disks. By default nothing but the one file that the caller names is opened: an image that
/// names a backing file or an external data file is an [`Error::NotAllowed`].
#[derive(Debug, Clone, Default)]
pub struct Opener {
    format: Option<Format>,
    access: Access,
    allow_named_files: bool,
    without_named_files: bool,
    data_file: Option<PathBuf>,
    backing: Backing,
    accept_unfinished: bool,
    lock: bool,
}

impl Opener {
    /// Opens for reading, probes the format, allows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The format of the top layer. `None` probes it; [`Chain::is_probed`] tells. What looks like
    /// yet another format is refused then, and not taken for a raw disk.
    pub fn format(mut self, format: Option<Format>) -> Self {
        self.format = format;
        self
    }

    /// How the top layer's files are opened. The layers below are only ever read.
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Whether files that images name are opened. They are found relative to the image that names
    /// them; names that are no plain paths (`json:`, `nbd:`, …) are refused all the same.
    pub fn allow_named_files(mut self, allow: bool) -> Self {
        self.allow_named_files = allow;
        self
    }

    /// Leaves named files alone instead of failing: for looking at metadata. Data in an external
    /// data file cannot be read then, and what is in a backing file reads as a hole.
    pub fn without_named_files(mut self, without: bool) -> Self {
        self.without_named_files = without;
        self
    }

    /// The external data file of the top layer, whatever the image names.
    pub fn data_file(mut self, path: Option<PathBuf>) -> Self {
        self.data_file = path;
        self
    }

    /// What is read below the top layer.
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Opens images whose in-place copy was not finished (SPEC 3.3), too, with a warning.
    pub fn accept_unfinished(mut self, accept: bool) -> Self {
        self.accept_unfinished = accept;
        self
    }

    /// Whether every file is locked as QEMU does it, for as long as the [`Chain`] lives: the top's
    /// for what they are opened for, those below for reading. A file that another process has open
    /// in a conflicting way is an [`Error::InUse`].
    pub fn lock(mut self, lock: bool) -> Self {
        self.lock = lock;
        self
    }

    /// Opens a disk with all its layers.
    pub fn open(&self, path: &Path) -> Result<Chain> {
        Opening {
            opener: self,
            seen: HashSet::new(),
            l1_bytes: 0,
            shared: Arc::default(),
            chain: Chain {
                layers: Vec::new(),
                files: Vec::new(),
                warnings: Vec::new(),
                is_probed: self.format.is_none(),
                locks: Vec::new(),
            },
        }
        .run(path)
    }
}

/// A layer that is to be opened.
struct Next {
    path: PathBuf,
    format: Option<Format>,
}

/// One disk on its way to being open.
struct Opening<'a> {
    opener: &'a Opener,
    seen: HashSet<FileId>,
    l1_bytes: u64,
    shared: Arc<Shared>,
    chain: Chain,
}

impl Opening<'_> {
    fn run(mut self, path: &Path) -> Result<Chain> {
        let mut next = Some(Next { path: path.to_owned(), format: self.opener.format });
        while let Some(layer) = next {
            next = self.open_layer(&layer)?;
        }
        Ok(self.chain)
    }

    fn is_top(&self) -> bool {
        self.chain.layers.is_empty()
    }

    /// Opens one layer and answers which comes below it.
    fn open_layer(&mut self, next: &Next) -> Result<Option<Next>> {
        let file = self.open_file(&next.path)?;
        if self.chain.layers.len() >= limits::MAX_CHAIN_DEPTH {
            let max = limits::MAX_CHAIN_DEPTH;
            return Err(refused(&*file, format!("lies deeper than {max} layers in its chain")));
        }
        let is_probed = next.format.is_none();
        let format = match next.format {
            Some(format) => format,
            None => self.probe(&file)?,
        };
        match format {
            Format::Raw => {
                let layer = Layer::Raw(RawLayer::open(file.clone())?);
                self.add(layer, LayerFiles { file, data: None });
                Ok(None)
            }
            Format::Qcow2 => self.open_qcow2(file, is_probed),
        }
    }

    fn open_qcow2(&mut self, file: Arc<HostFile>, is_probed: bool) -> Result<Option<Next>> {
        let header = preflight::read_header(&*file)?;
        self.l1_bytes = self.l1_bytes.saturating_add(u64::from(header.l1_size).saturating_mul(8));
        if self.l1_bytes > limits::MAX_CHAIN_L1_BYTES {
            let reason = "the L1 tables of its chain need more memory than is allowed".to_owned();
            return Err(refused(&*file, reason));
        }
        let names_files = header.has_data_file() || header.backing_file.is_some();
        if is_probed && !self.is_top() && names_files {
            let reason =
                "names further files, and is taken for qcow2 only because of its content, \
                          which a guest may have written; name it as the backing file with its \
                          format, or record the format with `qemu-img rebase -u -F`"
                    .to_owned();
            return Err(refused(&*file, reason));
        }
        // Judged before any other file is touched.
        preflight::check_readable(&*file, &header, self.opener.accept_unfinished)?;
        let next = self.backing_of(&file, &header)?;
        let data = self.data_of(&file, &header)?;
        let options = ImageOptions {
            data: data.clone().map(|d| d as Arc<dyn Storage>),
            accept_unfinished: self.opener.accept_unfinished,
            shared: Some(self.shared.clone()),
        };
        let image = Image::with_header(file.clone(), header, options)?;
        let name = file.name();
        self.chain.warnings.extend(image.warnings().iter().map(|w| (name.clone(), w.clone())));
        self.add(Layer::Qcow2(Box::new(image)), LayerFiles { file, data });
        Ok(next)
    }

    fn add(&mut self, layer: Layer, files: LayerFiles) {
        self.chain.layers.push(layer);
        self.chain.files.push(files);
    }

    fn open_file(&mut self, path: &Path) -> Result<Arc<HostFile>> {
        let access = if self.is_top() { self.opener.access } else { Access::Read };
        let file = HostFile::open(path, access)?;
        if !self.seen.insert(file.id()) {
            // What the caller named is no fault of the image.
            let is_given =
                self.chain.layers.len() == 1 && matches!(self.opener.backing, Backing::File(..));
            return Err(match is_given {
                true => refused(&file, Condition::Circle.to_string()),
                false => Error::condition(file.name(), Condition::Circle),
            });
        }
        if self.opener.lock {
            let mode = match access {
                Access::Read => Mode::Read,
                Access::ReadWrite => Mode::Write,
            };
            self.chain.locks.push(lock::acquire(file.file(), &file.name(), mode)?);
        }
        Ok(Arc::new(file))
    }

    fn probe(&mut self, file: &Arc<HostFile>) -> Result<Format> {
        let mut first = [0; PROBE_BYTES];
        file.read(&mut first, 0)?;
        let format = probe(&first);
        if let (Format::Raw, Some(foreign)) = (format, foreign_format(&first)) {
            return Err(Error::Foreign { file: file.name(), format: foreign });
        }
        if let (Format::Qcow2, Some(overlay)) = (format, self.chain.layers.last()) {
            let warning = Warning::ProbedBacking { backing: file.name().to_string() };
            self.chain.warnings.push((overlay.file().name(), warning));
        }
        Ok(format)
    }

    /// What lies below an image, if anything may.
    fn backing_of(&self, file: &HostFile, header: &Header) -> Result<Option<Next>> {
        let is_top = self.is_top();
        match &self.opener.backing {
            Backing::File(path, format) if is_top => {
                return Ok(Some(Next { path: path.clone(), format: *format }));
            }
            Backing::Ignored if is_top => return Ok(None),
            _ => {}
        }
        let Some(named) = header.backing_file.as_deref() else { return Ok(None) };
        let Some(path) = self.permitted(file, BACKING, named)? else { return Ok(None) };
        let format = match header.backing_format() {
            None => None,
            Some(name) => Some(name.parse().map_err(|_| Error::Unsupported {
                file: file.name(),
                feature: format!("a backing file of format {name:?}"),
            })?),
        };
        Ok(Some(Next { path, format }))
    }

    fn data_of(&mut self, file: &HostFile, header: &Header) -> Result<Option<Arc<HostFile>>> {
        if !header.has_data_file() {
            return Ok(None);
        }
        let path = match (&self.opener.data_file, header.data_file()) {
            (Some(path), _) if self.is_top() => Some(path.clone()),
            (_, Some(named)) => self.permitted(file, DATA, named)?,
            _ if self.opener.without_named_files => None,
            _ => {
                let reason = "keeps its data in an external data file that it does not name; say \
                              which file that is"
                    .to_owned();
                return Err(refused(file, reason));
            }
        };
        path.map(|path| self.open_file(&path)).transpose()
    }

    /// The path of a file that an image names, `None` where such files are left alone.
    fn permitted(
        &self,
        file: &HostFile,
        role: &'static str,
        named: &OsStr,
    ) -> Result<Option<PathBuf>> {
        if self.opener.without_named_files {
            return Ok(None);
        }
        if !self.opener.allow_named_files {
            return Err(Error::NotAllowed {
                file: file.name(),
                role,
                named: named.to_string_lossy().into_owned(),
            });
        }
        named_path(file.path(), named).map(Some).ok_or_else(|| {
            let named = named.to_string_lossy().into_owned();
            Error::NotAPath { file: file.name(), role, named }
        })
    }
}

/// Where a file is that `image` names; `None` where the name is no plain path. `file:` says that
/// one follows: QEMU looks for a relative one where it was started, which is nowhere in particular.
pub fn named_path(image: &Path, named: &OsStr) -> Option<PathBuf> {
    if let Some(path) = named.as_bytes().strip_prefix(b"file:") {
        let path = Path::new(OsStr::from_bytes(path));
        return path.is_absolute().then(|| path.to_owned());
    }
    (!has_protocol(named)).then(|| image.parent().unwrap_or(Path::new("")).join(named))
}

/// Whether a name starts with `word:`, as QEMU tells a protocol from a path: by a colon before the
/// first slash.
pub fn has_protocol(named: &OsStr) -> bool {
    let first = named.as_bytes().split(|b| *b == b'/').next();
    first.is_some_and(|first| first.contains(&b':'))
}

fn refused(file: &dyn Storage, reason: String) -> Error {
    Error::Refused { file: file.name(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_protocols_from_paths() {
        for named in ["json:{}", "nbd://h/x", "nbd:unix:/s", "file:base.raw", "https://h/x"] {
            assert!(has_protocol(OsStr::new(named)), "{named}");
        }
        for named in ["base.raw", "/a:b", "./a:b", "../x", "dir/a:b"] {
            assert!(!has_protocol(OsStr::new(named)), "{named}");
        }
    }
}
