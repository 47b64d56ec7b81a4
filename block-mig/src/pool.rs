//! Hand units to worker threads through a bounded queue. The first error stops everybody.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::limits::QUEUE_UNITS;
use crate::monitor::Monitor;

/// How to run.
#[derive(Clone, Copy)]
pub struct Pool<'a> {
    /// Worker threads, at least one.
    pub workers: usize,
    /// Asked before each unit whether to stop.
    pub monitor: &'a dyn Monitor,
}

impl Pool<'_> {
    /// Calls `work` for each unit, on any worker, in the order of the units as far as workers are
    /// free. `state` makes what one worker keeps from unit to unit (buffers). The calling thread
    /// only produces. Returns when all workers have ended.
    pub fn run<U: Send, S>(
        &self,
        units: impl Iterator<Item = Result<U>>,
        state: impl Fn() -> S + Sync,
        work: impl Fn(&mut S, U) -> Result<()> + Sync,
    ) -> Result<()> {
        let queue = Queue::new();
        std::thread::scope(|scope| {
            for _ in 0..self.workers.max(1) {
                scope.spawn(|| {
                    // Whatever ends this worker, a panic included, must not leave the producer
                    // waiting for room.
                    let _closing = CloseOnDrop(&queue);
                    let mut state = state();
                    while let Some(unit) = queue.take() {
                        if let Err(error) = self.go_on().and_then(|()| work(&mut state, unit)) {
                            queue.fail(error);
                        }
                    }
                });
            }
            // Nor may a producer that panics leave the workers waiting for units.
            let _closing = CloseOnDrop(&queue);
            for unit in units {
                let is_wanted = match unit {
                    Ok(unit) => queue.put(unit),
                    Err(error) => {
                        queue.fail(error);
                        false
                    }
                };
                if !is_wanted {
                    break;
                }
            }
            queue.close();
        });
        queue.outcome()
    }

    fn go_on(&self) -> Result<()> {
        if self.monitor.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

struct State<U> {
    units: VecDeque<U>,
    is_closed: bool,
    error: Option<Error>,
}

struct Queue<U> {
    state: Mutex<State<U>>,
    has_units: Condvar,
    has_room: Condvar,
}

struct CloseOnDrop<'a, U>(&'a Queue<U>);

impl<U> Drop for CloseOnDrop<'_, U> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close();
        }
    }
}

impl<U> Queue<U> {
    fn new() -> Self {
        let units = VecDeque::with_capacity(QUEUE_UNITS);
        Self {
            state: Mutex::new(State { units, is_closed: false, error: None }),
            has_units: Condvar::new(),
            has_room: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<U>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for room. `false` once the queue is closed or has failed.
    fn put(&self, unit: U) -> bool {
        let full = |s: &mut State<U>| s.units.len() >= QUEUE_UNITS && !s.is_closed;
        let mut state =
            self.has_room.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        if state.is_closed {
            return false;
        }
        state.units.push_back(unit);
        drop(state);
        self.has_units.notify_one();
        true
    }

    /// Waits for a unit. `None` once the queue is closed and empty.
    fn take(&self) -> Option<U> {
        let empty = |s: &mut State<U>| s.units.is_empty() && !s.is_closed;
        let mut state =
            self.has_units.wait_while(self.lock(), empty).unwrap_or_else(PoisonError::into_inner);
        let unit = state.units.pop_front();
        // The producer is woken when there is something worth its while.
        let wakes = state.units.len() <= QUEUE_UNITS / 2;
        drop(state);
        if wakes {
            self.has_room.notify_one();
        }
        unit
    }

    fn close(&self) {
        self.lock().is_closed = true;
        self.has_units.notify_all();
        self.has_room.notify_all();
    }

    fn fail(&self, error: Error) {
        let mut state = self.lock();
        state.error.get_or_insert(error);
        state.units.clear();
        drop(state);
        self.close();
    }

    fn outcome(self) -> Result<()> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.error.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::Unwatched;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    fn pool(workers: usize) -> Pool<'static> {
        Pool { workers, monitor: &Unwatched }
    }

    #[test]
    fn every_unit_is_done_once() {
        for workers in [1, 2, 7] {
            let sum = AtomicU64::new(0);
            let add = |_: &mut (), n: u64| {
                sum.fetch_add(n, Ordering::Relaxed);
                Ok(())
            };
            pool(workers).run((0..10_000).map(Ok), || (), add).unwrap();
            assert_eq!(sum.into_inner(), 10_000 * 9_999 / 2);
        }
    }

    #[test]
    fn the_first_error_stops_producer_and_workers() {
        let made = AtomicU64::new(0);
        let units = (0..).map(|n: u64| {
            made.fetch_add(1, Ordering::Relaxed);
            Ok(n)
        });
        let fail = |_: &mut (), n: u64| if n == 500 { Err(Error::Cancelled) } else { Ok(()) };
        assert!(matches!(pool(3).run(units, || (), fail), Err(Error::Cancelled)));
        assert!(made.into_inner() < 500 + 2 * QUEUE_UNITS as u64);
    }

    #[test]
    fn a_producer_error_is_reported() {
        let units = [Ok(1u64), Err(Error::Cancelled), Ok(2)].into_iter();
        assert!(pool(2).run(units, || (), |_, _| Ok(())).is_err());
    }

    #[test]
    fn cancelling_stops_within_the_queue() {
        struct Stop(AtomicBool);
        impl Monitor for Stop {
            fn is_cancelled(&self) -> bool {
                self.0.load(Ordering::Relaxed)
            }
        }
        let stop = Stop(AtomicBool::new(false));
        let work = |_: &mut (), n: u64| {
            if n == 100 {
                stop.0.store(true, Ordering::Relaxed);
            }
            Ok(())
        };
        let outcome = Pool { workers: 2, monitor: &stop }.run((0..).map(Ok), || (), work);
        assert!(matches!(outcome, Err(Error::Cancelled)));
    }
}
