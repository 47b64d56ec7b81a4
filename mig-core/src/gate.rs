//! The destination's side of a barrier (SPEC 8).

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::stream::{Error, Result};

/// Where the readers of all connections wait for one another.
///
/// Whoever reads BARRIER `k` on a connection comes here and reads nothing further before all have
/// come. The last one applies what was read, and answers, while the others still wait: so nothing
/// is loaded while a barrier is applied.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    opened: Condvar,
}

#[derive(Debug)]
struct State {
    /// The last barrier that everybody has passed.
    passed: u64,
    /// Who waits at the next one.
    waiting: Vec<bool>,
    /// Whether the next one is durable, as the first to come said.
    is_durable: bool,
    is_closed: bool,
}

/// BARRIER as it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Barrier {
    /// Counts from 1.
    pub number: u64,
    /// Whether to sync.
    pub is_durable: bool,
    /// The connection it was read on.
    pub channel: u16,
    /// Where in that connection's stream.
    pub offset: u64,
}

impl Gate {
    /// For so many connections.
    pub fn new(channels: u16) -> Self {
        let waiting = vec![false; channels.into()];
        let state = State { passed: 0, waiting, is_durable: false, is_closed: false };
        Self { state: Mutex::new(state), opened: Condvar::new() }
    }

    /// Waits until this barrier was read on all connections and `apply`, called by the last one,
    /// has returned.
    pub fn arrive(&self, barrier: Barrier, apply: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut state = self.lock();
        state.enter(barrier)?;
        if state.waiting.iter().all(|waits| *waits) {
            drop(state);
            let closing = CloseOnPanic(self);
            let applied = apply();
            drop(closing);
            let mut state = self.lock();
            state.passed = barrier.number;
            state.waiting.fill(false);
            state.is_closed |= applied.is_err();
            drop(state);
            self.opened.notify_all();
            return applied;
        }
        let waits = |s: &mut State| s.passed < barrier.number && !s.is_closed;
        let waited = self.opened.wait_while(state, waits);
        let state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.is_closed { Err(Error::Ended) } else { Ok(()) }
    }

    /// The last barrier that everybody has passed.
    pub fn passed(&self) -> u64 {
        self.lock().passed
    }

    /// Lets everybody who waits, or comes later, fail.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.opened.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whatever ends the one who applies must not leave the others waiting.
struct CloseOnPanic<'a>(&'a Gate);

impl Drop for CloseOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close();
        }
    }
}

impl State {
    fn enter(&mut self, barrier: Barrier) -> Result<()> {
        let Barrier { number, is_durable, channel, offset } = barrier;
        if self.is_closed {
            return Err(Error::Ended);
        }
        let expected = self.passed.saturating_add(1);
        if number != expected {
            let reason = format!("barrier {number} comes where {expected} is expected");
            return Err(Error::protocol(channel, offset, reason));
        }
        let is_first = !self.waiting.iter().any(|waits| *waits);
        if !is_first && self.is_durable != is_durable {
            let reason = format!("barrier {number} is durable on some connections only");
            return Err(Error::protocol(channel, offset, reason));
        }
        self.is_durable = is_durable;
        if let Some(waits) = self.waiting.get_mut(usize::from(channel)) {
            *waits = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn barrier(number: u64, channel: u16) -> Barrier {
        Barrier { number, is_durable: false, channel, offset: 77 }
    }

    #[test]
    fn nobody_passes_before_all_have_come() {
        let gate = Gate::new(3);
        let (arrived, applied) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for channel in 0..3 {
                let (gate, arrived, applied) = (&gate, &arrived, &applied);
                scope.spawn(move || {
                    for number in 1..200 {
                        arrived.fetch_add(1, Ordering::SeqCst);
                        let apply = || {
                            assert_eq!(arrived.load(Ordering::SeqCst), number * 3);
                            applied.fetch_add(1, Ordering::SeqCst);
                            Ok(())
                        };
                        gate.arrive(barrier(number, channel), apply).unwrap();
                        assert_eq!(applied.load(Ordering::SeqCst), number);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_while_it_is_applied_frees_the_others() {
        let gate = Gate::new(2);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| gate.arrive(barrier(1, 1), || Ok(())));
            while gate.lock().waiting != [false, true] {
                std::thread::yield_now();
            }
            let applies = scope.spawn(|| gate.arrive(barrier(1, 0), || panic!("a handler's own")));
            assert!(applies.join().is_err());
            assert!(matches!(waiter.join().unwrap(), Err(Error::Ended)));
        });
    }

    #[test]
    fn wrong_numbers_and_closing() {
        let gate = Gate::new(1);
        gate.arrive(barrier(1, 0), || Ok(())).unwrap();
        for wrong in [1, 3, 0] {
            let error = gate.arrive(barrier(wrong, 0), || Ok(())).unwrap_err().to_string();
            assert!(error.contains("where 2 is expected") && error.contains("77"), "{error}");
        }
        let gate = Gate::new(2);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| gate.arrive(barrier(1, 1), || Ok(())));
            while gate.lock().waiting != [false, true] {
                std::thread::yield_now();
            }
            let odd = Barrier { is_durable: true, ..barrier(1, 0) };
            let error = gate.arrive(odd, || Ok(())).unwrap_err().to_string();
            assert!(error.contains("durable on some"), "{error}");
            gate.close();
            assert!(matches!(waiter.join().unwrap(), Err(Error::Ended)));
        });
        assert!(matches!(gate.arrive(barrier(1, 0), || Ok(())), Err(Error::Ended)));
    }
}
