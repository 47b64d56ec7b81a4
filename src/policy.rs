//! When a live migration goes on, slows the guest down, switches over or gives up. Pure.
//!
//! [`decide`] is asked after every pass over what changed. Its answer depends on nothing but its
//! arguments, so that a decision that looks wrong in a log can be made again in a test.
//!
//! The pause that is allowed is meant for all of the handover. But what it takes besides sending
//! gets no shorter by waiting: where it leaves little of what is allowed, or nothing, a quarter of
//! that is for sending all the same. QEMU, whose `downtime-limit` this is, allots all of it to
//! sending and does not look at the rest, so that a limit that lets its migrations come to an end
//! does so here, if a few passes later. [`expected_downtime`] always says the whole.

use std::time::Duration;

/// How the dirty rate must stand to the bandwidth for a pass to count as progress: less than this
/// many percent of what was sent came back.
const PROGRESS_PERCENT: u64 = 50;
/// First throttle, and by how much it grows, in percent of the guest's time.
const THROTTLE_FIRST: u8 = 20;
const THROTTLE_STEP: u8 = 10;
/// Most that a guest is slowed down. It goes on, or it would not be live.
pub const THROTTLE_MAX: u8 = 99;
/// What of the allowed pause is for sending, however long the rest of the handover takes.
const SENDING_SHARE: u32 = 4;
/// Sending that is worth another pass with the guest running, where passes make progress, although
/// the pause would be short enough.
const WORTH_A_PASS: Duration = Duration::from_millis(1);
/// Passes in a row without progress before something is done about it.
const STUCK_PASSES: u32 = 3;
/// Answers that a paused guest waits for: to PREPARE, which follows the final pass at once, and to
/// COMMIT.
const ANSWERS: u32 = 2;
/// What passes send that says something of the bandwidth: less is gone before it is measured.
const TELLING_BYTES: u64 = 1 << 20;

/// What the user allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest pause of the guest that is aimed at.
    pub downtime: Duration,
    /// How long the migration may take until the guest is paused; `None` for no limit.
    pub timeout: Option<Duration>,
    /// Passes after which it has to have converged; `None` for no limit.
    pub max_passes: Option<u32>,
    /// Whether the guest may be slowed down when it writes faster than can be sent.
    pub may_throttle: bool,
}

impl Default for Limits {
    fn default() -> Self {
        let downtime = Duration::from_millis(300);
        Self { downtime, timeout: None, max_passes: None, may_throttle: false }
    }
}

/// How the migration stands after a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    /// Bytes to be sent before the guest can run at the destination.
    pub remaining: u64,
    /// Whether some of that was never sent. Then nothing is complete, however little it seems.
    pub has_bulk: bool,
    /// Bytes per second that arrive; 0 while that is not known.
    pub bandwidth: u64,
    /// Bytes per second that the guest makes dirty.
    pub dirty_rate: u64,
    /// What the handover takes besides sending: round trips, syncs.
    pub overhead: Duration,
    /// Since the migration began.
    pub elapsed: Duration,
    /// Passes that are done, the bulk included.
    pub passes: u32,
    /// Passes in a row that made no progress; see [`makes_progress`].
    pub stuck_passes: u32,
    /// How much the guest is slowed down now, in percent.
    pub throttle: u8,
    /// Whether the user called it off.
    pub is_cancelled: bool,
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Another pass with the guest running.
    GoOn,
    /// Pause the guest and send the rest; the pause is expected to take this long.
    SwitchOver(Duration),
    /// Another pass, with the guest slowed down by this many percent.
    Throttle(u8),
    /// Call it off; the guest goes on at the source.
    GiveUp(Reason),
}

/// Why a migration is called off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The user wanted it.
    #[error("the migration was cancelled")]
    Cancelled,
    /// It took too long.
    #[error("the migration did not come to its end within the time that it was given")]
    Timeout,
    /// The guest writes faster than can be sent.
    #[error("the guest writes faster than can be sent: allow more downtime or bandwidth")]
    NoConvergence,
}

/// Decides what to do after a pass.
pub fn decide(limits: &Limits, now: &Standing) -> Decision {
    if now.is_cancelled {
        return Decision::GiveUp(Reason::Cancelled);
    }
    let is_late = limits.timeout.is_some_and(|timeout| now.elapsed >= timeout);
    let is_last = is_late || limits.max_passes.is_some_and(|max| now.passes >= max);
    // Whatever bandwidth and downtime multiply to: what was never sent is not "little enough".
    if !now.has_bulk
        && let Some(sending) = sending(now)
        && sending <= time_to_send(limits, now)
        && (is_last || !is_worth_a_pass(now, sending))
    {
        return Decision::SwitchOver(sending.saturating_add(now.overhead));
    }
    if is_late {
        return Decision::GiveUp(Reason::Timeout);
    }
    if now.has_bulk {
        return Decision::GoOn;
    }
    let is_stuck = now.stuck_passes >= STUCK_PASSES;
    if is_stuck && limits.may_throttle && now.throttle < THROTTLE_MAX {
        let next = now.throttle.saturating_add(THROTTLE_STEP).clamp(THROTTLE_FIRST, THROTTLE_MAX);
        return Decision::Throttle(next);
    }
    if limits.max_passes.is_some_and(|max| now.passes >= max) {
        return Decision::GiveUp(Reason::NoConvergence);
    }
    Decision::GoOn
}

/// How long the guest would be paused if it were paused now; `None` while nobody can say.
pub fn expected_downtime(now: &Standing) -> Option<Duration> {
    Some(sending(now)?.saturating_add(now.overhead))
}

/// How long it takes to send what is left; `None` while nobody can say.
fn sending(now: &Standing) -> Option<Duration> {
    match (now.remaining, now.bandwidth) {
        (0, _) => Some(Duration::ZERO),
        (_, 0) => None,
        (remaining, bandwidth) => {
            let nanos = u128::from(remaining).saturating_mul(1_000_000_000) / u128::from(bandwidth);
            Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
        }
    }
}

/// What of the allowed pause is for sending.
fn time_to_send(limits: &Limits, now: &Standing) -> Duration {
    limits.downtime.saturating_sub(now.overhead).max(limits.downtime / SENDING_SHARE)
}

/// Whether one more pass makes a pause shorter that would be allowed: after a long pass, that over
/// everything above all, most of what is left is gone by the next one. Each such pass leaves less
/// than half of what the one before had to send, so that there are few of them.
fn is_worth_a_pass(now: &Standing, sending: Duration) -> bool {
    now.stuck_passes == 0 && sending >= WORTH_A_PASS
}

/// Whether a pass that sent `sent` bytes, while the guest made `dirtied` dirty, brought the end
/// nearer.
pub fn makes_progress(sent: u64, dirtied: u64) -> bool {
    u128::from(dirtied) * 100 < u128::from(sent) * u128::from(PROGRESS_PERCENT)
}

/// What was measured of that which a handover takes besides sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Handover {
    /// An answer to something for which nothing is to be done.
    pub round_trip: Duration,
    /// An answer to a barrier behind a pass that has to be durable before.
    pub settling: Duration,
    /// An answer to PREPARE, in an earlier attempt that did not come further.
    pub prepare: Option<Duration>,
}

impl Handover {
    /// How long the guest waits besides for what is sent: for its answers, for PREPARE to make the
    /// final pass durable, and for COMMIT to do so with what is renamed.
    pub fn expected(&self) -> Duration {
        let durable = self.settling.saturating_sub(self.round_trip);
        let prepare = self.prepare.map(|took| took.saturating_sub(self.round_trip));
        let prepare = prepare.unwrap_or_default().max(durable);
        self.round_trip.saturating_mul(ANSWERS).saturating_add(prepare).saturating_add(durable)
    }
}

/// What passes taught of the bandwidth: a mean in which half a second of new measurements weighs as
/// much as all before.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Bandwidth {
    bytes_per_second: f64,
}

impl Bandwidth {
    /// Adds a measurement. Very short ones say nothing and are left out; so do those of little,
    /// unless there is nothing better.
    pub fn add(&mut self, bytes: u64, took: Duration) {
        const HALF: f64 = 0.5;
        let seconds = took.as_secs_f64();
        let is_known = self.bytes_per_second > 0.0;
        if bytes == 0 || seconds < 1e-4 || (is_known && bytes < TELLING_BYTES) {
            return;
        }
        // Exact up to 2^53 bytes: more than a pass sends.
        #[allow(clippy::cast_precision_loss)]
        let measured = bytes as f64 / seconds;
        let weight = if is_known { seconds / (seconds + HALF) } else { 1.0 };
        self.bytes_per_second += (measured - self.bytes_per_second) * weight;
    }

    /// Bytes per second; 0 while unknown.
    pub fn bytes_per_second(&self) -> u64 {
        // Saturates, and is not negative.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let rate = self.bytes_per_second as u64;
        rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    fn standing() -> Standing {
        Standing { remaining: 100 * MB, bandwidth: 100 * MB, passes: 1, ..Standing::default() }
    }

    /// A few thousand standings, corners first.
    fn standings() -> impl Iterator<Item = Standing> {
        let numbers = [0, 1, MB, 1000 * MB, u64::MAX];
        let times = [Duration::ZERO, Duration::from_millis(299), Duration::MAX];
        let mut all = Vec::new();
        for (remaining, bandwidth) in numbers.iter().flat_map(|r| numbers.map(|b| (*r, b))) {
            for (overhead, elapsed) in times.iter().flat_map(|o| times.map(|e| (*o, e))) {
                for bits in 0..32u32 {
                    all.push(Standing {
                        remaining,
                        bandwidth,
                        overhead,
                        elapsed,
                        has_bulk: bits & 1 != 0,
                        is_cancelled: bits & 2 != 0,
                        stuck_passes: if bits & 4 != 0 { 9 } else { 0 },
                        throttle: if bits & 8 != 0 { 99 } else { 0 },
                        passes: if bits & 16 != 0 { 1000 } else { 1 },
                        dirty_rate: bandwidth,
                    });
                }
            }
        }
        all.into_iter()
    }

    fn limits() -> impl Iterator<Item = Limits> {
        let downtimes = [Duration::ZERO, Duration::from_millis(300), Duration::MAX];
        downtimes.into_iter().flat_map(|downtime| {
            (0..8u32).map(move |bits| Limits {
                downtime,
                timeout: (bits & 1 != 0).then_some(Duration::from_secs(60)),
                max_passes: (bits & 2 != 0).then_some(10),
                may_throttle: bits & 4 != 0,
            })
        })
    }

    #[test]
    fn what_must_hold_always_holds() {
        for limits in limits() {
            for now in standings() {
                let decision = decide(&limits, &now);
                let case = format!("{limits:?} {now:?} {decision:?}");
                match decision {
                    Decision::SwitchOver(pause) => {
                        assert!(!now.has_bulk && !now.is_cancelled, "{case}");
                        assert!(pause <= limits.downtime.saturating_add(now.overhead), "{case}");
                        assert_eq!(Some(pause), expected_downtime(&now), "{case}");
                        assert!(now.bandwidth > 0 || now.remaining == 0, "{case}");
                    }
                    Decision::Throttle(level) => {
                        assert!(limits.may_throttle && !now.has_bulk, "{case}");
                        assert!(level > now.throttle && level <= THROTTLE_MAX, "{case}");
                    }
                    Decision::GiveUp(Reason::Cancelled) => assert!(now.is_cancelled, "{case}"),
                    Decision::GiveUp(Reason::Timeout) => assert!(limits.timeout.is_some()),
                    Decision::GiveUp(Reason::NoConvergence) => {
                        assert!(limits.max_passes.is_some() && !now.has_bulk, "{case}");
                    }
                    Decision::GoOn => assert!(!now.is_cancelled, "{case}"),
                }
            }
        }
    }

    #[test]
    fn bulk_work_is_never_little_enough() {
        let limits = Limits { downtime: Duration::from_secs(2000), ..Limits::default() };
        let bulk = Standing { has_bulk: true, bandwidth: u64::MAX, remaining: 1, ..standing() };
        assert_eq!(decide(&limits, &bulk), Decision::GoOn);
        assert_eq!(decide(&limits, &Standing { remaining: 0, ..bulk }), Decision::GoOn);
        let rest = Standing { has_bulk: false, ..bulk };
        assert!(matches!(decide(&limits, &rest), Decision::SwitchOver(_)));
    }

    #[test]
    fn a_guest_that_is_too_fast_is_slowed_down_and_then_let_go() {
        let limits = Limits { may_throttle: true, max_passes: Some(30), ..Limits::default() };
        let mut now = Standing { dirty_rate: 200 * MB, ..standing() };
        let mut levels = Vec::new();
        loop {
            match decide(&limits, &now) {
                Decision::Throttle(level) => {
                    levels.push(level);
                    now.throttle = level;
                }
                Decision::GoOn => {}
                end => break assert_eq!(end, Decision::GiveUp(Reason::NoConvergence)),
            }
            now.passes += 1;
            now.stuck_passes += u32::from(!makes_progress(100 * MB, 200 * MB));
        }
        assert_eq!(levels, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
        assert!(makes_progress(100, 49) && !makes_progress(100, 50) && !makes_progress(0, 0));
    }

    #[test]
    fn a_handover_waits_for_answers_and_for_storage() {
        let ms = Duration::from_millis;
        let measured = Handover { round_trip: ms(2), settling: ms(12), prepare: None };
        assert_eq!(measured.expected(), ms(2 * 2 + 10 + 10));
        // What an earlier attempt ran into counts, and is never less than what is known now.
        assert_eq!(Handover { prepare: Some(ms(52)), ..measured }.expected(), ms(4 + 50 + 10));
        assert_eq!(Handover { prepare: Some(ms(3)), ..measured }.expected(), ms(4 + 10 + 10));
        assert_eq!(Handover { settling: ms(1), ..measured }.expected(), ms(4));
        assert_eq!(Handover::default().expected(), Duration::ZERO);
        let worst = Handover { round_trip: ms(0), settling: Duration::MAX, prepare: None };
        assert_eq!(worst.expected(), Duration::MAX);
    }

    #[test]
    fn the_rest_of_the_handover_is_part_of_the_pause_as_far_as_that_can_be() {
        let ms = Duration::from_millis;
        let limits = Limits { downtime: ms(300), ..Limits::default() };
        let now = |sending: u64, overhead: u64| Standing {
            remaining: sending * MB / 10,
            overhead: ms(overhead),
            stuck_passes: 1,
            ..standing()
        };
        let decide = |sending, overhead| decide(&limits, &now(sending, overhead));
        assert_eq!(decide(200, 100), Decision::SwitchOver(ms(300)));
        assert_eq!(decide(201, 100), Decision::GoOn);
        // It leaves nothing, and no pass will change that.
        assert_eq!(decide(0, 5000), Decision::SwitchOver(ms(5000)));
        assert_eq!(decide(75, 5000), Decision::SwitchOver(ms(5075)));
        assert_eq!(decide(76, 5000), Decision::GoOn);
        // As with QEMU, a pause of nothing is for a guest that changes nothing.
        let limits = Limits { downtime: Duration::ZERO, ..limits };
        assert_eq!(super::decide(&limits, &now(0, 9)), Decision::SwitchOver(ms(9)));
        assert_eq!(super::decide(&limits, &now(1, 0)), Decision::GoOn);
    }

    #[test]
    fn a_pause_that_would_be_allowed_is_made_shorter_while_that_goes_fast() {
        let limits = Limits { max_passes: Some(9), ..Limits::default() };
        let now = Standing { remaining: 10 * MB, ..standing() };
        assert_eq!(decide(&limits, &now), Decision::GoOn);
        let short = Standing { remaining: MB / 11, ..now };
        assert!(matches!(decide(&limits, &short), Decision::SwitchOver(_)));
        for last in [Standing { stuck_passes: 1, ..now }, Standing { passes: 9, ..now }] {
            assert!(matches!(decide(&limits, &last), Decision::SwitchOver(_)), "{last:?}");
        }
        let limits = Limits { timeout: Some(Duration::from_secs(9)), ..limits };
        let late = Standing { elapsed: Duration::from_secs(9), ..now };
        assert!(matches!(decide(&limits, &late), Decision::SwitchOver(_)));
    }

    #[test]
    fn the_pause_is_sending_and_what_comes_besides() {
        let now = Standing { overhead: Duration::from_millis(50), ..standing() };
        assert_eq!(expected_downtime(&now), Some(Duration::from_millis(1050)));
        assert_eq!(expected_downtime(&Standing { bandwidth: 0, ..now }), None);
        let mut bandwidth = Bandwidth::default();
        bandwidth.add(0, Duration::from_secs(1));
        bandwidth.add(1, Duration::ZERO);
        assert_eq!(bandwidth.bytes_per_second(), 0);
        for _ in 0..20 {
            bandwidth.add(50 * MB, Duration::from_millis(500));
        }
        assert_eq!(bandwidth.bytes_per_second(), 100 * MB);
        // A few bytes and a sync behind them say nothing of the bandwidth.
        bandwidth.add(1000, Duration::from_secs(1));
        assert_eq!(bandwidth.bytes_per_second(), 100 * MB);
        (0..8).for_each(|_| bandwidth.add(10 * MB, Duration::from_secs(1)));
        assert!((10 * MB..11 * MB).contains(&bandwidth.bytes_per_second()));
    }
}
