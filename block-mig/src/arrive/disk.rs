//! One disk while it arrives.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use format_spec::content_hash::{ContentHash, LEDGER_HEIGHT, Node, subtree};
use format_spec::native::block::{Content, Run};
use mig_core::block::is_zero;
use mig_core::stream::{Arrival, Result};

use super::coverage::Coverage;
use crate::Landing;
use crate::error::Error;
use crate::ledger::UNIT_BYTES;
use crate::store::store_bytes;

/// One disk while it arrives.
pub(super) struct Arriving {
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) landing: Arc<dyn Landing>,
    pub(super) counts: Arc<LoadCounts>,
    state: Mutex<State>,
}

/// What arrived of one disk so far. Shared with whoever reports.
#[derive(Debug, Default)]
pub struct LoadCounts {
    /// Bytes of content that came.
    pub data: AtomicU64,
    /// Bytes that came as runs of zeroes.
    pub zero: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    coverage: Coverage,
    /// Whether all of it counts as covered.
    is_whole: bool,
    seal: Option<Option<ContentHash>>,
}

/// Where a run's content stands in the body of its record.
pub(super) struct Placed {
    pub(super) range: Range<u64>,
    /// Bytes at the end of the body; `None` for zeroes.
    pub(super) content_len: Option<usize>,
}

impl Arriving {
    pub(super) fn new(name: &str, size: u64, is_whole: bool, landing: Arc<dyn Landing>) -> Self {
        let state = Mutex::new(State { is_whole, ..State::default() });
        Self { name: name.to_owned(), size, landing, counts: Arc::default(), state }
    }

    /// Checks a run against the rules between records, and notes that it came. `None` where there
    /// is nothing to store.
    pub(super) fn admit(&self, run: &Run<'_>, at: &Arrival) -> Result<Option<Placed>> {
        if let Err(problem) = run.content.check(self.size) {
            return Err(at.protocol(format!("run of disk {:?} {problem}", self.name)));
        }
        let (offset, len) = run.content.range();
        let range = offset..offset.saturating_add(len);
        let mut state = self.lock();
        if state.seal.is_some() {
            return Err(at.protocol(format!("disk {:?} goes on after its seal", self.name)));
        }
        if !state.coverage.add(range.clone()) {
            let reason = format!("disk {:?} comes in more pieces than this side keeps", self.name);
            return Err(at.protocol(reason));
        }
        Ok(match run.content {
            Content::None => None,
            Content::Data { bytes, .. } => Some(Placed { range, content_len: Some(bytes.len()) }),
            Content::Zeroes { .. } => Some(Placed { range, content_len: None }),
        })
    }

    /// Notes that these bytes are there from an earlier attempt.
    pub(super) fn is_there(&self, range: Range<u64>) -> bool {
        let end = range.end.min(self.size);
        self.lock().coverage.add(range.start..end)
    }

    /// The source says that it was all.
    pub(super) fn seal(&self, hash: Option<ContentHash>, at: &Arrival) -> Result<()> {
        let mut state = self.lock();
        if state.seal.is_some() {
            return Err(at.protocol(format!("disk {:?} is sealed twice", self.name)));
        }
        let gap = state.coverage.first_gap(self.size).filter(|_| !state.is_whole);
        if let Some(gap) = gap {
            let reason = format!("disk {:?} is sealed, and nothing came for byte {gap}", self.name);
            return Err(at.protocol(reason));
        }
        state.seal = Some(hash);
        Ok(())
    }

    /// What the seal says, once it has come.
    pub(super) fn sealed(&self) -> Option<Option<ContentHash>> {
        self.lock().seal
    }

    /// Stores content that was admitted.
    pub(super) fn store(&self, range: Range<u64>, content: &[u8]) -> Result<()> {
        let landing = &*self.landing;
        landing.begin(range.clone())?;
        let (first, nodes) = match landing.wants_nodes() {
            true => nodes(&range, content, self.size),
            false => (range.start / UNIT_BYTES, Vec::new()),
        };
        store_bytes(landing.sink(), range.start, content)?;
        self.counts.data.fetch_add(content.len() as u64, Ordering::Relaxed);
        landing.arrived(range, first, &nodes)
    }

    /// Makes a range zero that was admitted.
    pub(super) fn store_zeroes(&self, range: Range<u64>) -> Result<()> {
        let (landing, len) = (&*self.landing, range.end.saturating_sub(range.start));
        let sink = landing.sink();
        landing.begin(range.clone())?;
        if !sink.reads_as_zero(range.start, len) {
            sink.write_zeroes(range.start, len).map_err(Error::Sink)?;
        }
        self.counts.zero.fetch_add(len, Ordering::Relaxed);
        landing.arrived_zeroes(range)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The nodes of the units that a range covers whole, and the first of these units.
fn nodes(range: &Range<u64>, content: &[u8], size: u64) -> (u64, Vec<Node>) {
    let first = range.start.div_ceil(UNIT_BYTES);
    let skipped = first.saturating_mul(UNIT_BYTES).saturating_sub(range.start);
    let rest = usize::try_from(skipped).ok().and_then(|at| content.get(at..)).unwrap_or_default();
    let unit = usize::try_from(UNIT_BYTES).unwrap_or(usize::MAX);
    let is_whole = |bytes: &&[u8]| bytes.len() == unit || range.end == size;
    let units = rest.chunks(unit).filter(is_whole);
    (first, units.map(|bytes| subtree(LEDGER_HEIGHT, bytes, &is_zero)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_units_have_nodes() {
        let unit = 1 << 20;
        let content = vec![1; 3 * unit];
        let node = subtree(LEDGER_HEIGHT, &content[..unit], &is_zero);
        let half = subtree(LEDGER_HEIGHT, &content[..unit / 2], &is_zero);
        let size = 10 << 20;
        assert_eq!(nodes(&(0..2 << 20), &content[..2 * unit], size), (0, vec![node; 2]));
        let odd = (1 << 19)..(5 << 19);
        assert_eq!(nodes(&odd, &content[..2 * unit], size), (1, vec![node]));
        assert_eq!(nodes(&(0..1 << 19), &content[..unit / 2], size), (0, vec![]));
        let tail = (9 << 20)..(19 << 19);
        assert_eq!(nodes(&tail, &content[..unit / 2], 19 << 19), (9, vec![half]));
    }
}
