//! The content hash and bitmap digests of an image.

use std::path::PathBuf;

use block_mig::device::ChainSource;
use block_mig::limits::{UNIT_BYTES, workers};
use block_mig::plan::{Scope, survey};
use format_spec::content_hash::ContentHash;
use mig_core::block::BlockSource;
use qcow2_file::bitmaps::{Bitmaps, Entry, State};
use serde::Serialize;

use crate::copy::Format;
use crate::disk::{Disk, Request};
use crate::observe::Progress;
use crate::{Observer, Phase, Result};

/// What to hash.
#[derive(Debug, Clone, Default)]
pub struct HashOptions {
    /// The image.
    pub image: PathBuf,
    /// Its format; probed where `None`.
    pub format: Option<Format>,
    /// Open backing and data files that the image names.
    pub allow_backing: bool,
}

/// Digest of one bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapDigest {
    /// The name.
    pub name: String,
    /// Guest bytes per bit.
    pub granularity: u64,
    /// `bf1b:…`; an inconsistent bitmap has none.
    pub digest: Option<String>,
}

/// Hashes of an image. SPEC chapter 2.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Hashes {
    /// `bf1:…`.
    pub content_hash: String,
    /// In the image's order.
    pub bitmaps: Vec<BitmapDigest>,
}

/// Hashes an image as a guest sees it.
pub fn run(options: &HashOptions, observer: &dyn Observer) -> Result<Hashes> {
    let request = Request {
        allow_named: options.allow_backing,
        ..Request::new(&options.image, options.format)
    };
    let disk = Disk::open(&request, observer)?;
    let content_hash = content_of(&disk, workers(None), None, (Phase::Read, observer))?;
    let bitmaps = match disk.bitmaps.directory() {
        Some(directory) => directory
            .list()
            .iter()
            .map(|entry| digest_of(directory, entry))
            .collect::<Result<_>>()?,
        None => Vec::new(),
    };
    if let Some(why) = disk.bitmaps.unlistable() {
        observer.warning(&why);
    }
    Ok(Hashes { content_hash: content_hash.to_string(), bitmaps })
}

/// The content hash of an open disk, as a phase of its own. `total` is what there is to read, where
/// that is known already: finding it out means walking all metadata.
pub(crate) fn content_of(
    disk: &Disk,
    workers: usize,
    total: Option<u64>,
    watch: (Phase, &dyn Observer),
) -> Result<ContentHash> {
    content(&ChainSource(&disk.chain), workers, total, watch)
}

/// [`content_of`] any source.
pub(crate) fn content(
    source: &dyn BlockSource,
    workers: usize,
    total: Option<u64>,
    (phase, observer): (Phase, &dyn Observer),
) -> Result<ContentHash> {
    let total = match total {
        Some(total) => total,
        None => survey(source, Scope::Whole, UNIT_BYTES)?.content,
    };
    let progress = Progress::begin(observer, phase, total);
    let hash = block_mig::content_hash(source, workers, &progress)?;
    progress.end();
    Ok(hash)
}

fn digest_of(directory: &Bitmaps, entry: &Entry) -> Result<BitmapDigest> {
    let digest = match entry.state {
        State::Consistent => Some(bitmap_mig::load(directory, entry.name())?.digest()?.to_string()),
        State::Inconsistent | State::Unknown(_) => None,
    };
    let granularity = entry.granularity();
    Ok(BitmapDigest { name: entry.name().to_owned(), granularity, digest })
}
