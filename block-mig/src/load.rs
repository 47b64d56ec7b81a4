//! The first half of a worker's job: read a unit and hash its leaves.

use std::sync::{Mutex, MutexGuard, PoisonError};

use format_spec::content_hash::{
    ContentHash, LEAF_BYTES, Missing, Placed, Tree, hash_run, leaf_count,
};
use mig_core::block::{BlockSource, is_zero, on_page};

use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Key, Seed};
use crate::plan::{Content, Unit};

/// The growing hashes of a disk, fed by any number of workers: its content hash, the fingerprint of
/// one copy (see [`fingerprint`](crate::fingerprint)), or both.
#[derive(Debug)]
pub struct SharedTree {
    size: u64,
    content: Option<Mutex<Tree>>,
    marks: Option<Marks>,
}

#[derive(Debug)]
struct Marks {
    seed: Seed,
    key: Key,
    tree: Mutex<Tree>,
}

impl SharedTree {
    /// The content hash of a disk of `size` bytes.
    pub fn new(size: u64) -> Result<Self> {
        Self::with(size, true, None)
    }

    /// The content hash where it `hashes`, the fingerprint where there is a seed for one.
    pub fn with(size: u64, hashes: bool, seed: Option<Seed>) -> Result<Self> {
        let tree = || Tree::new(size).map(Mutex::new);
        let marks = |seed| Ok::<_, Error>(Marks { seed, key: Key::new(&seed), tree: tree()? });
        let content = hashes.then(tree).transpose()?;
        Ok(Self { size, content, marks: seed.map(marks).transpose()? })
    }

    /// Hashes content that starts on a leaf boundary: whole leaves, or up to the end of the disk.
    pub fn put(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let first = offset / LEAF_BYTES as u64;
        if let Some(tree) = &self.content {
            put_all(tree, hash_run(first, bytes, is_zero))?;
        }
        if let Some(Marks { key, tree, .. }) = &self.marks {
            put_all(tree, key.hash_run(first, bytes))?;
        }
        Ok(())
    }

    /// [`put`](Self::put) of content whose nodes were made elsewhere.
    pub fn put_nodes(&self, nodes: &[Placed], offset: u64, bytes: &[u8]) -> Result<()> {
        if let Some(tree) = &self.content {
            put_all(tree, nodes.iter().copied())?;
        }
        if let Some(Marks { key, tree, .. }) = &self.marks {
            put_all(tree, key.hash_run(offset / LEAF_BYTES as u64, bytes))?;
        }
        Ok(())
    }

    /// Notes a run of zeroes on leaf boundaries.
    pub fn put_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let leaf = LEAF_BYTES as u64;
        let leaves = offset / leaf..offset.saturating_add(len).div_ceil(leaf);
        let marks = self.marks.as_ref().map(|m| &m.tree);
        for tree in self.content.iter().chain(marks) {
            lock(tree).put_zeroes(leaves.clone())?;
        }
        Ok(())
    }

    /// The content hash, once everything was put. Nothing was, where only a fingerprint is made.
    pub fn root(&self) -> Result<ContentHash> {
        let tree = self.content.as_ref().ok_or_else(|| self.nothing())?;
        Ok(lock(tree).root()?)
    }

    /// The fingerprint, once everything was put. Nothing was, where no seed was given.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        let Marks { seed, tree, .. } = self.marks.as_ref().ok_or_else(|| self.nothing())?;
        Ok(Fingerprint { seed: *seed, root: lock(tree).root()? })
    }

    fn nothing(&self) -> Missing {
        Missing { leaves: 0..leaf_count(self.size) }
    }
}

fn put_all(tree: &Mutex<Tree>, nodes: impl Iterator<Item = Placed>) -> Result<()> {
    for placed in nodes {
        lock(tree).put(placed.height, placed.index, placed.node)?;
    }
    Ok(())
}

fn lock(tree: &Mutex<Tree>) -> MutexGuard<'_, Tree> {
    tree.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// Reads the unit's content into `buffer`, which keeps its room from unit to unit, and answers
    /// with the content; empty for a unit without. The leaves are hashed while they are in the
    /// cache.
    pub fn load<'b>(&self, unit: &Unit, buffer: &'b mut Vec<u8>) -> Result<&'b [u8]> {
        if !matches!(unit.content, Content::Bytes { .. }) {
            if let (Some(tree), Content::Zeroes) = (self.tree, unit.content) {
                tree.put_zeroes(unit.offset, unit.len)?;
            }
            return Ok(&[]);
        }
        let bytes = on_page(buffer, usize::try_from(unit.len).unwrap_or(usize::MAX));
        self.source.read_at(bytes, unit.offset).map_err(Error::Source)?;
        if let Some(tree) = self.tree {
            tree.put(unit.offset, bytes)?;
        }
        Ok(bytes)
    }
}
