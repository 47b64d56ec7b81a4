//! What was sent and is not yet known to have arrived.

use std::ops::Range;

use super::AtomicBits;

/// Units that are in flight: since the last barrier, or before it and not acknowledged.
#[derive(Debug)]
pub struct InFlight {
    since: AtomicBits,
    before: AtomicBits,
}

impl InFlight {
    /// None of `units` is.
    pub fn new(units: u64) -> Self {
        Self { since: AtomicBits::new(units), before: AtomicBits::new(units) }
    }

    /// These are about to be sent.
    pub fn add(&self, units: Range<u64>) {
        self.since.set_range(units);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.since.count().saturating_add(self.before.count())
    }

    /// A barrier was placed: the next acknowledgement is for what was added so far.
    pub fn barrier(&self) {
        self.since.move_to(&self.before);
    }

    /// All before the last barrier has arrived.
    pub fn acknowledged(&self) {
        self.before.clear_range(0..u64::MAX);
    }

    /// All is set in `dirty` and no longer in flight.
    pub fn give_back(&self, dirty: &AtomicBits) {
        self.since.move_to(dirty);
        self.before.move_to(dirty);
    }
}
