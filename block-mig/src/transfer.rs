//! Move the content of one disk into another on this host.

use std::sync::atomic::{AtomicU64, Ordering};

use format_spec::content_hash::ContentHash;
use mig_core::block::{BlockSink, BlockSource};

use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Seed};
use crate::journal::Keeper;
use crate::limits;
use crate::load::{Loader, SharedTree};
use crate::monitor::Monitor;
use crate::plan::{Content, Scope, Units};
use crate::pool::Pool;
use crate::store::Storer;
use crate::transfer::parts::{Mover, Part, Parts};

/// How to move.
#[derive(Debug, Clone, Copy)]
pub struct TransferOptions<'a> {
    /// What the source's holes mean.
    pub scope: Scope,
    /// Whether to make the content hash of what is moved. Only with [`Scope::Whole`].
    pub hashes: bool,
    /// Whether to make a fingerprint of what is moved, and under which key. Only with
    /// [`Scope::Whole`].
    pub fingerprint: Option<Seed>,
    /// Whether compressed clusters are offered to the sink as they are.
    pub offers_compressed: bool,
    /// Worker threads.
    pub workers: usize,
    /// Largest unit, see [`limits::UNIT_BYTES`]; at least the source's cluster size where
    /// compressed clusters are offered.
    pub unit_bytes: u64,
    /// Keeps the journal of the sink, which is synced for it now and then. What it claims already
    /// is taken to be equal to the source, see [`recheck`](crate::recheck::recheck), and left out.
    /// Only with hashes.
    pub keeper: Option<&'a Keeper>,
}

impl Default for TransferOptions<'_> {
    fn default() -> Self {
        Self {
            scope: Scope::Whole,
            hashes: true,
            fingerprint: None,
            offers_compressed: true,
            workers: limits::workers(None),
            unit_bytes: limits::UNIT_BYTES,
            keeper: None,
        }
    }
}

/// What was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transferred {
    /// Bytes of content that were written.
    pub bytes_data: u64,
    /// Bytes that were there from an earlier try, zeroes included.
    pub bytes_kept: u64,
    /// Bytes that were not written as content, since they read as zero.
    pub bytes_zero: u64,
    /// Guest bytes whose compressed clusters were passed on.
    pub passed_on: u64,
    /// Guest bytes that were compressed at the source and are plain at the destination.
    pub decompressed: u64,
    /// What the source's content hashes to.
    pub content_hash: Option<ContentHash>,
    /// What the source read as, to be held against what the sink reads as.
    pub fingerprint: Option<Fingerprint>,
}

impl Transferred {
    /// Bytes of the disk, as far as they were moved or were there.
    pub fn size(&self) -> u64 {
        self.bytes_data.saturating_add(self.bytes_zero).saturating_add(self.bytes_kept)
    }
}

/// Moves all of `source` into `sink`, which nobody else writes to meanwhile. Afterwards the sink's
/// content is handed over but not durable. A sink that is larger keeps what it has beyond the end.
pub fn transfer(
    source: &dyn BlockSource,
    sink: &dyn BlockSink,
    options: &TransferOptions<'_>,
    monitor: &dyn Monitor,
) -> Result<Transferred> {
    let (source_bytes, sink_bytes) = (source.size(), sink.size());
    if source_bytes > sink_bytes {
        return Err(Error::Size { source_bytes, sink_bytes });
    }
    let is_whole = options.scope == Scope::Whole;
    let (hashes, seed) = (options.hashes && is_whole, options.fingerprint.filter(|_| is_whole));
    let tree = SharedTree::with(source_bytes, hashes, seed)?;
    let tree_fed = Some(&tree).filter(|_| hashes || seed.is_some());
    let keeper = options.keeper.filter(|_| hashes);
    let loader = Loader { source, tree: tree_fed.filter(|_| keeper.is_none()) };
    let storer = Storer::new(sink, options.offers_compressed);
    let kept = AtomicU64::new(0);
    let mover = Mover { source, sink, loader, storer: &storer, tree: tree_fed, keeper };
    let work = |(buffer, packed): &mut (Vec<u8>, Vec<u8>), unit: Part| match unit {
        Part::Known(units, entry) => {
            let bytes = mover.skip(units, entry)?;
            kept.fetch_add(bytes, Ordering::Relaxed);
            Ok(())
        }
        Part::Unit(unit) => {
            mover.move_unit(unit, buffer, packed)?;
            if matches!(unit.content, Content::Bytes { .. }) {
                monitor.advance(unit.len);
            }
            Ok(())
        }
    };
    let units = Parts::new(Units::new(source, options.scope, options.unit_bytes), keeper);
    let moved = Pool { workers: options.workers, monitor }.run(units, Default::default, work);
    mover.save(moved)?;
    sink.flush().map_err(Error::Sink)?;
    let bytes_data = storer.counts.data.load(Ordering::Relaxed);
    let bytes_kept = kept.load(Ordering::Relaxed);
    let untouched = storer.counts.untouched.load(Ordering::Relaxed);
    Ok(Transferred {
        bytes_data,
        bytes_kept,
        bytes_zero: source_bytes
            .saturating_sub(bytes_data)
            .saturating_sub(untouched)
            .saturating_sub(bytes_kept),
        passed_on: storer.counts.passed_on.load(Ordering::Relaxed),
        decompressed: storer.counts.decompressed.load(Ordering::Relaxed),
        content_hash: hashes.then(|| tree.root()).transpose()?,
        // What was there already was not read.
        fingerprint: seed.filter(|_| bytes_kept == 0).map(|_| tree.fingerprint()).transpose()?,
    })
}

mod parts;
#[cfg(test)]
mod resumed;
#[cfg(test)]
mod tests;
