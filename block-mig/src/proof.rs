//! Hash what a disk reads as, from its storage.

use format_spec::content_hash::ContentHash;
use mig_core::block::BlockSource;

use crate::error::Result;
use crate::fingerprint::{Fingerprint, Seed};
use crate::limits::UNIT_BYTES;
use crate::load::{Loader, SharedTree};
use crate::monitor::Monitor;
use crate::plan::{Content, Scope, Unit, Units};
use crate::pool::Pool;

/// The content hash of a disk (SPEC 2). Reads everything but what the disk's metadata says is zero.
pub fn content_hash(
    source: &dyn BlockSource,
    workers: usize,
    monitor: &dyn Monitor,
) -> Result<ContentHash> {
    let tree = SharedTree::new(source.size())?;
    read_all(source, &tree, Pool { workers, monitor })?;
    tree.root()
}

/// The fingerprint of a disk under the key of `seed`. Reads as [`content_hash`] does.
pub fn fingerprint_of(
    source: &dyn BlockSource,
    seed: Seed,
    workers: usize,
    monitor: &dyn Monitor,
) -> Result<Fingerprint> {
    let tree = SharedTree::with(source.size(), false, Some(seed))?;
    read_all(source, &tree, Pool { workers, monitor })?;
    tree.fingerprint()
}

fn read_all(source: &dyn BlockSource, tree: &SharedTree, pool: Pool<'_>) -> Result<()> {
    let loader = Loader { source, tree: Some(tree) };
    let work = |buffer: &mut Vec<u8>, unit: Unit| {
        loader.load(&unit, buffer)?;
        if matches!(unit.content, Content::Bytes { .. }) {
            pool.monitor.advance(unit.len);
        }
        Ok(())
    };
    let units = Units::new(source, Scope::Whole, UNIT_BYTES);
    pool.run(units, Vec::new, work)
}
