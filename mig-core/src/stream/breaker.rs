//! The first error of a session, and the end of all its connections.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Error, Result};
use crate::transport::HangUp;

/// Keeps the first error of the threads of a session, and ends connections so that none of them
/// waits for a peer that does not matter any more.
#[derive(Default)]
pub struct Breaker {
    is_broken: AtomicBool,
    first: Mutex<Option<Error>>,
    lines: Mutex<Vec<Arc<dyn HangUp>>>,
}

impl Breaker {
    /// A session without connections.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a connection. One that comes after the end is ended at once.
    pub fn add(&self, line: Arc<dyn HangUp>) {
        let mut lines = lock(&self.lines);
        if self.is_broken() {
            line.hang_up();
        }
        lines.push(line);
    }

    /// Notes an error. The first one that is not a mere consequence of others is kept. Returns
    /// whether this is the first one.
    pub fn note(&self, error: Error) -> bool {
        let was_broken = self.is_broken.swap(true, Ordering::AcqRel);
        let mut first = lock(&self.first);
        match &*first {
            Some(kept) if !kept.is_secondary() || error.is_secondary() => {}
            _ => *first = Some(error),
        }
        !was_broken
    }

    /// Ends all connections. Whoever waits on one fails.
    pub fn hang_up(&self) {
        lock(&self.lines).iter().for_each(|line| line.hang_up());
    }

    /// Whether an error was noted.
    pub fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Acquire)
    }

    /// Fails once an error was noted.
    pub fn check(&self) -> Result<()> {
        if self.is_broken() { Err(Error::Ended) } else { Ok(()) }
    }

    /// The error to report: what was noted, or else `error`.
    pub fn explain(&self, error: Error) -> Error {
        match lock(&self.first).take() {
            Some(first) if error.is_secondary() || !first.is_secondary() => first,
            _ => error,
        }
    }
}

impl std::fmt::Debug for Breaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Breaker").field("first", &self.first).finish_non_exhaustive()
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
