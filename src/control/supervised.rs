//! A long operation that is looked at and called off through the socket.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mig_core::meter::Meter;

use super::{Controlled, Refused};
use crate::status::{Migration, Status};
use crate::{Error, Observer, Phase};

/// Shortest time whose rate is told as that of the moment.
const RATE_WINDOW: Duration = Duration::from_secs(1);

/// How fast it goes: since it began, and in the latest window that is over.
#[derive(Debug, Clone, Copy)]
struct Pace {
    begun: (Instant, u64),
    window: (Instant, u64),
    mbps: Option<f64>,
}

impl Pace {
    fn new(now: Instant, done: u64) -> Self {
        Self { begun: (now, done), window: (now, done), mbps: None }
    }

    /// So many bytes are done. Answers the rate of the moment, or that from the beginning as long
    /// as there is none.
    fn step(&mut self, now: Instant, done: u64) -> f64 {
        if now.saturating_duration_since(self.window.0) >= RATE_WINDOW {
            self.mbps = Some(mbps(self.window, (now, done)));
            self.window = (now, done);
        }
        self.mbps.unwrap_or_else(|| mbps(self.begun, (now, done)))
    }
}

/// Megabits per second between two moments.
fn mbps((before, from): (Instant, u64), (now, to): (Instant, u64)) -> f64 {
    let took = now.saturating_duration_since(before).as_secs_f64();
    let bits = to.saturating_sub(from).saturating_mul(8);
    if took > 0.0 { bits as f64 / took / 1e6 } else { 0.0 }
}

/// An observer that writes down what it sees for `query-migrate`, and wants to stop once
/// `migrate-cancel` has come. What it sees it passes on.
pub struct Supervised<'a> {
    inner: &'a dyn Observer,
    migration: Arc<Migration>,
    /// Of the transfer that goes on, and what it had done last.
    pace: Mutex<Option<(Pace, u64)>>,
}

impl<'a> Supervised<'a> {
    /// Stands between an operation and its observer.
    pub fn new(inner: &'a dyn Observer, migration: Arc<Migration>) -> Self {
        migration.enter(Status::Setup);
        Self { inner, migration, pace: Mutex::default() }
    }

    /// What becomes of `mbps` when so much is done.
    fn rate(&self, done: u64) -> f64 {
        let now = Instant::now();
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        // Less than before: it begins again.
        let known = pace.filter(|(_, last)| done >= *last).map(|(known, _)| known);
        let mut current = known.unwrap_or_else(|| Pace::new(now, done));
        let rate = current.step(now, done);
        *pace = Some((current, done));
        rate
    }

    /// Writes down how it ended.
    pub fn end(&self, error: Option<&Error>) {
        self.migration.update(|info| {
            info.error_desc = error.map(|error| crate::report::error_chain(error));
            info.status = match error {
                None => Status::Completed,
                Some(Error::Interrupted) => Status::Cancelled,
                Some(_) => Status::Failed,
            };
        });
    }
}

impl Observer for Supervised<'_> {
    fn phase(&self, phase: Phase) {
        self.migration.enter(match phase {
            Phase::Plan | Phase::Wait | Phase::Recheck => Status::Setup,
            Phase::Transfer | Phase::Read => Status::Active,
            Phase::Bitmaps | Phase::Seal | Phase::Prove | Phase::Publish => Status::Device,
        });
        self.inner.phase(phase);
    }

    fn progress(&self, done: u64, total: u64) {
        let rate = self.rate(done);
        self.migration.update(|info| {
            if info.status == Status::Active {
                let disk = info.disk.get_or_insert_default();
                disk.mbps = rate;
                disk.total = total;
                disk.remaining = total.saturating_sub(done);
                (disk.transferred, disk.normal_bytes) = (done, done);
            }
        });
        self.inner.progress(done, total);
    }

    fn warning(&self, message: &str) {
        self.inner.warning(message);
    }

    fn is_cancelled(&self) -> bool {
        self.inner.is_cancelled() || self.migration.is_cancelled()
    }
}

/// A migration as one side has it in its hands.
#[derive(Debug)]
pub struct Metered {
    /// What is written down and asked for.
    pub migration: Arc<Migration>,
    /// What keeps to `max-bandwidth`; `None` where the other side does.
    pub meter: Option<Arc<Meter>>,
}

impl Metered {
    fn set(&self, rate: Option<u64>) {
        self.meter.iter().for_each(|meter| meter.set_bandwidth(rate));
    }
}

impl Controlled for Metered {
    fn migration(&self) -> &Migration {
        &self.migration
    }

    fn may_change(&self) -> Result<(), Refused> {
        let is_here = self.meter.is_some();
        is_here.then_some(()).ok_or_else(|| {
            Refused("the source keeps to these parameters: they are changed there".to_owned())
        })
    }

    fn parameters_changed(&self) {
        let rate = self.migration.parameters().max_bandwidth;
        self.set(Some(rate).filter(|rate| *rate > 0));
    }

    /// Frees whoever waits for bandwidth, so that it learns of it.
    fn cancelled(&self) {
        self.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_latest_window() {
        let at = |ms| Duration::from_millis(ms);
        let begun = Instant::now();
        let mut pace = Pace::new(begun, 0);
        assert_eq!(pace.step(begun, 0), 0.0);
        // 1 MB in half a second, and nothing behind it.
        assert_eq!(pace.step(begun + at(500), 1_000_000), 16.0);
        assert_eq!(pace.step(begun + at(1000), 1_000_000), 8.0);
        assert_eq!(pace.step(begun + at(1500), 2_000_000), 8.0);
        assert_eq!(pace.step(begun + at(2000), 3_000_000), 16.0);
    }
}
