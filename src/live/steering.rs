//! Between two rounds: what the measurements say, what is decided, what others get to see.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use block_mig::Monitor;
use mig_core::meter::Meter;

use crate::Observer;
use crate::observe::Progress;
use crate::outgoing::{Next, Policy, Round};
use crate::policy::{self, Bandwidth, Decision, Handover, Limits, Reason, Standing};
use crate::status::{Migration, Status};

/// Rounds whose wait for storage is remembered.
const SETTLED_ROUNDS: usize = 3;
/// Shortest time from the begin of one round to that of the next, while the guest runs.
const MIN_ROUND: Duration = Duration::from_millis(10);

/// What is learnt over all attempts of one migration.
#[derive(Debug)]
pub(super) struct Steering<'a> {
    migration: &'a Migration,
    limits: Limits,
    begun: Instant,
    bandwidth: Bandwidth,
    pub(super) passes: u32,
    stuck_passes: u32,
    /// What was left after the round before: what this round had to send.
    left_before: Option<u64>,
    /// What the last rounds waited for storage, the newest last.
    settled: VecDeque<Duration>,
    handover: Handover,
    /// Whether an attempt came as far as PREPARE: the destination may be ready with it.
    has_prepared: bool,
    /// Whether the guest is paused and was let go of: it is handed over, however long that takes.
    pub(super) is_let_go: bool,
    /// Why it gave up, if it did.
    pub(super) reason: Option<Reason>,
}

impl<'a> Steering<'a> {
    pub(super) fn new(migration: &'a Migration, limits: Limits) -> Self {
        Self {
            migration,
            limits,
            begun: Instant::now(),
            bandwidth: Bandwidth::default(),
            passes: 0,
            stuck_passes: 0,
            left_before: None,
            settled: VecDeque::new(),
            handover: Handover::default(),
            has_prepared: false,
            is_let_go: false,
            reason: None,
        }
    }

    /// A new attempt begins with everything again.
    pub(super) fn restart(&mut self) {
        self.stuck_passes = 0;
        self.left_before = None;
    }

    /// Whether an attempt came as far as PREPARE, and its destination may be ready with it.
    pub(super) fn has_prepared(&self) -> bool {
        self.has_prepared
    }

    /// The destination has taken back what it was ready with.
    pub(super) fn taken_back(&mut self) {
        self.has_prepared = false;
    }

    /// What the handover takes besides sending. Storage is judged by the best of the last rounds: a
    /// round in which others kept it busy says little of the pause.
    fn overhead(&mut self, round: &Round) -> Duration {
        self.settled.push_back(round.settling);
        if self.settled.len() > SETTLED_ROUNDS {
            self.settled.pop_front();
        }
        self.handover.settling = self.settled.iter().min().copied().unwrap_or_default();
        self.handover.round_trip = round.round_trip;
        self.handover.expected()
    }

    /// When the time is up, if it is limited.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.limits.timeout.and_then(|timeout| self.begun.checked_add(timeout))
    }

    fn standing(&mut self, round: &Round) -> Standing {
        self.passes = self.passes.saturating_add(1);
        self.bandwidth.add(round.wire_bytes, round.sending);
        let remaining = round.pending.must_precopy;
        let sent = self.left_before.unwrap_or(u64::MAX);
        self.left_before = Some(remaining);
        let is_stuck = !policy::makes_progress(sent, remaining);
        self.stuck_passes = if is_stuck { self.stuck_passes.saturating_add(1) } else { 0 };
        let micros = round.took.as_micros().max(1);
        let dirty_rate = u128::from(remaining) * 1_000_000 / micros;
        let overhead = self.overhead(round);
        Standing {
            remaining,
            has_bulk: round.pending.has_bulk,
            bandwidth: self.bandwidth.bytes_per_second(),
            dirty_rate: u64::try_from(dirty_rate).unwrap_or(u64::MAX),
            overhead,
            elapsed: self.begun.elapsed(),
            passes: self.passes,
            stuck_passes: self.stuck_passes,
            throttle: self.migration.throttle(),
            is_cancelled: self.migration.is_cancelled(),
        }
    }

    fn publish(&self, now: &Standing, round: &Round) {
        let expected = policy::expected_downtime(now);
        self.migration.update(|info| {
            info.expected_downtime = expected.map(millis);
            let disk = info.disk.get_or_insert_default();
            disk.dirty_sync_count = u64::from(self.passes);
            disk.dirty_bytes_rate = now.dirty_rate;
            disk.remaining = now.remaining;
            disk.transferred = disk.transferred.saturating_add(round.wire_bytes);
            // A rate for people: what it loses above 2^53 is not missed.
            #[allow(clippy::cast_precision_loss)]
            let mbps = now.bandwidth as f64 * 8.0 / 1e6;
            disk.mbps = mbps;
        });
    }
}

impl Policy for Steering<'_> {
    fn next(&mut self, round: &Round) -> Next {
        let now = self.standing(round);
        self.publish(&now, round);
        if self.is_let_go && !now.has_bulk {
            return Next::Complete;
        }
        let downtime = Duration::from_millis(self.migration.parameters().downtime_limit);
        let decision = policy::decide(&Limits { downtime, ..self.limits }, &now);
        tracing::debug!(?now, ?decision, "decided");
        match decision {
            Decision::GoOn => {
                // Many small rounds would keep the destination's storage busy with syncs.
                std::thread::sleep(MIN_ROUND.saturating_sub(round.took));
                Next::Round
            }
            Decision::SwitchOver(_) => Next::Complete,
            Decision::Throttle(percent) => {
                self.stuck_passes = 0;
                Next::Throttle(percent)
            }
            Decision::GiveUp(reason) => {
                self.reason = Some(reason);
                Next::GiveUp
            }
        }
    }

    fn measures(&self) -> bool {
        true
    }

    fn preparing(&mut self) {
        self.has_prepared = true;
    }

    fn prepared(&mut self, took: Duration) {
        self.handover.prepare = Some(took);
    }
}

/// What the engine asks while it works: whether to stop, and tells how far it came.
pub(super) struct Eye<'a> {
    migration: &'a Migration,
    meter: &'a Meter,
    deadline: Option<Instant>,
    observer: &'a dyn Observer,
    progress: &'a Progress<'a>,
}

impl<'a> Eye<'a> {
    pub(super) fn new(
        migration: &'a Migration,
        meter: &'a Meter,
        deadline: Option<Instant>,
        (observer, progress): (&'a dyn Observer, &'a Progress<'a>),
    ) -> Self {
        let eye = Self { migration, meter, deadline, observer, progress };
        eye.steer_meter();
        eye
    }

    /// Brings the meter to the bandwidth that is allowed now; frees whoever waits for it when all
    /// is to stop.
    pub(super) fn steer_meter(&self) {
        let wanted = Some(self.migration.parameters().max_bandwidth);
        let wanted = wanted.filter(|rate| *rate > 0 && !self.is_cancelled());
        if self.meter.bandwidth() != wanted {
            self.meter.set_bandwidth(wanted);
        }
    }

    /// Whether the time is up while the guest still runs: a pause that has begun is brought to its
    /// end.
    fn is_late(&self) -> bool {
        let is_over = || self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        is_over() && self.migration.info().status == Status::Active
    }
}

impl Monitor for Eye<'_> {
    fn advance(&self, bytes: u64) {
        self.progress.advance(bytes);
        self.migration.update(|info| {
            let disk = info.disk.get_or_insert_default();
            disk.normal_bytes = disk.normal_bytes.saturating_add(bytes);
        });
    }

    fn is_cancelled(&self) -> bool {
        if self.observer.is_cancelled() {
            self.migration.cancel();
        }
        self.migration.is_cancelled() || self.is_late()
    }
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
