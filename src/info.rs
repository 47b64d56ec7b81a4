//! What an image is: format, sizes, chain, bitmaps.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use qcow2_file::bitmaps::{Bitmaps, Entry, State};
use qcow2_file::chain::LayerFiles;
use qcow2_file::{Chain, HostFile, Image, Layer, Opener, Storage, lock};
use serde::Serialize;

use crate::Result;
use crate::copy::Format;
use crate::disk::{Stored, is_named_qcow2};

/// What to look at.
#[derive(Debug, Clone, Default)]
pub struct InfoOptions {
    /// The image.
    pub image: PathBuf,
    /// Its format; probed where `None`.
    pub format: Option<Format>,
    /// Open the files that it names, to show the chain below it. Without it they are only named.
    pub allow_backing: bool,
}

/// One layer of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LayerInfo {
    /// The file.
    pub filename: String,
    /// Its format.
    pub format: Format,
    /// Bytes that a guest would see of it alone.
    pub virtual_size: u64,
    /// Bytes that the file system allocated for it.
    pub disk_size: u64,
    /// Names of its bitmaps, which no copy of the whole chain carries.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<String>,
}

/// One bitmap of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapSummary {
    /// The name.
    pub name: String,
    /// Guest bytes per bit.
    pub granularity: u64,
    /// Whether new writes are recorded.
    pub enabled: bool,
    /// Whether it is stored in the image; always so for what a file shows.
    pub persistent: bool,
    /// Whether its content is not to be trusted.
    pub inconsistent: bool,
    /// Guest bytes that its set bits stand for; `None` for an inconsistent one.
    pub dirty_bytes: Option<u64>,
}

/// What an image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The path as given.
    pub filename: String,
    /// `raw` or `qcow2`.
    pub format: Format,
    /// Guest-visible bytes.
    pub virtual_size: u64,
    /// Bytes that the file system allocated for the file.
    pub disk_size: u64,
    /// Bytes per cluster; 0 for raw.
    pub cluster_size: u64,
    /// The backing file as the image names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The external data file as the image names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// The layers below the image, the nearest first; `None` where they were not to be opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_chain: Option<Vec<LayerInfo>>,
    /// Whether a process has the image open for writing. What is shown may be changing then, and a
    /// bitmap that this process records is inconsistent before it has closed the image.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub in_use: bool,
    /// Those processes, as "name (pid N)", where that is known.
    #[serde(skip)]
    pub users: Vec<String>,
    /// Other things worth knowing, one phrase each: snapshots, dirty bit, unfinished copy, …
    pub notes: Vec<String>,
    /// In the image's order.
    pub bitmaps: Vec<BitmapSummary>,
}

/// Looks at an image. Asks for no lock: what a running VM uses can be looked at, too.
pub fn run(options: &InfoOptions) -> Result<ImageInfo> {
    let opener = Opener::new()
        .format(options.format.map(Into::into))
        .allow_named_files(options.allow_backing)
        .without_named_files(!options.allow_backing)
        .accept_unfinished(true);
    let chain = opener.open(&options.image)?;
    let mut notes: Vec<String> = chain.warnings().iter().map(|(_, w)| w.to_string()).collect();
    let is_guess = chain.is_probed() && !is_named_qcow2(&options.image);
    if is_guess && chain.top().as_qcow2().is_some() {
        notes.push("taken for qcow2 because of its content".into());
    }
    let users = writers(&chain)?;
    let (mut bitmaps, mut header) = (Vec::new(), None);
    if let Some(image) = chain.top().as_qcow2() {
        if image.snapshot_count() > 0 {
            notes.push(format!("has {} internal snapshots", image.snapshot_count()));
        }
        let stored = Stored::of(image);
        notes.extend(stored.unlistable());
        if let Some(directory) = stored.directory() {
            bitmaps =
                directory.list().iter().map(|e| summary(directory, e)).collect::<Result<_>>()?;
        }
        header = Some(image.header());
    }
    Ok(ImageInfo {
        filename: options.image.display().to_string(),
        format: chain.top().format().into(),
        virtual_size: chain.virtual_size(),
        disk_size: chain.files().first().map_or(0, |f| allocated_bytes(&f.file)),
        cluster_size: header.map_or(0, |h| h.geometry().cluster_size()),
        backing_filename: header.and_then(|h| h.backing_file.as_deref()).map(lossy),
        data_file: header.and_then(|h| h.data_file()).map(lossy),
        backing_chain: options.allow_backing.then(|| layers_below(&chain)),
        in_use: users.is_some(),
        users: users.unwrap_or_default(),
        notes,
        bitmaps,
    })
}

/// Who writes to the image, or to its data file; `None` where nobody does.
fn writers(chain: &Chain) -> Result<Option<Vec<String>>> {
    let Some(files) = chain.files().first() else { return Ok(None) };
    let mut found = None;
    for file in std::iter::once(&files.file).chain(files.data.as_ref()) {
        found = found.or(lock::writers(file.file(), &file.name())?);
    }
    Ok(found)
}

/// A name for people and JSON: what is not UTF-8 in it is shown as such.
fn lossy(name: &OsStr) -> String {
    name.to_string_lossy().into_owned()
}

fn layers_below(chain: &Chain) -> Vec<LayerInfo> {
    let layer = |(layer, files): (&Layer, &LayerFiles)| LayerInfo {
        filename: files.file.path().display().to_string(),
        format: layer.format().into(),
        virtual_size: layer.virtual_size(),
        disk_size: allocated_bytes(&files.file),
        bitmaps: layer.as_qcow2().map(names_of_bitmaps).unwrap_or_default(),
    };
    chain.layers().iter().zip(chain.files()).skip(1).map(layer).collect()
}

fn names_of_bitmaps(image: &Image) -> Vec<String> {
    let stored = Stored::of(image);
    let listed = stored.directory().map(Bitmaps::list).unwrap_or_default();
    listed.iter().map(|entry| entry.name().to_owned()).collect()
}

/// Bytes that the file system allocated for a file.
pub(crate) fn allocated_bytes(file: &HostFile) -> u64 {
    /// What `st_blocks` counts in.
    const BLOCK_BYTES: u64 = 512;
    file.file().metadata().map_or(0, |m| m.blocks().saturating_mul(BLOCK_BYTES))
}

fn summary(directory: &Bitmaps, entry: &Entry) -> Result<BitmapSummary> {
    let inconsistent = entry.state != State::Consistent;
    let dirty_bytes = match inconsistent {
        true => None,
        false => Some(directory.count_dirty(entry.name())?.saturating_mul(entry.granularity())),
    };
    Ok(BitmapSummary {
        name: entry.name().to_owned(),
        granularity: entry.granularity(),
        enabled: entry.is_enabled(),
        persistent: true,
        inconsistent,
        dirty_bytes,
    })
}
