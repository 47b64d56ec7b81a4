//! Something that is done again and again until it is stopped.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Beats on a thread of its own until it is stopped.
#[derive(Debug, Default)]
pub struct Heart {
    is_stopped: Mutex<bool>,
    stopped: Condvar,
}

impl Heart {
    /// A heart that does not beat yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls `beat` after each interval until it is stopped.
    pub fn run(&self, interval: Duration, mut beat: impl FnMut()) {
        while !self.wait(interval) {
            beat();
        }
    }

    /// Waits so long. Returns whether it was stopped meanwhile.
    pub fn wait(&self, limit: Duration) -> bool {
        let waited = self.stopped.wait_timeout_while(self.lock(), limit, |stopped| !*stopped);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Ends [`run`](Heart::run) and [`wait`](Heart::wait), now and later.
    pub fn stop(&self) {
        *self.lock() = true;
        self.stopped.notify_all();
    }

    /// Stops it when what this returns is dropped, also by a panic.
    pub fn stop_on_drop(&self) -> Stopping<'_> {
        Stopping(self)
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.is_stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stops a heart when it is dropped.
#[derive(Debug)]
pub struct Stopping<'a>(&'a Heart);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Calls `body`, and hangs up the line if that takes longer than `limit`: for peers that connect
/// and say nothing.
pub fn within<T>(
    limit: Duration,
    line: &dyn crate::transport::HangUp,
    body: impl FnOnce() -> T,
) -> T {
    let heart = Heart::new();
    std::thread::scope(|scope| {
        let _stopping = heart.stop_on_drop();
        scope.spawn(|| {
            if !heart.wait(limit) {
                line.hang_up();
            }
        });
        body()
    })
}
