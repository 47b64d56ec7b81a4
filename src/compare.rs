//! Compare two images as a guest and a backup program see them.

use std::path::PathBuf;

use serde::Serialize;

use crate::copy::Format;
use crate::{Error, Observer, Result};

/// What to compare, and how.
#[derive(Debug, Clone, Default)]
pub struct CompareOptions {
    /// One image.
    pub a: PathBuf,
    /// The other.
    pub b: PathBuf,
    /// Format of `a`; probed where `None`.
    pub format_a: Option<Format>,
    /// Format of `b`; probed where `None`.
    pub format_b: Option<Format>,
    /// Open backing and data files that the images name.
    pub allow_backing: bool,
    /// A longer image equals a shorter one if the rest is zero.
    pub allow_size: bool,
    /// Whether bitmaps count: `None` compares them where both sides can hold some.
    pub bitmaps: Option<bool>,
}

/// How the content of two images compares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ContentComparison {
    /// Whether a guest sees the same bytes.
    pub equal: bool,
    /// Byte offset of the first difference; the shorter size where only the sizes differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_difference: Option<u64>,
}

/// How one bitmap name compares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapComparison {
    /// The name.
    pub name: String,
    /// Whether both sides have it with the same bits, granularity and flags.
    pub equal: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Result of a comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Comparison {
    /// Whether everything that was compared is equal.
    pub equal: bool,
    /// The guest-visible content.
    pub content: ContentComparison,
    /// The bitmaps, by name; empty where they were not compared.
    pub bitmaps: Vec<BitmapComparison>,
}

impl Comparison {
    /// 0 if equal, else 1.
    pub fn exit_status(&self) -> u8 {
        u8::from(!self.equal)
    }
}

/// Compares two images. Stops reading at the first difference of content.
pub fn run(_options: &CompareOptions, _observer: &dyn Observer) -> Result<Comparison> {
    Err(Error::Usage { reason: "compare is not built yet".into() })
}
