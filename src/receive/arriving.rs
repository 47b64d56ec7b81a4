//! How far a destination is, while it receives.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_mig::arrive::Tally;

use crate::report::BitmapReport;
use crate::{Observer, Phase};

/// An observer that is told, as long as a transfer goes on, how much has arrived.
pub(super) struct Arriving<'a> {
    observer: &'a dyn Observer,
    tally: Arc<Tally>,
    phase: Mutex<Option<Phase>>,
}

impl<'a> Arriving<'a> {
    pub(super) fn new(observer: &'a dyn Observer) -> Self {
        Self { observer, tally: Arc::default(), phase: Mutex::default() }
    }

    /// Where it is counted what arrives.
    pub(super) fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// Tells how far it is.
    pub(super) fn tell(&self) {
        self.tell_in(*self.lock());
    }

    fn tell_in(&self, phase: Option<Phase>) {
        let (done, total) = self.tally.so_far();
        if phase == Some(Phase::Transfer) && total > 0 {
            self.observer.progress(done, total);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Phase>> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Arriving<'_> {
    fn phase(&self, phase: Phase) {
        // Told under the lock, so that progress is never told of the phase before.
        let mut current = self.lock();
        if *current == Some(phase) {
            return;
        }
        self.tell_in(*current);
        *current = Some(phase);
        self.observer.phase(phase);
    }

    fn progress(&self, done: u64, total: u64) {
        self.observer.progress(done, total);
    }

    fn warning(&self, message: &str) {
        self.observer.warning(message);
    }

    fn wire(&self, bytes: u64) {
        self.observer.wire(bytes);
    }

    fn invalidated(&self, id: &str, bitmaps: &[BitmapReport]) {
        self.observer.invalidated(id, bitmaps);
    }

    fn is_cancelled(&self) -> bool {
        self.observer.is_cancelled()
    }
}
