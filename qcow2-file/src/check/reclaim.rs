//! Giving back clusters that nobody refers to.

use std::sync::Arc;

use super::check;
use crate::edit::Refcounts;
use crate::error::Result;
use crate::layout::extension::{Extension, PADDING};
use crate::layout::header::Header;
use crate::limits;
use crate::storage::{Storage, StorageExt};

/// Lowers the refcount of every cluster that is counted more often than it is referred to, durably,
/// as `qemu-img check -r leaks` does, and answers how many there were. The file must not be open
/// elsewhere and `header` must be what stands in it.
///
/// Nothing is freed in an image that is corrupt, marked so or not closed, nor in one with header
/// extensions that are not known here: they may refer to clusters. A cluster stays as it is that
/// the active image alone refers to, once, without the flag that would have to say so. A cut at
/// any moment leaves fewer leaks than there were.
pub fn reclaim(file: &Arc<dyn Storage>, header: &Header) -> Result<u64> {
    use crate::layout::header::incompatible::{CORRUPT, DIRTY};
    let is_unknown =
        |e: &Extension| matches!(e, Extension::Unknown { kind, .. } if *kind != PADDING);
    let is_marked = header.incompatible_features & (CORRUPT | DIRTY) != 0;
    let mut freed: u64 = 0;
    if is_marked || header.extensions.iter().any(is_unknown) {
        return Ok(freed);
    }
    for _ in 0..limits::MAX_RECLAIM_WALKS {
        let mut report = check(file, header)?;
        let is_corrupt = report.is_corrupt();
        let mut lowered = report.lowered().peekable();
        if is_corrupt || lowered.peek().is_none() {
            break;
        }
        let mut refcounts = Refcounts::open(file.clone(), header)?;
        for (cluster, count) in lowered {
            freed += u64::from(refcounts.set(cluster, count)?);
        }
        refcounts.write_blocks()?;
        file.make_durable()?;
    }
    Ok(freed)
}
