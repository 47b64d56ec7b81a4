//! What a copy would do, before anything is written.

use serde::Serialize;

use super::options::{CopyOptions, Format};
use crate::{Error, Observer, Result};

/// What would become of one bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PlannedBitmap {
    /// Name at the source.
    pub name: String,
    /// Name at the destination, where it would be carried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub becomes: Option<String>,
    /// Why it would not be carried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What a copy would do (`--dry-run`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// The source as given.
    pub source: String,
    /// The destination as given.
    pub destination: String,
    /// Format of the source.
    pub source_format: Format,
    /// Format of the destination.
    pub target_format: Format,
    /// Guest-visible bytes.
    pub virtual_size: u64,
    /// Bytes of stored content that would be read.
    pub bytes_data: u64,
    /// Bytes known to read as zero.
    pub bytes_zero: u64,
    /// Upper estimate of what the destination allocates, in bytes.
    pub space_needed: u64,
    /// What the destination's file system gives, in bytes.
    pub space_free: u64,
    /// What the source has and the destination would not have, one phrase each.
    pub not_carried: Vec<String>,
    /// Every bitmap of the source.
    pub bitmaps: Vec<PlannedBitmap>,
    /// Why the copy would be refused, one sentence each; empty where it would go on.
    pub refusals: Vec<String>,
}

/// Decides what a copy would do. Writes nothing.
pub fn plan(_options: &CopyOptions, _observer: &dyn Observer) -> Result<Plan> {
    Err(Error::Usage { reason: "copy is not built yet".into() })
}
