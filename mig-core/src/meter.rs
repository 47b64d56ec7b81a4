//! How fast a side may send.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::limits::BURST;

/// Longest sleep before the bandwidth is looked at again.
const MAX_SLEEP: Duration = Duration::from_millis(200);

/// Limits the bandwidth of all connections together. May be changed while they are used.
#[derive(Debug)]
pub struct Meter {
    bucket: Mutex<Bucket>,
    changed: Condvar,
    epoch: Instant,
}

impl Meter {
    /// A limit in bytes per second; `None` for none.
    pub fn new(bandwidth: Option<u64>) -> Self {
        let bucket = Mutex::new(Bucket::new(bandwidth));
        Self { bucket, changed: Condvar::new(), epoch: Instant::now() }
    }

    /// Sets another limit.
    pub fn set_bandwidth(&self, bandwidth: Option<u64>) {
        let mut bucket = self.lock();
        bucket.refill(self.epoch.elapsed());
        bucket.rate = bandwidth;
        drop(bucket);
        self.changed.notify_all();
    }

    /// The limit.
    pub fn bandwidth(&self) -> Option<u64> {
        self.lock().rate
    }

    /// Waits until so many bytes may be sent. Returns at once when `is_stopped` says so.
    pub fn spend(&self, bytes: u64, is_stopped: &dyn Fn() -> bool) {
        let mut bucket = self.lock();
        loop {
            bucket.refill(self.epoch.elapsed());
            let wait = bucket.wait();
            if wait.is_zero() || is_stopped() {
                bucket.take(bytes);
                return;
            }
            let waited = self.changed.wait_timeout(bucket, wait.min(MAX_SLEEP));
            bucket = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Meter {
    fn default() -> Self {
        Self::new(None)
    }
}

/// A token bucket that may be overdrawn: whoever finds it not empty takes what it needs, the next
/// one waits for that.
#[derive(Debug)]
struct Bucket {
    /// Bytes per second.
    rate: Option<u64>,
    /// Bytes that may be sent now; below zero what was sent too early.
    tokens: i128,
    /// When tokens were last added, since the start.
    at: Duration,
}

impl Bucket {
    fn new(rate: Option<u64>) -> Self {
        Self { rate, tokens: 0, at: Duration::ZERO }
    }

    fn refill(&mut self, now: Duration) {
        let Some(rate) = self.rate else {
            self.at = now;
            return;
        };
        let earned = bytes_in(rate, now.saturating_sub(self.at));
        if earned > 0 {
            self.at = now;
            self.tokens = self.tokens.saturating_add(earned).min(bytes_in(rate, BURST).max(1));
        }
    }

    /// How long until something may be sent.
    fn wait(&self) -> Duration {
        match self.rate {
            Some(rate) if self.tokens <= 0 => {
                let missing = self.tokens.unsigned_abs().saturating_add(1);
                let nanos = missing.saturating_mul(1_000_000_000).div_ceil(rate.max(1).into());
                Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
            }
            _ => Duration::ZERO,
        }
    }

    fn take(&mut self, bytes: u64) {
        if self.rate.is_some() {
            self.tokens = self.tokens.saturating_sub(bytes.into());
        }
    }
}

fn bytes_in(rate: u64, time: Duration) -> i128 {
    let bytes = u128::from(rate).saturating_mul(time.as_nanos()) / 1_000_000_000;
    i128::try_from(bytes).unwrap_or(i128::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_rate_is_kept_over_any_time() {
        let mut bucket = Bucket::new(Some(1_000_000));
        let (mut now, mut sent) = (Duration::ZERO, 0u64);
        while now < 1000 * MS {
            bucket.refill(now);
            match bucket.wait() {
                Duration::ZERO => {
                    bucket.take(30_000);
                    sent += 30_000;
                }
                wait => now += wait,
            }
        }
        assert!((1_000_000..1_100_000).contains(&sent), "{sent}");
    }

    #[test]
    fn idle_time_is_saved_up_only_for_a_burst() {
        let mut bucket = Bucket::new(Some(1_000_000));
        bucket.refill(Duration::from_secs(100));
        assert_eq!(bucket.tokens, bytes_in(1_000_000, BURST));
        bucket.rate = None;
        bucket.take(1 << 40);
        assert!(bucket.wait().is_zero());
        assert_eq!(Bucket::new(Some(0)).wait(), Duration::from_secs(1));
    }

    #[test]
    fn a_waiter_is_freed_by_a_new_limit_or_a_stop() {
        let meter = Meter::new(Some(1));
        meter.spend(1 << 30, &|| true);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| meter.spend(1, &|| false));
            meter.set_bandwidth(None);
            waiter.join().unwrap();
        });
        assert_eq!(meter.bandwidth(), None);
    }
}
