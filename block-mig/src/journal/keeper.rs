//! What arrives at a destination, and when the journal may say so.
//!
//! ```text
//! begin      what the journal claims of a range is taken back, before it is written
//! arrived    it was written; its nodes wait
//! checkpoint the destination is synced, and then what waited before is claimed
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use format_spec::content_hash::{
    LEAF_BYTES, LEDGER_HEIGHT, Node, Placed, Tree, hash_run, zero_node,
};
use mig_core::block::is_zero;
use qcow2_file::Storage;

use super::{Journal, Prepared};
use crate::error::Result;
use crate::ledger::{Ledger, Stretch, UNIT_BYTES};
use crate::limits::{CHECKPOINT_BYTES, CHECKPOINT_INTERVAL, MAX_PARTIAL_UNITS};

/// Leaves of a unit.
const UNIT_LEAVES: u64 = UNIT_BYTES / LEAF_BYTES as u64;

/// Keeps a journal while a disk arrives, from any number of threads.
///
/// A journal that fails is given up: what it would have saved is sent again after a cut, and the
/// transfer goes on. Only [`prepare`](Self::prepare) and [`commit`](Self::commit) must succeed.
#[derive(Debug)]
pub struct Keeper {
    size: u64,
    state: Mutex<State>,
    /// Held by the one checkpoint under way.
    checkpoint: Mutex<()>,
    /// Bytes that arrived since the last one.
    waiting: AtomicU64,
    /// Bytes after which the next one is due.
    interval: u64,
    /// Time after which it is.
    patience: Duration,
    /// When the last one began, or nothing had been there.
    last: Mutex<Instant>,
}

#[derive(Debug)]
struct State {
    journal: Journal,
    is_given_up: bool,
    /// Arrived, not synced.
    arrived: Ledger,
    /// What a checkpoint under way is about to claim.
    syncing: Ledger,
    /// Units of which a part has arrived.
    partial: BTreeMap<u64, Tree>,
}

impl Keeper {
    /// Keeps `journal`.
    pub fn new(journal: Journal) -> Result<Self> {
        let size = journal.identity().size;
        let state = State {
            journal,
            is_given_up: false,
            arrived: Ledger::new(size)?,
            syncing: Ledger::new(size)?,
            partial: BTreeMap::new(),
        };
        let (checkpoint, waiting) = (Mutex::new(()), AtomicU64::new(0));
        let (interval, patience) = (CHECKPOINT_BYTES, CHECKPOINT_INTERVAL);
        let (state, last) = (Mutex::new(state), Mutex::new(Instant::now()));
        Ok(Self { size, state, checkpoint, waiting, interval, patience, last })
    }

    /// Lets checkpoints be due after `bytes` instead of [`CHECKPOINT_BYTES`].
    pub fn every(self, bytes: u64) -> Self {
        Self { interval: bytes, ..self }
    }

    /// Lets them be due after `patience` instead of [`CHECKPOINT_INTERVAL`].
    pub fn within(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// A range of bytes is about to be written.
    pub fn begin(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let units = range.start / UNIT_BYTES..range.end.min(self.size).div_ceil(UNIT_BYTES);
        let mut state = self.lock();
        state.arrived.forget(units.clone())?;
        state.syncing.forget(units.clone())?;
        // Parts that arrived are written again in part: only what is put anew counts.
        let is_whole = |unit: u64| {
            range.start <= unit * UNIT_BYTES
                && range.end >= ((unit + 1) * UNIT_BYTES).min(self.size)
        };
        for unit in [units.start, units.end - 1] {
            if is_whole(unit) {
                state.partial.remove(&unit);
            }
        }
        state.journaled(|journal| journal.take_back(units))
    }

    /// Content that starts on a leaf boundary was written: whole leaves, or up to the end of the
    /// disk. Hashes it, and answers with the nodes for whoever needs them too.
    pub fn arrived(&self, offset: u64, bytes: &[u8]) -> Result<Vec<Placed>> {
        let first = offset / LEAF_BYTES as u64;
        // In pieces that no unit border cuts, so that each lies below one node.
        let into = usize::try_from(UNIT_BYTES - offset % UNIT_BYTES).unwrap_or(usize::MAX);
        let (head, tail) = bytes.split_at_checked(into).unwrap_or((bytes, &[]));
        let unit = usize::try_from(UNIT_BYTES).unwrap_or(usize::MAX);
        let pieces = std::iter::once(head).chain(tail.chunks(unit));
        let mut nodes = Vec::new();
        let mut leaf = first;
        for piece in pieces {
            nodes.extend(hash_run(leaf, piece, is_zero));
            leaf = leaf.saturating_add(piece.len().div_ceil(LEAF_BYTES) as u64);
        }
        let mut state = self.lock();
        for placed in &nodes {
            state.put(self.size, *placed)?;
        }
        self.waiting.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(nodes)
    }

    /// Whole units were written, and these are their nodes.
    pub fn arrived_units(&self, first: u64, nodes: &[Node]) -> Result<()> {
        let mut state = self.lock();
        for (unit, node) in (first..).zip(nodes) {
            state.partial.remove(&unit);
            state.arrived.set(unit, *node)?;
        }
        let bytes = UNIT_BYTES.saturating_mul(nodes.len() as u64);
        self.waiting.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// A range on leaf boundaries, or up to the end of the disk, reads as zero.
    pub fn arrived_zeroes(&self, range: Range<u64>) -> Result<()> {
        let leaf = LEAF_BYTES as u64;
        let (mut at, end) = (range.start / leaf, range.end.div_ceil(leaf));
        let is_at_end = range.end >= self.size;
        let mut state = self.lock();
        while at < end {
            let unit = at / UNIT_LEAVES;
            let unit_end = (unit + 1) * UNIT_LEAVES;
            let last = if is_at_end { state.arrived.units() } else { end / UNIT_LEAVES };
            if at == unit * UNIT_LEAVES && last > unit {
                state.partial.retain(|known, _| !(unit..last).contains(known));
                state.arrived.set_zeroes(unit..last)?;
                at = last * UNIT_LEAVES;
                continue;
            }
            let stop = if is_at_end { unit_end } else { unit_end.min(end) };
            for index in at..stop {
                state.put(self.size, Placed { height: 0, index, node: zero_node(0) })?;
            }
            at = stop;
        }
        Ok(())
    }

    /// Whether enough has arrived for a checkpoint, or [the last one](Self::is_late) is too old.
    pub fn is_due(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) >= self.interval || self.is_late()
    }

    /// Whether what arrives has waited for a checkpoint for so long that one is due, however little
    /// it is, and none is under way. Of those who ask one is told so.
    pub fn is_late(&self) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let is_late = last.elapsed() >= self.patience && self.checkpoint.try_lock().is_ok();
        if is_late {
            *last = Instant::now();
        }
        is_late
    }

    /// Makes what has arrived durable with `sync`, and then claims it. Where a checkpoint is under
    /// way already, waits for it first.
    pub fn checkpoint<E: From<crate::Error>>(
        &self,
        sync: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let _alone = self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.store(0, Ordering::Relaxed);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        {
            let state = &mut *self.lock();
            state.syncing = std::mem::replace(&mut state.arrived, Ledger::new(self.size)?);
        }
        sync()?;
        let state = &mut *self.lock();
        let mut syncing = std::mem::replace(&mut state.syncing, Ledger::new(self.size)?);
        state.journaled(|journal| {
            journal.claim(&mut syncing)?;
            journal.sync()
        })?;
        Ok(())
    }

    /// Writes the journal anew where it has grown too much, into the file that `open` makes, which
    /// `publish` then gives the journal's name.
    pub fn compact<E: From<crate::Error>>(
        &self,
        open: impl FnOnce() -> Result<Arc<dyn Storage>, E>,
        publish: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let state = &mut *self.lock();
        if state.is_given_up || !state.journal.is_bloated()? {
            return Ok(());
        }
        state.journal.rewrite(open()?)?;
        publish()
    }

    /// Runs `f` on what the journal claims.
    pub fn with_claims<T>(&self, f: impl FnOnce(&mut Ledger) -> T) -> T {
        f(self.lock().journal.claims())
    }

    /// Bytes of the units with content that the journal claims; 0 where that cannot be told.
    pub fn claimed_bytes(&self) -> u64 {
        let count = |claims: &mut Ledger| -> Result<u64> {
            let (mut at, mut nodes) = (0, 0u64);
            while let Some(stretch) = claims.stretch(at)? {
                at = stretch.units().end;
                if let Stretch::Nodes(_, run) = stretch {
                    nodes = nodes.saturating_add(run.len() as u64);
                }
            }
            Ok(nodes.saturating_mul(UNIT_BYTES).min(claims.size()))
        };
        self.with_claims(count).unwrap_or(0)
    }

    /// Whether the disk was prepared, and that was not taken back.
    pub fn is_prepared(&self) -> bool {
        self.lock().journal.prepared().is_some()
    }

    /// See [`Journal::prepare`].
    pub fn prepare(&self, prepared: Prepared) -> Result<()> {
        self.lock().journal.prepare(prepared)
    }

    /// See [`Journal::unprepare`].
    pub fn unprepare(&self) -> Result<()> {
        self.lock().journal.unprepare()
    }

    /// See [`Journal::commit`].
    pub fn commit(&self) -> Result<()> {
        self.lock().journal.commit()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes a node at or below the height of a unit.
    fn put(&mut self, size: u64, placed: Placed) -> Result<()> {
        let Placed { height, index, node } = placed;
        let leaf = index << height;
        let unit = leaf / UNIT_LEAVES;
        if height == LEDGER_HEIGHT {
            self.partial.remove(&unit);
            return self.arrived.set(unit, node);
        }
        if !self.partial.contains_key(&unit) {
            if self.partial.len() >= MAX_PARTIAL_UNITS {
                self.partial.pop_first();
            }
            let mut tree = Tree::keeping(UNIT_BYTES, LEDGER_HEIGHT)?;
            let inside = size.saturating_sub(unit * UNIT_BYTES).div_ceil(LEAF_BYTES as u64);
            tree.put_zeroes(inside.min(UNIT_LEAVES)..UNIT_LEAVES)?;
            self.partial.insert(unit, tree);
        }
        let Some(tree) = self.partial.get_mut(&unit) else { return Ok(()) };
        tree.put(height, (leaf % UNIT_LEAVES) >> height, node)?;
        if let Some(node) = tree.get(LEDGER_HEIGHT, 0) {
            self.partial.remove(&unit);
            self.arrived.set(unit, node)?;
        }
        Ok(())
    }

    /// Does something with the journal, unless it failed before.
    fn journaled(&mut self, f: impl FnOnce(&mut Journal) -> Result<()>) -> Result<()> {
        if self.is_given_up {
            return Ok(());
        }
        match f(&mut self.journal) {
            Err(error @ crate::Error::Journal { .. }) => {
                self.is_given_up = true;
                tracing::warn!(%error, "a cut from now on costs more than it had to");
                Ok(())
            }
            done => done,
        }
    }
}
