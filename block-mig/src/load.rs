//! The first half of a worker's job: read a unit and hash its leaves.

use std::sync::{Mutex, PoisonError};

use format_spec::content_hash::{ContentHash, LEAF_BYTES, Placed, Tree, hash_run};
use mig_core::block::{BlockSource, is_zero};

use crate::error::{Error, Result};
use crate::plan::{Content, Unit};

/// The growing content hash of a disk, fed by any number of workers.
#[derive(Debug)]
pub struct SharedTree(Mutex<Tree>);

impl SharedTree {
    /// For a disk of `size` bytes.
    pub fn new(size: u64) -> Result<Self> {
        Ok(Self(Mutex::new(Tree::new(size)?)))
    }

    /// Hashes content that starts on a leaf boundary: whole leaves, or up to the end of the disk.
    pub fn put(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        for placed in hash_run(offset / LEAF_BYTES as u64, bytes, is_zero) {
            self.lock().put(placed.height, placed.index, placed.node)?;
        }
        Ok(())
    }

    /// Puts nodes that were made elsewhere.
    pub fn put_nodes(&self, nodes: &[Placed]) -> Result<()> {
        let mut tree = self.lock();
        Ok(nodes.iter().try_for_each(|p| tree.put(p.height, p.index, p.node))?)
    }

    /// Notes a run of zeroes on leaf boundaries.
    pub fn put_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let leaf = LEAF_BYTES as u64;
        let leaves = offset / leaf..offset.saturating_add(len).div_ceil(leaf);
        Ok(self.lock().put_zeroes(leaves)?)
    }

    /// The content hash, once everything was put.
    pub fn root(&self) -> Result<ContentHash> {
        Ok(self.lock().root()?)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Tree> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads and hashes units of one source.
#[derive(Clone, Copy)]
pub struct Loader<'a> {
    /// What is read.
    pub source: &'a dyn BlockSource,
    /// Where leaves go, if they are hashed at all.
    pub tree: Option<&'a SharedTree>,
}

impl Loader<'_> {
    /// Reads the unit's content into `buffer`, from its start, and returns it; empty for a unit
    /// without content. The leaves are hashed while they are in the cache.
    pub fn load<'b>(&self, unit: &Unit, buffer: &'b mut Vec<u8>) -> Result<&'b [u8]> {
        if !matches!(unit.content, Content::Bytes { .. }) {
            if let (Some(tree), Content::Zeroes) = (self.tree, unit.content) {
                tree.put_zeroes(unit.offset, unit.len)?;
            }
            return Ok(&[]);
        }
        let len = usize::try_from(unit.len).unwrap_or(usize::MAX);
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        let bytes = buffer.get_mut(..len).unwrap_or_default();
        self.source.read_at(bytes, unit.offset).map_err(Error::Source)?;
        if let Some(tree) = self.tree {
            tree.put(unit.offset, bytes)?;
        }
        Ok(bytes)
    }
}
