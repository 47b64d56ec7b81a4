//! The gate that guest writes pass, and at which they wait while the disk is paused.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Set while the gate is closed; the bits below count the writes inside.
const CLOSED: u64 = 1 << 63;

/// What is to happen to those who come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Door {
    /// How many want it shut: while it is more than none, they wait.
    holds: u32,
    /// They are sent away: the disk is not ours any more.
    is_retired: bool,
}

/// Counts writes in flight. One atomic addition on the way in and one on the way out as long as the
/// gate is open; the lock is for closing and waiting.
#[derive(Debug)]
pub(super) struct Gate {
    state: AtomicU64,
    door: Mutex<Door>,
    changed: Condvar,
}

/// The disk has been handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the disk has been handed over to the destination of a migration")]
pub struct HandedOver;

impl Gate {
    pub(super) fn new() -> Self {
        let (state, door, changed) = (AtomicU64::new(0), Mutex::default(), Condvar::new());
        Self { state, door, changed }
    }

    /// Enters, after waiting while the gate is shut.
    pub(super) fn enter(&self) -> Result<(), HandedOver> {
        // Acquire: who enters after `open` sees all that was done while it was shut.
        while self.state.fetch_add(1, Ordering::SeqCst) & CLOSED != 0 {
            self.leave();
            let shut = |door: &mut Door| door.holds > 0 && !door.is_retired;
            let door =
                self.changed.wait_while(self.lock(), shut).unwrap_or_else(PoisonError::into_inner);
            if door.is_retired {
                return Err(HandedOver);
            }
        }
        Ok(())
    }

    /// Leaves.
    pub(super) fn leave(&self) {
        if self.state.fetch_sub(1, Ordering::SeqCst) == CLOSED | 1 {
            // Under the lock, so that `shut` cannot miss it between its look and its sleep.
            drop(self.lock());
            self.changed.notify_all();
        }
    }

    /// Shuts the gate and waits until all who are inside have left. It is opened by as many calls
    /// of [`open`](Self::open).
    pub(super) fn shut(&self) {
        let mut door = self.lock();
        door.holds = door.holds.saturating_add(1);
        self.close(door);
    }

    /// Shuts the gate for good; who waits is sent away.
    pub(super) fn retire(&self) {
        let mut door = self.lock();
        door.is_retired = true;
        self.changed.notify_all();
        self.close(door);
    }

    fn close(&self, mut door: MutexGuard<'_, Door>) {
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        while self.state.load(Ordering::SeqCst) != CLOSED {
            door = self.changed.wait(door).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Opens the gate, unless others still want it shut; who waits goes in. Does nothing once it is
    /// retired.
    pub(super) fn open(&self) {
        let mut door = self.lock();
        door.holds = door.holds.saturating_sub(1);
        if door.holds == 0 && !door.is_retired {
            self.state.fetch_and(!CLOSED, Ordering::SeqCst);
            drop(door);
            self.changed.notify_all();
        }
    }

    /// Whether nobody is let in now.
    pub(super) fn is_shut(&self) -> bool {
        self.state.load(Ordering::SeqCst) & CLOSED != 0
    }

    fn lock(&self) -> MutexGuard<'_, Door> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
