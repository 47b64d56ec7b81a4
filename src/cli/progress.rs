//! The bar: what is done, how fast, how much longer.

use std::io::{IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use bitferry::Phase;
use mig_core::meter::Meter;

use super::size::{human, human_time};

/// Redraws per second: enough to look alive, few enough not to be seen in a profile.
const DRAWS_PER_SECOND: u8 = 8;
/// Time between two lines where stderr is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(1);
/// How long a rate is measured before it is believed.
const TRIAL: Duration = Duration::from_millis(500);
/// The part of a limit that is reached where the limit is what counts.
const HELD_BACK: f64 = 0.8;

/// A bar on stderr, or lines where that is no terminal. Work is bytes of stored data: runs of
/// zeroes take no time and count for nothing, so that the remaining time is right on a sparse disk
/// too.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: ProgressBar,
    /// Whether the remaining time of a transfer counts the proof that follows it.
    counts_proof: Arc<AtomicBool>,
    has_proof: bool,
    /// What limits a transfer.
    meter: Arc<Meter>,
    /// When a line was last written, and of which phase, where there is no terminal.
    lines: Option<Mutex<(Instant, &'static str)>>,
}

impl Bar {
    /// A bar without work yet. `has_proof`: what is written will be read again.
    pub(crate) fn new(has_proof: bool) -> Self {
        let target = ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND);
        let bar = ProgressBar::with_draw_target(None, target);
        let lines = (!std::io::stderr().is_terminal()).then(|| Mutex::new((Instant::now(), "")));
        Self { bar, counts_proof: Arc::default(), has_proof, meter: Arc::default(), lines }
    }

    /// What limits a transfer.
    pub(crate) fn limited(self, meter: &Arc<Meter>) -> Self {
        Self { meter: Arc::clone(meter), ..self }
    }

    /// A new phase: with totals a bar, without a word.
    pub(crate) fn phase(&self, phase: Phase) {
        self.counts_proof.store(self.has_proof && phase == Phase::Transfer, Ordering::Relaxed);
        self.bar.set_message(words(phase));
        let has_totals = matches!(phase, Phase::Transfer | Phase::Prove | Phase::Read);
        self.bar.set_style(if has_totals { self.style() } else { template("{msg:>10} …") });
        self.bar.reset();
        self.bar.tick();
        if let Some(lines) = &self.lines {
            *lines.lock().unwrap_or_else(PoisonError::into_inner) = (Instant::now(), words(phase));
        }
    }

    /// Progress of the phase.
    pub(crate) fn progress(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        let Some(lines) = &self.lines else { return };
        let mut last = lines.lock().unwrap_or_else(PoisonError::into_inner);
        if last.0.elapsed() >= LINE_INTERVAL {
            last.0 = Instant::now();
            let percent = done.saturating_mul(100) / total.max(1);
            let (done, total) = (human(done), human(total));
            let _ = writeln!(std::io::stderr(), "{} {percent}%, {done} of {total}", last.1);
        }
    }

    /// A line above the bar.
    pub(crate) fn line(&self, text: &str) {
        self.bar.suspend(|| _ = writeln!(std::io::stderr(), "{text}"));
    }

    /// Takes the bar off the terminal.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn style(&self) -> ProgressStyle {
        let (counts_proof, meter) = (Arc::clone(&self.counts_proof), Arc::clone(&self.meter));
        template("{msg:>10} {percent:>3}% [{bar:30}] {done} of {total}  {rate}{left}")
            .with_key("done", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                let _ = out.write_str(&human(state.pos()));
            })
            .with_key("total", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                let _ = out.write_str(&human(state.len().unwrap_or(0)));
            })
            .with_key("rate", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a rate"
                )]
                let _ = write!(out, "{}/s", human(state.per_sec() as u64));
            })
            .with_key("left", move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                if state.pos() > 0 && state.elapsed() > TRIAL {
                    let (done, total) = (state.pos(), state.len().unwrap_or(0));
                    let pace = Pace { rate: state.per_sec(), limit: meter.bandwidth() };
                    let left = pace.left(done, total, counts_proof.load(Ordering::Relaxed));
                    let _ = write!(out, "  {left}");
                }
            })
    }
}

/// How fast a phase goes on.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// Bytes per second, measured.
    rate: f64,
    /// Bytes per second at most.
    limit: Option<u64>,
}

impl Pace {
    /// The time that is left. A proof reads the same bytes again, and reading and hashing is what a
    /// transfer does beside writing: its rate serves for both, unless the limit, which no proof
    /// keeps to, is what it measures. How fast a proof will be is not known then.
    fn left(self, done: u64, total: u64, counts_proof: bool) -> String {
        let is_known = counts_proof && !self.is_held_back();
        let work = total.saturating_sub(done) + if is_known { total } else { 0 };
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let left = Duration::try_from_secs_f64(work as f64 / self.rate).unwrap_or(Duration::MAX);
        let proof = if counts_proof && !is_known { ", then the proof" } else { "" };
        format!("{} left{proof}", human_time(left))
    }

    /// Whether the limit is what keeps it from being faster.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    fn is_held_back(self) -> bool {
        self.limit.is_some_and(|limit| self.rate >= limit as f64 * HELD_BACK)
    }
}

fn words(phase: Phase) -> &'static str {
    match phase {
        Phase::Plan => "looking",
        Phase::Wait => "waiting",
        Phase::Recheck => "rechecking",
        Phase::Transfer => "copying",
        Phase::Bitmaps => "storing bitmaps",
        Phase::Seal => "making it durable",
        Phase::Prove => "proving",
        Phase::Publish => "publishing",
        Phase::Read => "reading",
        _ => "working",
    }
}

fn template(text: &str) -> ProgressStyle {
    ProgressStyle::with_template(text)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_the_transfer_says_nothing_of_the_proof() {
        let left = |limit, done, counts_proof| {
            Pace { rate: 1000.0, limit }.left(done, 10_000, counts_proof)
        };
        assert_eq!(left(None, 4000, true), "16.0 s left");
        assert_eq!(left(None, 4000, false), "6.0 s left");
        // What is read is always a little behind or before what is allowed.
        assert_eq!(left(Some(1100), 4000, true), "6.0 s left, then the proof");
        assert_eq!(left(Some(950), 10_000, true), "0 ms left, then the proof");
        assert_eq!(left(Some(950), 4000, false), "6.0 s left");
        // A limit that is not reached limits nothing.
        assert_eq!(left(Some(1 << 40), 4000, true), "16.0 s left");
    }

    #[test]
    fn without_a_rate_there_is_no_end() {
        let pace = Pace { rate: 0.0, limit: None };
        assert!(pace.left(0, 10, true).contains(" h "));
    }
}
