//! What an image is: format, sizes, chain, bitmaps.

use std::path::PathBuf;

use serde::Serialize;

use crate::copy::Format;
use crate::{Error, Result};

/// What to look at.
#[derive(Debug, Clone, Default)]
pub struct InfoOptions {
    /// The image. Files that it names are shown, never opened.
    pub image: PathBuf,
    /// Its format; probed where `None`.
    pub format: Option<Format>,
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
    /// Other things worth knowing, one phrase each: snapshots, dirty bit, unfinished copy, …
    pub notes: Vec<String>,
    /// In the image's order.
    pub bitmaps: Vec<BitmapSummary>,
}

/// Looks at an image.
pub fn run(_options: &InfoOptions) -> Result<ImageInfo> {
    Err(Error::Usage { reason: "info is not built yet".into() })
}
