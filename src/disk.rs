//! Opening an image with its bitmaps, for every verb that reads one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_file::bitmaps::{Bitmaps, stale_extension};
use qcow2_file::chain::{Backing, LayerFiles};
use qcow2_file::storage::FileId;
use qcow2_file::{Chain, HostFile, Image, Layer, Opener};

use crate::copy::Format;
use crate::{Error, Observer, Result};

/// Endings of file names that no qcow2 image has.
const RAW_ENDINGS: [&str; 4] = ["raw", "dd", "iso", "bin"];
/// Endings that say qcow2.
const QCOW2_ENDINGS: [&str; 2] = ["qcow2", "qcow"];

/// What to open, and what may be opened with it.
#[derive(Debug, Clone)]
pub(crate) struct Request<'a> {
    pub(crate) path: &'a Path,
    pub(crate) format: Option<Format>,
    /// What the user says before the name of the format, for a hint.
    pub(crate) format_option: &'static str,
    /// Whether files that the image names may be opened.
    pub(crate) allow_named: bool,
    pub(crate) backing: Backing,
    /// Whether the image is looked at by itself: nothing that it names is opened, or locked.
    pub(crate) only_top: bool,
    pub(crate) data_file: Option<PathBuf>,
    /// Whether an image whose in-place copy is not finished may be read.
    pub(crate) accepts_unfinished: bool,
    /// Whether the caller holds the locks, so that taking them again would fail.
    pub(crate) is_locked_already: bool,
}

impl<'a> Request<'a> {
    /// Just this file, whatever it is.
    pub(crate) fn new(path: &'a Path, format: Option<Format>) -> Self {
        Self {
            path,
            format,
            format_option: "-f ",
            allow_named: false,
            backing: Backing::Named,
            only_top: false,
            data_file: None,
            accepts_unfinished: false,
            is_locked_already: false,
        }
    }
}

/// What a disk's top layer has in the way of bitmaps.
#[derive(Debug)]
pub(crate) enum Stored {
    /// It has none, or could have none.
    None,
    /// It has some, each of which may or may not be usable.
    Some(Bitmaps),
    /// It had that many, until a program that does not know them wrote to the image.
    Stale(u32),
    /// Their directory is damaged.
    Damaged(qcow2_file::Error),
}

impl Stored {
    /// Bitmaps of an image.
    pub(crate) fn of(image: &Image) -> Self {
        if let Some(stale) = stale_extension(image.header()) {
            return Self::Stale(stale.count);
        }
        match Bitmaps::open(image.file().clone(), image.header()) {
            Ok(None) => Self::None,
            Ok(Some(bitmaps)) => Self::Some(bitmaps),
            Err(error) => Self::Damaged(error),
        }
    }

    /// Why bitmaps that are there cannot even be listed, if so.
    pub(crate) fn unlistable(&self) -> Option<String> {
        match self {
            Self::None | Self::Some(_) => None,
            Self::Stale(count) => Some(format!(
                "its {count} bitmaps were made invalid by a program that wrote to the image \
                 without knowing them"
            )),
            Self::Damaged(error) => {
                let why = crate::report::error_chain(error);
                Some(format!("its bitmap directory is damaged: {why}"))
            }
        }
    }

    /// The directory, where it can be read.
    pub(crate) fn directory(&self) -> Option<&Bitmaps> {
        match self {
            Self::Some(bitmaps) => Some(bitmaps),
            _ => None,
        }
    }
}

/// An image that is open for reading, with everything below it, locked against writers.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) chain: Chain,
    pub(crate) bitmaps: Stored,
}

impl Disk {
    /// Opens and locks an image. What the user should know goes to `observer`.
    pub(crate) fn open(request: &Request<'_>, observer: &dyn Observer) -> Result<Self> {
        let chain = opener(request).open(request.path)?;
        check_probe((request.path, request.format_option), &chain, observer)?;
        for (file, warning) in chain.warnings() {
            observer.warning(&format!("{file} {warning}"));
        }
        let bitmaps = chain.top().as_qcow2().map_or(Stored::None, Stored::of);
        Ok(Self { chain, bitmaps })
    }

    /// The format that a file has by its content, if that is a safe guess. `option`: what the user
    /// says before the name of a format.
    pub(crate) fn guess(
        (path, option): (&Path, &'static str),
        opener: &Opener,
        observer: &dyn Observer,
    ) -> Result<Format> {
        let chain = opener.open(path)?;
        check_probe((path, option), &chain, observer)?;
        Ok(chain.top().format().into())
    }

    /// Format of the top layer.
    pub(crate) fn format(&self) -> Format {
        self.chain.top().format().into()
    }

    /// The top layer, where it is qcow2.
    pub(crate) fn image(&self) -> Option<&Image> {
        self.chain.top().as_qcow2()
    }

    /// Snapshots inside the image, which nobody carries elsewhere.
    pub(crate) fn snapshots(&self) -> Option<String> {
        let count = self.image().map_or(0, Image::snapshot_count);
        (count > 0).then(|| format!("{count} internal snapshots"))
    }

    /// The layers below the image, where they are read through.
    pub(crate) fn flattened(&self) -> Option<String> {
        let count = self.chain.layers().len().saturating_sub(1);
        (count > 0).then(|| format!("backing chain of {count} layers: flattened into the copy"))
    }

    /// The bitmaps of layers below the image, of which `layers` with it are read through: only the
    /// image's own are carried.
    pub(crate) fn bitmaps_below(&self, layers: usize) -> Vec<String> {
        let below = self.chain.layers().iter().zip(self.chain.files()).take(layers).skip(1);
        let phrase = |(layer, files): (&Layer, &LayerFiles)| {
            let stored = Stored::of(layer.as_qcow2()?);
            let names: Vec<_> = match stored.directory() {
                Some(directory) => {
                    directory.list().iter().map(|entry| format!("{:?}", entry.name())).collect()
                }
                None => {
                    let unknown = stored.unlistable().map(|_| "that cannot be listed".to_owned());
                    unknown.into_iter().collect()
                }
            };
            let file = files.file.path().display();
            (!names.is_empty()).then(|| {
                format!("bitmaps {} of {file}, below the image: only its own are", names.join(", "))
            })
        };
        below.filter_map(phrase).collect()
    }

    /// Every file of every layer.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Arc<HostFile>> {
        self.chain.files().iter().flat_map(|f| std::iter::once(&f.file).chain(f.data.as_ref()))
    }

    /// Whether one of its files is that one.
    pub(crate) fn has_file(&self, id: FileId) -> bool {
        self.files().any(|f| f.id() == id)
    }

    /// Position of the layer whose file is that one.
    pub(crate) fn depth_of(&self, id: FileId) -> Option<usize> {
        self.chain.files().iter().position(|f| f.file.id() == id)
    }
}

fn opener(request: &Request<'_>) -> Opener {
    Opener::new()
        .format(request.format.map(Into::into))
        .allow_named_files(request.allow_named)
        .backing(request.backing.clone())
        .without_named_files(request.only_top)
        .data_file(request.data_file.clone())
        .accept_unfinished(request.accepts_unfinished)
        .lock(!request.is_locked_already)
}

/// A guest can write a qcow2 header to the start of its raw disk: who has only looked at the
/// content does not take it for qcow2 without a word.
pub(crate) fn check_probe(
    (path, option): (&Path, &str),
    chain: &Chain,
    observer: &dyn Observer,
) -> Result<()> {
    if !chain.is_probed() || matches!(chain.top(), Layer::Raw(_)) {
        return Ok(());
    }
    let name = path.display();
    let is_device = chain.files().first().is_some_and(|f| f.file.is_device());
    if is_device || is_named_raw(path) {
        let reason = format!(
            "{name} holds a qcow2 header, which the guest of a raw disk could have written; \
             say which it is: {option}raw or {option}qcow2"
        );
        return Err(Error::Usage { reason });
    }
    if !is_named_qcow2(path) {
        observer.warning(&format!(
            "{name} is taken for qcow2 because of its content, which the guest of a raw disk could \
             have written; use {option}qcow2 or {option}raw to be sure"
        ));
    }
    Ok(())
}

/// Whether the name says qcow2.
pub(crate) fn is_named_qcow2(path: &Path) -> bool {
    QCOW2_ENDINGS.contains(&ending(path).as_str())
}

/// Whether the name says raw.
pub(crate) fn is_named_raw(path: &Path) -> bool {
    RAW_ENDINGS.contains(&ending(path).as_str())
}

fn ending(path: &Path) -> String {
    path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_lowercase()
}
