//! Copy an image with its bitmaps on one host.

mod options;
mod plan;

pub use options::{
    BackingChoice, BitmapSelection, CopyOptions, Existing, Format, Rename, TargetOptions,
};
pub use plan::{Plan, PlannedBitmap, plan};

use crate::{Error, Observer, Report, Result};

/// Copies an image with its bitmaps and proves the copy. On an error nothing was published.
pub fn run(_options: &CopyOptions, _observer: &dyn Observer) -> Result<Report> {
    Err(Error::Usage { reason: "copy is not built yet".into() })
}
