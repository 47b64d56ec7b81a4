//! Locks on guest ranges: shared for what leaves the mapping as it is, exclusive for what changes
//! it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};

/// How a range is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Reads, and writes in place.
    Shared,
    /// Whatever changes the mapping.
    Exclusive,
}

#[derive(Debug)]
struct Entry {
    ticket: u64,
    range: Range<u64>,
    mode: Mode,
}

impl Entry {
    fn excludes(&self, range: &Range<u64>, mode: Mode) -> bool {
        let overlaps = self.range.start < range.end && range.start < self.range.end;
        overlaps && (self.mode == Mode::Exclusive || mode == Mode::Exclusive)
    }
}

#[derive(Debug, Default)]
struct Queue {
    next_ticket: u64,
    /// Granted and waiting, in the order of their tickets.
    entries: VecDeque<Entry>,
}

/// All locked ranges of a disk. Whoever asks waits for every conflicting request that came before,
/// granted or not, so nobody starves. A thread holds one range at a time.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    queue: Mutex<Queue>,
    released: Condvar,
}

impl Ranges {
    /// Waits for the range.
    pub(super) fn lock(&self, range: Range<u64>, mode: Mode) -> RangeLock<'_> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        queue.entries.push_back(Entry { ticket, range: range.clone(), mode });
        while queue.entries.iter().any(|e| e.ticket < ticket && e.excludes(&range, mode)) {
            queue = self.released.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        RangeLock { ranges: self, ticket }
    }
}

/// A locked range, until it is dropped.
#[derive(Debug)]
pub(super) struct RangeLock<'a> {
    ranges: &'a Ranges,
    ticket: u64,
}

impl Drop for RangeLock<'_> {
    fn drop(&mut self) {
        let mut queue = self.ranges.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let has_others = queue.entries.len() > 1;
        queue.entries.retain(|e| e.ticket != self.ticket);
        drop(queue);
        if has_others {
            self.ranges.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn exclusive_excludes_and_shared_shares() {
        let ranges = Ranges::default();
        let (inside, most) = (AtomicU64::new(0), AtomicU64::new(0));
        let work = |mode, range: Range<u64>| {
            for _ in 0..200 {
                let _lock = ranges.lock(range.clone(), mode);
                let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
                most.fetch_max(now, Ordering::SeqCst);
                std::thread::yield_now();
                inside.fetch_sub(1, Ordering::SeqCst);
            }
        };
        std::thread::scope(|s| {
            for i in 0..4 {
                s.spawn(move || work(Mode::Exclusive, i..10));
            }
        });
        assert_eq!(most.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_waiting_writer_is_not_overtaken() {
        let ranges = Ranges::default();
        let first = ranges.lock(0..10, Mode::Shared);
        let order = Mutex::new(Vec::new());
        std::thread::scope(|s| {
            let wait_for = |count: usize| {
                while ranges.queue.lock().unwrap().entries.len() < count {
                    std::thread::sleep(Duration::from_millis(1));
                }
            };
            s.spawn(|| {
                let _lock = ranges.lock(5..6, Mode::Exclusive);
                order.lock().unwrap().push("exclusive");
            });
            wait_for(2);
            s.spawn(|| {
                let _lock = ranges.lock(0..10, Mode::Shared);
                order.lock().unwrap().push("shared");
            });
            wait_for(3);
            // What does not touch the waiting writer goes ahead.
            drop(ranges.lock(6..10, Mode::Shared));
            drop(first);
        });
        assert_eq!(*order.lock().unwrap(), ["exclusive", "shared"]);
    }
}
