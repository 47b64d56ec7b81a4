//! What changed since it was sent, and what was sent and is not yet known to have arrived.

mod bits;

use std::ops::Range;

pub use bits::{AtomicBits, CHUNK_BYTES};

/// Who wants to know of changes of guest data. Called by guest threads, from many at once, on every
/// write.
pub trait Recorder: Send + Sync {
    /// The bytes of `range` were written, zeroed or discarded. Comes after the change and before it
    /// is reported as complete, and also when it failed, since part of it may have happened.
    fn record_write(&self, range: Range<u64>);
}

/// Nobody wants to know.
impl Recorder for () {
    fn record_write(&self, _range: Range<u64>) {}
}

/// The units of a disk, or pages of a memory, that have to be sent.
///
/// A unit is *dirty* when it changed since it was last taken, and *in flight* from the moment it is
/// taken until the peer acknowledged a barrier behind it. [`give_back`](Self::give_back) makes what
/// is in flight dirty again: a connection was lost, or the migration is called off.
#[derive(Debug)]
pub struct DirtySet {
    size: u64,
    unit_bits: u32,
    dirty: AtomicBits,
    in_flight: AtomicBits,
    /// Groups of units some of which are in flight, so that to acknowledge a few costs little.
    groups: AtomicBits,
}

/// Units of one group: as many as are cleared in no time.
const GROUP_UNITS: u64 = 4096;

impl DirtySet {
    /// Nothing of `size` bytes is dirty yet. Units are of `1 << unit_bits` bytes; the last one may
    /// be shorter.
    pub fn new(size: u64, unit_bits: u8) -> Self {
        let unit_bits = u32::from(unit_bits).min(63);
        let units = size.div_ceil(1 << unit_bits);
        let (dirty, in_flight) = (AtomicBits::new(units), AtomicBits::new(units));
        let groups = AtomicBits::new(units.div_ceil(GROUP_UNITS));
        Self { size, unit_bits, dirty, in_flight, groups }
    }

    /// Bytes covered.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of a unit.
    pub fn unit_bytes(&self) -> u64 {
        1 << self.unit_bits
    }

    /// Marks every unit that the bytes of `range` touch.
    pub fn mark(&self, range: Range<u64>) {
        self.dirty.set_range(self.touched(range));
    }

    /// Bytes of dirty units, the last one counted in full. Constant time.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.count().saturating_mul(self.unit_bytes())
    }

    /// Bytes of units that were sent and not acknowledged.
    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight.count().saturating_mul(self.unit_bytes())
    }

    /// The first dirty unit at or behind byte `from`; nothing is taken.
    pub fn first_dirty(&self, from: u64) -> Option<Range<u64>> {
        self.dirty.next_run(from.div_ceil(self.unit_bytes()), 1).map(|unit| self.bytes(unit))
    }

    /// Takes the first run of dirty units at or behind byte `from`, at most `max_bytes` long and at
    /// least one unit. It is in flight before it is no longer dirty, so that no moment exists at
    /// which it is neither; its content is to be read after this returns.
    pub fn take(&self, from: u64, max_bytes: u64) -> Option<Range<u64>> {
        let max = (max_bytes >> self.unit_bits).max(1);
        let mut from = from.div_ceil(self.unit_bytes());
        loop {
            let found = self.dirty.next_run(from, max)?;
            self.fly(found.clone());
            if let Some(run) = self.dirty.take_run(found.start, found.end - found.start) {
                // What others took of it meanwhile is in flight as well: nothing is to be undone.
                return Some(self.bytes(run));
            }
            from = found.end;
        }
    }

    /// Takes the units of `range` whether they are dirty or not, for a sweep over everything.
    pub fn take_range(&self, range: Range<u64>) {
        let units = self.touched(range);
        self.fly(units.clone());
        self.dirty.clear_range(units);
    }

    /// All that was taken so far has arrived: a barrier behind it was acknowledged, and nothing was
    /// taken since that barrier.
    pub fn acknowledged(&self) {
        let mut from = 0;
        while let Some(groups) = self.groups.take_run(from, u64::MAX) {
            from = groups.end;
            let unit = |group: u64| group.saturating_mul(GROUP_UNITS);
            self.in_flight.clear_range(unit(groups.start)..unit(groups.end));
        }
    }

    /// All that is in flight is dirty again. Not to be called while others take.
    pub fn give_back(&self) {
        self.in_flight.move_to(&self.dirty);
    }

    fn fly(&self, units: Range<u64>) {
        self.in_flight.set_range(units.clone());
        if !units.is_empty() {
            self.groups.set_range(units.start / GROUP_UNITS..(units.end - 1) / GROUP_UNITS + 1);
        }
    }

    fn touched(&self, range: Range<u64>) -> Range<u64> {
        if range.start >= range.end {
            return 0..0;
        }
        (range.start >> self.unit_bits)..((range.end - 1) >> self.unit_bits).saturating_add(1)
    }

    fn bytes(&self, units: Range<u64>) -> Range<u64> {
        let at = |unit: u64| unit.saturating_mul(self.unit_bytes()).min(self.size);
        at(units.start)..at(units.end)
    }
}

impl Recorder for DirtySet {
    fn record_write(&self, range: Range<u64>) {
        self.mark(range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_comes_back_unless_it_arrived() {
        let set = DirtySet::new((10 << 16) + 512, 16);
        set.mark(65535..65537);
        set.mark(10 << 16..(10 << 16) + 1);
        set.mark(5..5);
        assert_eq!(set.dirty_bytes(), 3 << 16);
        assert_eq!(set.take(0, 1), Some(0..65536));
        assert_eq!(set.take(65536, 1 << 20), Some(65536..131_072));
        assert_eq!(set.take(131_072, 1 << 20), Some(10 << 16..(10 << 16) + 512));
        assert_eq!(set.take(0, 1 << 20), None);
        set.give_back();
        assert_eq!((set.dirty_bytes(), set.in_flight_bytes()), (3 << 16, 0));
        assert_eq!(set.take(0, 1 << 20), Some(0..131_072));
        set.acknowledged();
        set.take_range(0..1 << 20);
        assert_eq!((set.dirty_bytes(), set.in_flight_bytes()), (0, 11 << 16));
        set.give_back();
        assert_eq!(set.take(0, u64::MAX), Some(0..(10 << 16) + 512));
    }

    #[test]
    fn what_is_in_flight_anywhere_is_acknowledged() {
        let unit = 1 << 16;
        let set = DirtySet::new(unit * 5 * GROUP_UNITS, 16);
        set.take_range(unit * (GROUP_UNITS - 1)..unit * (2 * GROUP_UNITS + 1));
        set.mark(unit * (5 * GROUP_UNITS - 1)..unit * 5 * GROUP_UNITS);
        assert!(set.take(0, unit).is_some());
        assert_eq!(set.in_flight_bytes(), unit * (GROUP_UNITS + 3));
        set.acknowledged();
        assert_eq!(set.in_flight_bytes(), 0);
        set.give_back();
        assert_eq!(set.dirty_bytes(), 0);
    }
}
