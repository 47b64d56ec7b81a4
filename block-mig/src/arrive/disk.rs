//! One disk while it arrives.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use format_spec::content_hash::ContentHash;
use format_spec::native::block::{Content, Run};
use mig_core::stream::{Arrival, Result};

use super::coverage::Coverage;
use super::tally::Tally;
use super::units::Units;
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
    units: Units,
    state: Mutex<State>,
    /// Of all disks.
    tally: Arc<Tally>,
}

/// What arrived of one disk so far. Shared with whoever reports.
#[derive(Debug, Default)]
pub struct LoadCounts {
    /// Bytes of content that came.
    pub data: AtomicU64,
    /// Bytes that came as runs of zeroes.
    pub zero: AtomicU64,
}

/// What is true of what does not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Rest {
    /// There is none: all comes.
    #[default]
    Comes,
    /// It was prepared in an earlier attempt.
    There,
    /// It stays as it is here, whatever that is.
    Kept,
}

#[derive(Debug, Default)]
struct State {
    coverage: Coverage,
    rest: Rest,
    seal: Option<Option<ContentHash>>,
}

/// Where a run's content stands in the body of its record.
pub(super) struct Placed {
    pub(super) range: Range<u64>,
    /// Bytes at the end of the body; `None` for zeroes.
    pub(super) content_len: Option<usize>,
}

impl Arriving {
    pub(super) fn new(
        (name, size, rest): (&str, u64, Rest),
        landing: Arc<dyn Landing>,
        tally: Arc<Tally>,
    ) -> Self {
        // Of what stays here nobody knows how much will come.
        tally.expect(if rest == Rest::Kept { 0 } else { size });
        let state = Mutex::new(State { rest, ..State::default() });
        let (name, counts, units) = (name.to_owned(), Arc::default(), Units::default());
        Self { name, size, landing, counts, units, state, tally }
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
        if !self.cover(&mut state, range.clone()) {
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
        self.cover(&mut self.lock(), range.start..end)
    }

    fn cover(&self, state: &mut State, range: Range<u64>) -> bool {
        let before = state.coverage.bytes();
        let is_kept = state.coverage.add(range);
        self.tally.add(state.coverage.bytes().saturating_sub(before));
        is_kept
    }

    /// The source says that it was all.
    pub(super) fn seal(&self, hash: Option<ContentHash>, at: &Arrival) -> Result<()> {
        let mut state = self.lock();
        if state.seal.is_some() {
            return Err(at.protocol(format!("disk {:?} is sealed twice", self.name)));
        }
        let gap = state.coverage.first_gap(self.size).filter(|_| state.rest == Rest::Comes);
        if let Some(gap) = gap {
            let reason = format!("disk {:?} is sealed, and nothing came for byte {gap}", self.name);
            return Err(at.protocol(reason));
        }
        state.seal = Some(hash);
        // What was not sent is not waited for either.
        self.tally.add(self.size.saturating_sub(state.coverage.bytes()));
        Ok(())
    }

    /// What the seal says, once it has come, and whether the disk stays as it is here.
    pub(super) fn sealed(&self) -> Option<(Option<ContentHash>, bool)> {
        let state = self.lock();
        let is_as_it_was = state.rest == Rest::Kept && state.coverage.is_empty();
        state.seal.map(|hash| (hash, is_as_it_was))
    }

    /// Stores content that was admitted.
    pub(super) fn store(&self, range: Range<u64>, content: &[u8]) -> Result<()> {
        let landing = &*self.landing;
        landing.begin(range.clone())?;
        store_bytes(landing.sink(), range.start, content)?;
        self.counts.data.fetch_add(content.len() as u64, Ordering::Relaxed);
        let (first, nodes) = match landing.wants_nodes() {
            true => self.units.content(&range, content, self.size),
            false => (range.start / UNIT_BYTES, Vec::new()),
        };
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
        if landing.wants_nodes() {
            for (unit, node) in self.units.zeroes(&range, self.size) {
                landing.arrived(range.clone(), unit, &[node])?;
            }
        }
        landing.arrived_zeroes(range)
    }

    /// A barrier was reached.
    pub(super) fn barrier(&self, is_durable: bool) -> Result<()> {
        self.units.clear();
        self.landing.settled();
        if is_durable { self.landing.durable() } else { Ok(()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
