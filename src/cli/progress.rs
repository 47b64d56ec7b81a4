//! The bar: what is done, how fast, how much longer.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use bitferry::Phase;

/// Redraws per second: enough to look alive, few enough not to be seen in a profile.
const DRAWS_PER_SECOND: u8 = 8;

/// A bar on stderr. Work is bytes of stored data: runs of zeroes take no time and count for
/// nothing, so that the remaining time is right on a sparse disk too.
#[derive(Debug)]
pub(crate) struct Bar(ProgressBar);

impl Bar {
    /// A bar without work yet.
    pub(crate) fn new() -> Self {
        let target = ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND);
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_style(spinner());
        Self(bar)
    }

    /// A new phase: with totals a bar, without a word.
    pub(crate) fn phase(&self, phase: Phase) {
        self.0.set_message(words(phase));
        let has_totals = matches!(phase, Phase::Transfer | Phase::Prove | Phase::Read);
        self.0.set_style(if has_totals { bar() } else { spinner() });
        self.0.reset();
        self.0.tick();
    }

    /// Progress of the phase.
    pub(crate) fn progress(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    /// A line above the bar.
    pub(crate) fn line(&self, text: &str) {
        self.0.suspend(|| eprintln!("{text}"));
    }

    /// Takes the bar off the terminal.
    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

fn words(phase: Phase) -> &'static str {
    match phase {
        Phase::Plan => "looking",
        Phase::Transfer => "copying",
        Phase::Bitmaps => "storing bitmaps",
        Phase::Seal => "making it durable",
        Phase::Prove => "proving",
        Phase::Publish => "publishing",
        Phase::Read => "reading",
        _ => "working",
    }
}

fn bar() -> ProgressStyle {
    style("{msg:>10} {percent:>3}% [{bar:30}] {binary_bytes}/{binary_total_bytes} {rate} {left}")
}

fn spinner() -> ProgressStyle {
    style("{msg:>10} …")
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
        .with_key("rate", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate")]
            let rate = state.per_sec() as u64;
            let _ = write!(out, "{}/s", super::size::human(rate));
        })
        .with_key("left", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            if state.pos() > 0 && state.elapsed() > Duration::from_millis(500) {
                let _ = write!(out, "{} left", super::size::human_time(state.eta()));
            }
        })
}
