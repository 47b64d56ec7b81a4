//! The content hash and bitmap digests of an image.

use std::path::PathBuf;

use serde::Serialize;

use crate::copy::Format;
use crate::{Error, Observer, Result};

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
pub fn run(_options: &HashOptions, _observer: &dyn Observer) -> Result<Hashes> {
    Err(Error::Usage { reason: "hash is not built yet".into() })
}
