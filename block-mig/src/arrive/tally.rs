//! How much of all disks has come, for whoever watches from another thread.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of the disks of one session, zeroes included: a source does not say how much of a disk it
/// will send. What comes again counts once.
#[derive(Debug, Default)]
pub struct Tally {
    arrived: AtomicU64,
    expected: AtomicU64,
}

impl Tally {
    /// What has come or was there, and how much there is in all, as far as disks were introduced.
    pub fn so_far(&self) -> (u64, u64) {
        let expected = self.expected.load(Ordering::Acquire);
        (self.arrived.load(Ordering::Acquire).min(expected), expected)
    }

    /// Another attempt begins. Nothing arrives meanwhile.
    pub fn reset(&self) {
        self.expected.store(0, Ordering::Release);
        self.arrived.store(0, Ordering::Release);
    }

    pub(super) fn expect(&self, bytes: u64) {
        // Sizes come from the peer; a number for people need not wrap.
        let added = |now: u64| Some(now.saturating_add(bytes));
        let _ = self.expected.fetch_update(Ordering::AcqRel, Ordering::Acquire, added);
    }

    pub(super) fn add(&self, bytes: u64) {
        let added = |now: u64| Some(now.saturating_add(bytes));
        let _ = self.arrived.fetch_update(Ordering::AcqRel, Ordering::Acquire, added);
    }
}
