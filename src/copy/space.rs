//! Whether there is room. Pure, but for asking the file system.

use std::path::Path;

use block_mig::plan::Survey;
use qcow2_file::bitmaps::granules;
use qcow2_file::layout::geometry::Geometry;

use super::{Shape, TargetOptions};
use crate::{Error, Result};

/// For headers, snapshots of tables and whatever else is small.
const SLACK_BYTES: u64 = 1 << 20;

/// What a copy takes and what there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Space {
    /// Upper estimate of what the destination allocates.
    pub(super) needed: u64,
    /// What the file system gives.
    pub(super) free: u64,
}

/// An upper estimate of the bytes that a new qcow2 file with this content takes; `compressed` is
/// what is passed on compressed, as it is stored.
pub(super) fn qcow2_bytes(geometry: Geometry, survey: &Survey, compressed: u64) -> u64 {
    let data = rounded(survey.data, geometry).saturating_add(compressed);
    let clusters = geometry.clusters_for(data);
    let table_entries = geometry.clusters_for(survey.data.saturating_add(survey.compressed));
    let tables = table_entries.saturating_mul(geometry.l2_entry_size());
    let refcounts = (clusters << geometry.refcount_order()) / 8;
    data.saturating_add(tables).saturating_add(refcounts).saturating_add(SLACK_BYTES)
}

/// An upper estimate of what a disk takes at a destination of which nothing special is asked: a
/// qcow2 image of the usual shape, with its content plain. `bitmaps`: granularities of its own.
pub(crate) fn received_bytes(content: u64, size: u64, bitmaps: &[u64]) -> Result<u64> {
    let geometry = Shape::decide(None, &TargetOptions::default())?.geometry();
    let survey = Survey { data: content, ..Survey::default() };
    let bytes = |granularity: &u64| bitmap_bytes(geometry, size, *granularity);
    Ok(qcow2_bytes(geometry, &survey, 0).saturating_add(bitmaps.iter().map(bytes).sum()))
}

/// Bytes of a bitmap with its table, all of it set.
pub(super) fn bitmap_bytes(geometry: Geometry, size: u64, granularity: u64) -> u64 {
    let bits = u8::try_from(granularity.max(1).ilog2()).unwrap_or(u8::MAX);
    let bytes = granules(size, bits).div_ceil(8);
    rounded(bytes, geometry).saturating_add(geometry.cluster_size())
}

fn rounded(bytes: u64, geometry: Geometry) -> u64 {
    geometry.clusters_for(bytes).saturating_mul(geometry.cluster_size())
}

/// Bytes that a file system gives to us, by a directory in it.
pub(crate) fn free_bytes(directory: &Path) -> Result<u64> {
    let found = rustix::fs::statvfs(directory).map_err(|errno| Error::File {
        action: "find the free space of",
        path: directory.to_owned(),
        source: errno.into(),
    })?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}
