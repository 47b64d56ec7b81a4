//! What the threads of a migration tell, handed on to an observer that is only lent.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::{Observer, Phase};

/// An observer that remembers what it is told until that is handed on.
#[derive(Debug, Default)]
pub(super) struct Relay {
    told: Mutex<Vec<Told>>,
    is_cancelled: AtomicBool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Told {
    Phase(Phase),
    Progress(u64, u64),
    Warning(String),
}

impl Relay {
    /// Tells `observer` what was told since the last call, and asks it whether to stop.
    pub(super) fn hand_on(&self, observer: &dyn Observer) {
        let told = std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner));
        for told in told {
            match told {
                Told::Phase(phase) => observer.phase(phase),
                Told::Progress(done, total) => observer.progress(done, total),
                Told::Warning(message) => observer.warning(&message),
            }
        }
        self.is_cancelled.store(observer.is_cancelled(), Ordering::Relaxed);
    }

    fn tell(&self, new: Told) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        // Of several the last one counts.
        if let (Some(Told::Progress(..)), Told::Progress(..)) = (told.last(), &new) {
            told.pop();
        }
        told.push(new);
    }
}

impl Observer for Relay {
    fn phase(&self, phase: Phase) {
        self.tell(Told::Phase(phase));
    }

    fn progress(&self, done: u64, total: u64) {
        self.tell(Told::Progress(done, total));
    }

    fn warning(&self, message: &str) {
        self.tell(Told::Warning(message.to_owned()));
    }

    fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_comes_in_order_and_once() {
        let (relay, heard) = (Relay::default(), Relay::default());
        relay.phase(Phase::Recheck);
        relay.progress(1, 9);
        relay.progress(2, 9);
        relay.phase(Phase::Transfer);
        relay.progress(0, 1);
        relay.warning("mind the gap");
        heard.is_cancelled.store(true, Ordering::Relaxed);
        assert!(!relay.is_cancelled());
        relay.hand_on(&heard);
        relay.hand_on(&heard);
        assert!(relay.is_cancelled());
        let (recheck, transfer) = (Told::Phase(Phase::Recheck), Told::Phase(Phase::Transfer));
        let (two, none) = (Told::Progress(2, 9), Told::Progress(0, 1));
        let warning = Told::Warning("mind the gap".to_owned());
        assert_eq!(*heard.told.lock().unwrap(), [recheck, two, transfer, none, warning]);
    }
}
