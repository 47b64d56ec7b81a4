//! Work that need not be done before the next record is read.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::stream::{Error, Result};

/// Jobs that may wait. Those with content are bounded by their buffers before.
const QUEUE_JOBS: usize = 64;

type Job = Box<dyn FnOnce() -> Result<()> + Send>;

/// A bounded queue of jobs, done in any order by threads that call [`work`](Jobs::work). The first
/// error is kept for whoever asks next.
#[derive(Default)]
pub struct Jobs {
    state: Mutex<State>,
    has_jobs: Condvar,
    has_room: Condvar,
    is_idle: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    /// Jobs that were taken and are not done.
    running: usize,
    is_closed: bool,
    error: Option<Error>,
}

impl Jobs {
    /// An empty queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits for room and puts a job in. Fails once a job has failed or the queue is closed.
    pub fn put(&self, job: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        let full = |s: &mut State| s.queue.len() >= QUEUE_JOBS && !s.is_closed;
        let waited = self.has_room.wait_while(self.lock(), full);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.is_closed {
            return Err(state.error.take().unwrap_or(Error::Ended));
        }
        state.queue.push_back(Box::new(job));
        drop(state);
        self.has_jobs.notify_one();
        Ok(())
    }

    /// Does jobs until the queue is closed. `failed` is called once, with the first error.
    pub fn work(&self, failed: &dyn Fn(Error)) {
        // Whatever ends this worker, a panic included, must not leave others waiting for it.
        let _closing = CloseOnPanic(self);
        loop {
            let idle = |s: &mut State| s.queue.is_empty() && !s.is_closed;
            let waited = self.has_jobs.wait_while(self.lock(), idle);
            let mut state = waited.unwrap_or_else(PoisonError::into_inner);
            let Some(job) = state.queue.pop_front() else { return };
            state.running += 1;
            drop(state);
            self.has_room.notify_one();
            let result = job();
            let mut state = self.lock();
            state.running -= 1;
            if result.is_err() {
                state.is_closed = true;
                state.queue.clear();
            }
            let is_idle = state.running == 0 && state.queue.is_empty();
            drop(state);
            if let Err(error) = result {
                failed(error);
                self.wake_all();
            } else if is_idle {
                self.is_idle.notify_all();
            }
        }
    }

    /// Waits until all jobs that were put in are done. Nobody puts in others meanwhile.
    pub fn wait_idle(&self) -> Result<()> {
        let busy = |s: &mut State| (s.running > 0 || !s.queue.is_empty()) && !s.is_closed;
        let waited = self.is_idle.wait_while(self.lock(), busy);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.is_closed { Err(state.error.take().unwrap_or(Error::Ended)) } else { Ok(()) }
    }

    /// Throws away what waits; workers end when they have done what they do.
    pub fn close(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        state.queue.clear();
        drop(state);
        self.wake_all();
    }

    fn wake_all(&self) {
        self.has_jobs.notify_all();
        self.has_room.notify_all();
        self.is_idle.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Jobs").finish_non_exhaustive()
    }
}

struct CloseOnPanic<'a>(&'a Jobs);

impl Drop for CloseOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn all_jobs_are_done_before_it_is_idle() {
        let jobs = Jobs::new();
        let done = Arc::new(AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| jobs.work(&|_| {}));
            }
            for round in 1..=5 {
                for _ in 0..200 {
                    let done = done.clone();
                    jobs.put(move || {
                        done.fetch_add(1, Ordering::Relaxed);
                        Ok(())
                    })
                    .unwrap();
                }
                jobs.wait_idle().unwrap();
                assert_eq!(done.load(Ordering::Relaxed), round * 200);
            }
            jobs.close();
        });
    }

    #[test]
    fn an_error_ends_everybody() {
        let jobs = Jobs::new();
        let failures = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    jobs.work(&|_| {
                        failures.fetch_add(1, Ordering::Relaxed);
                    })
                });
            }
            jobs.put(|| Err(Error::Interrupted)).unwrap();
            while jobs.put(|| Ok(())).is_ok() {}
            assert!(jobs.wait_idle().is_err());
        });
        assert_eq!(failures.into_inner(), 1);
    }
}
