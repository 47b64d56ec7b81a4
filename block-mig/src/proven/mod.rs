//! A disk is read back while more of it arrives, so that little is left to be read when it is
//! complete.
//!
//! What counts in the end is what somebody reads who opens the finished disk. Of a unit that was
//! read earlier two things are noted: its node, and its `mark`: where in the file its content
//! stood, and how often that place had been written before it was read. At the end the finished
//! disk is opened afresh, and each unit's mark is made anew by *its* tables. Where that is the
//! same, the bytes that it names are those that were read, since every write to the file is
//! counted, whatever part of this program wrote and whatever it meant to write. Where it is not the
//! same, the unit is read again. So nothing has to be believed of the writer: tables that are
//! wrong, content that went astray or over other content, and writes that got lost are found as by
//! reading all of it at the end.
//!
//! One race is left: a unit may be written while it is read, and in a way that leaves no mark (made
//! zero, written, made zero again). Who writes says so [before](Proven::begin), and what is being
//! read then does not count.

mod finish;
mod mark;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use format_spec::content_hash::{LEDGER_HEIGHT, Node, subtree};
use mig_core::block::{is_zero, on_page};
use qcow2_file::storage::Writes;

pub use self::finish::{Finished, Proof};
use self::mark::mark;
use crate::error::{Error, Result};
use crate::ledger::{Entry, Ledger, RangeSet, UNIT_BYTES};
use crate::limits::{MAX_WAITING_RUNS, SETTLE_BYTES};
use crate::recheck::ReadBack;

/// What was read back of a disk that arrives.
///
/// Any thread may say what is [written](Self::begin) and [has arrived](Self::arrived); one
/// [reads](Self::run).
#[derive(Debug)]
pub struct Proven {
    size: u64,
    writes: Arc<Writes>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    nodes: Ledger,
    /// What stood where when the node was made.
    marks: Ledger,
    /// Units that were written lately and may be written on.
    arrived: RangeSet,
    /// Bytes that arrived since they settled last.
    fresh_bytes: u64,
    /// Units that are to be read.
    waiting: RangeSet,
    /// The unit that is being read, and whether it was written meanwhile.
    reading: Option<(u64, bool)>,
    is_over: bool,
}

impl Proven {
    /// Nothing is proved of a disk of `size` bytes. `writes` counts what is written to the file
    /// that holds its content.
    pub fn new(size: u64, writes: Arc<Writes>) -> Result<Self> {
        let state = State {
            nodes: Ledger::new(size)?,
            marks: Ledger::new(size)?,
            arrived: RangeSet::default(),
            fresh_bytes: 0,
            waiting: RangeSet::default(),
            reading: None,
            is_over: false,
        };
        Ok(Self { size, writes, state: Mutex::new(state), changed: Condvar::new() })
    }

    /// A range of bytes is about to be written.
    pub fn begin(&self, range: Range<u64>) {
        let units = units_of(&range);
        let mut state = self.lock();
        state.waiting.remove(units.clone());
        if let Some((unit, is_disturbed)) = &mut state.reading {
            *is_disturbed |= units.contains(unit);
        }
    }

    /// A range of bytes was written. It is read when enough has arrived after it that it has
    /// probably come to rest.
    pub fn arrived(&self, range: Range<u64>) {
        let mut state = self.lock();
        state.fresh_bytes = state.fresh_bytes.saturating_add(range.end - range.start);
        // Of too many runs some are forgotten: they are read in the end.
        if state.arrived.runs() < MAX_WAITING_RUNS {
            state.arrived.insert(units_of(&range));
        }
        if state.fresh_bytes >= SETTLE_BYTES {
            self.settle(&mut state);
        }
    }

    /// All that has arrived has come to rest.
    pub fn settled(&self) {
        self.settle(&mut self.lock());
    }

    /// Waits until all that has come to rest was read.
    pub fn wait(&self) {
        let state = self.lock();
        let busy = |state: &mut State| {
            !state.is_over && (state.reading.is_some() || !state.waiting.is_empty())
        };
        drop(self.changed.wait_while(state, busy).unwrap_or_else(PoisonError::into_inner));
    }

    /// Reads what has come to rest until [`stop`](Self::stop) is called. What cannot be read is
    /// read in the end, and is an error then.
    ///
    /// `claim` is told of each unit that was read, with its node, before anybody who
    /// [begins](Self::begin) to write to it goes on.
    pub fn run(&self, disk: &dyn ReadBack, claim: &dyn Fn(u64, Node)) {
        // Whatever ends this, a panic included, must not leave others waiting.
        let _ending = Ending(self);
        let mut buffer = Vec::new();
        while let Some(unit) = self.next() {
            let read = self.read(unit, disk, &mut buffer);
            let mut state = self.lock();
            let is_quiet = state.reading.take().is_some_and(|(_, is_disturbed)| !is_disturbed);
            let noted = match read {
                Ok(Some((node, mark))) if is_quiet => {
                    claim(unit, node);
                    state.note(unit, node, mark)
                }
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            drop(state);
            self.changed.notify_all();
            if let Err(error) = noted {
                tracing::warn!(%error, unit, "a unit cannot be read back before the end");
            }
        }
    }

    /// Ends [`run`](Self::run) and [`wait`](Self::wait), now and later. On return nothing is being
    /// read.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.is_over = true;
        self.changed.notify_all();
        let is_reading = |state: &mut State| state.reading.is_some();
        drop(self.changed.wait_while(state, is_reading).unwrap_or_else(PoisonError::into_inner));
    }

    /// Reads a unit. Nothing where nothing is stored, or where it cannot be told where, or where it
    /// is known already.
    fn read(
        &self,
        unit: u64,
        disk: &dyn ReadBack,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<(Node, Node)>> {
        let range = bytes_of(unit, self.size);
        let placed = |offset, max_len| disk.placed(offset, max_len);
        let Some(mark) = mark(&range, &placed, &self.writes).map_err(Error::Sink)? else {
            return Ok(None);
        };
        if self.lock().marks.get(unit)? == Entry::Node(mark) {
            return Ok(None);
        }
        let len = usize::try_from(range.end - range.start).unwrap_or_default();
        let bytes = on_page(buffer, len);
        disk.read_back(bytes, range.start).map_err(Error::Sink)?;
        Ok(Some((subtree(LEDGER_HEIGHT, bytes, &is_zero), mark)))
    }

    /// Waits for a unit that is to be read; `None` when there is nothing more to be done.
    fn next(&self) -> Option<u64> {
        let idle = |state: &mut State| !state.is_over && state.waiting.is_empty();
        let waited = self.changed.wait_while(self.lock(), idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let unit = state.waiting.next_start(0).filter(|_| !state.is_over)?;
        state.waiting.remove(unit..unit.saturating_add(1));
        state.reading = Some((unit, false));
        Some(unit)
    }

    fn settle(&self, state: &mut State) {
        if state.arrived.is_empty() {
            return;
        }
        state.fresh_bytes = 0;
        for units in std::mem::take(&mut state.arrived).iter() {
            if state.waiting.runs() < MAX_WAITING_RUNS {
                state.waiting.insert(units);
            }
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nothing is read any more.
struct Ending<'a>(&'a Proven);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        (state.is_over, state.reading) = (true, None);
        self.0.changed.notify_all();
    }
}

impl State {
    fn note(&mut self, unit: u64, node: Node, mark: Node) -> Result<()> {
        self.nodes.set(unit, node)?;
        self.marks.set(unit, mark)
    }
}

/// Units that a range touches.
fn units_of(range: &Range<u64>) -> Range<u64> {
    range.start / UNIT_BYTES..range.end.div_ceil(UNIT_BYTES)
}

/// Bytes of a unit.
fn bytes_of(unit: u64, size: u64) -> Range<u64> {
    let start = unit.saturating_mul(UNIT_BYTES);
    start..start.saturating_add(UNIT_BYTES).min(size).max(start)
}
