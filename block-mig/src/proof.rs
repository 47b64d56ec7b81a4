//! Hash what a disk reads as, from its storage.

use format_spec::content_hash::ContentHash;
use mig_core::block::BlockSource;

use crate::error::Result;
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
    let loader = Loader { source, tree: Some(&tree) };
    let work = |buffer: &mut Vec<u8>, unit: Unit| {
        loader.load(&unit, buffer)?;
        if matches!(unit.content, Content::Bytes { .. }) {
            monitor.advance(unit.len);
        }
        Ok(())
    };
    let units = Units::new(source, Scope::Whole, UNIT_BYTES);
    Pool { workers, monitor }.run(units, Vec::new, work)?;
    tree.root()
}
