//! How a long operation is watched and stopped.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mig_core::heart::Heart;
use mig_core::transport::HangUp;

/// How often it is looked whether the user wants to stop, while a peer is waited for.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

use crate::report::BitmapReport;

/// Where a long operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Opening images, deciding, looking for room. No totals.
    Plan,
    /// Waiting for a source to connect. No totals.
    Wait,
    /// Reading again what an earlier try left. Totals are bytes of the disk.
    Recheck,
    /// Moving guest data. Totals are bytes of stored data, zeroes excluded; at a destination, which
    /// is not told how much that is, bytes of the disks, zeroes included.
    Transfer,
    /// Storing bitmaps.
    Bitmaps,
    /// Writing metadata and syncing.
    Seal,
    /// Reading the destination back. Totals are bytes of stored data.
    Prove,
    /// Renaming to the final names.
    Publish,
    /// Hashing or comparing, for the verbs that only read.
    Read,
}

impl Phase {
    /// The phase in one lower-case word, for people and events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Wait => "wait",
            Self::Recheck => "recheck",
            Self::Transfer => "transfer",
            Self::Bitmaps => "bitmaps",
            Self::Seal => "seal",
            Self::Prove => "prove",
            Self::Publish => "publish",
            Self::Read => "read",
        }
    }
}

/// Who watches a long operation. All methods may be called from any thread and must return soon.
pub trait Observer: Send + Sync {
    /// A new phase begins; progress starts at zero.
    fn phase(&self, _phase: Phase) {}

    /// `done` of `total` bytes of the current phase. `done` never falls within a phase and ends at
    /// `total` when the phase succeeds.
    fn progress(&self, _done: u64, _total: u64) {}

    /// Something the user should know that is not an error: one sentence, no full stop.
    fn warning(&self, _message: &str) {}

    /// So many bytes have gone over the wire, in all attempts together. Told of what fails, before
    /// its error: of what succeeds the report says it.
    fn wire(&self, _bytes: u64) {}

    /// Bitmaps that the disk `id` has here and that cannot be trusted. Told of what fails, before
    /// its error: of what succeeds the report says it.
    fn invalidated(&self, _id: &str, _bitmaps: &[BitmapReport]) {}

    /// Whether to stop. Polled at least once per MiB of data. What was begun is undone.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Calls `body`, and hangs up the line when the observer wants to stop, or when that takes longer
/// than `limit`: for peers that say nothing.
pub(crate) fn interruptible<T>(
    observer: &dyn Observer,
    line: &dyn HangUp,
    limit: Option<Duration>,
    body: impl FnOnce() -> T,
) -> T {
    let end = limit.and_then(|limit| Instant::now().checked_add(limit));
    let over = Heart::new();
    std::thread::scope(|scope| {
        let _stopping = over.stop_on_drop();
        scope.spawn(|| {
            over.run(LOOK_INTERVAL, || {
                if observer.is_cancelled() || end.is_some_and(|end| Instant::now() >= end) {
                    line.hang_up();
                }
            });
        });
        body()
    })
}

/// Watches nothing and never stops.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {}

/// Progress of one phase, as the engine reports it.
pub(crate) struct Progress<'a> {
    observer: &'a dyn Observer,
    total: u64,
    done: Mutex<u64>,
}

impl<'a> Progress<'a> {
    /// Begins a phase of `total` bytes.
    pub(crate) fn begin(observer: &'a dyn Observer, phase: Phase, total: u64) -> Self {
        observer.phase(phase);
        observer.progress(0, total);
        Self { observer, total, done: Mutex::new(0) }
    }

    /// The phase has succeeded.
    pub(crate) fn end(self) {
        self.observer.progress(self.total, self.total);
    }
}

impl block_mig::Monitor for Progress<'_> {
    fn advance(&self, bytes: u64) {
        // Told under the lock, so that `done` never falls.
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        *done = done.saturating_add(bytes).min(self.total);
        self.observer.progress(*done, self.total);
    }

    fn is_cancelled(&self) -> bool {
        self.observer.is_cancelled()
    }
}

/// Stops the engine when the observer wants it; what it moves is not counted.
pub(crate) struct Stops<'a>(pub(crate) &'a dyn Observer);

impl block_mig::Monitor for Stops<'_> {
    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}
