//! Who watches a long operation for the user: the bar, the events, the warnings, Ctrl-C.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use bitferry::{Observer, Phase};
use mig_core::meter::Meter;

use super::outcome::{self, Asked};
use super::output::Output;
use super::progress::Bar;
use super::{failure, interrupt};

/// Time between two progress events: a program that draws its own bar needs no more.
const EVENT_INTERVAL: Duration = Duration::from_millis(250);

/// An [`Observer`] that tells the user.
#[derive(Debug)]
pub(crate) struct Watch<'a> {
    events: Option<&'a Output>,
    bar: Option<Bar>,
    is_quiet: bool,
    is_interrupted: Arc<AtomicBool>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// When progress was told last, and what.
    last_event: Option<(Instant, (u64, u64))>,
    /// When somebody came who was waited for.
    met: Option<Instant>,
}

/// One line of a long operation's JSON.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event<'a> {
    Phase { phase: &'static str },
    Progress { phase: &'static str, done: u64, total: u64 },
    Warning { message: &'a str },
}

/// The last event: the body is what CLI.md calls the summary.
#[derive(Debug, Serialize)]
pub(crate) struct Summary<'a, T> {
    event: &'static str,
    #[serde(flatten)]
    body: &'a T,
}

impl<'a, T: Serialize> Summary<'a, T> {
    pub(crate) fn new(event: &'static str, body: &'a T) -> Self {
        Self { event, body }
    }
}

impl<'a> Watch<'a> {
    /// For a verb whose JSON is a sequence of events, about these disks. `has_proof`: what is
    /// written is read again.
    pub(crate) fn with_events(
        output: &'a Output,
        has_proof: bool,
        asked: Vec<Asked>,
    ) -> bitferry::Result<Self> {
        let (twin, started) = (output.twin(), Instant::now());
        let last_word = move || {
            if twin.is_json {
                // Who does not hear it sees the exit status.
                let _ = twin.summary(&outcome::interrupted(started, &asked));
            }
            say_that_it_ended();
        };
        let is_interrupted = interrupt::watch(last_word)?;
        Ok(Self::new(output, output.is_json.then_some(output), has_proof, is_interrupted))
    }

    /// For a verb whose JSON is one document.
    pub(crate) fn quiet_unless_asked(output: &'a Output) -> bitferry::Result<Self> {
        Ok(Self::new(output, None, false, interrupt::watch(say_that_it_ended)?))
    }

    fn new(
        output: &'a Output,
        events: Option<&'a Output>,
        has_proof: bool,
        is_interrupted: Arc<AtomicBool>,
    ) -> Self {
        Self {
            events,
            bar: output.shows_progress.then(|| Bar::new(has_proof)),
            is_quiet: output.is_quiet,
            is_interrupted,
            state: Mutex::new(State { phase: Phase::Plan, last_event: None, met: None }),
        }
    }

    /// A transfer goes at the rate of `meter` at most, the proof does not.
    pub(crate) fn limited(mut self, meter: &Arc<Meter>) -> Self {
        self.bar = self.bar.take().map(|bar| bar.limited(meter));
        self
    }

    /// Clears the bar, so that results stand where it stood.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }

    /// When somebody came who was waited for; nothing where nobody did.
    pub(crate) fn met(&self) -> Option<Instant> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).met
    }

    fn emit(&self, event: &Event<'_>) {
        if let Some(output) = self.events {
            // A full disk under our stdout must not stop a copy; the summary will fail to be
            // written and that is an error.
            let _ = output.event(event);
        }
    }
}

/// What is said of the second signal, whose sender did not want to wait.
fn say_that_it_ended() {
    let hint = "what was kept so far is gone on with by the same command";
    failure::print_lines("interrupted again: ended at once", hint);
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Observer for Watch<'_> {
    fn phase(&self, phase: Phase) {
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let has_come = state.phase == Phase::Wait && phase != Phase::Wait;
            let met = state.met.or_else(|| has_come.then(Instant::now));
            *state = State { phase, last_event: None, met };
        }
        self.emit(&Event::Phase { phase: phase.name() });
        if let Some(bar) = &self.bar {
            bar.phase(phase);
        }
    }

    fn progress(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.progress(done, total);
        }
        if self.events.is_none() {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_early = |(at, _): (Instant, _)| done < total && at.elapsed() < EVENT_INTERVAL;
        let is_old = |(_, last)| last == (done, total);
        if state.last_event.is_some_and(|last| is_early(last) || is_old(last)) {
            return;
        }
        state.last_event = Some((Instant::now(), (done, total)));
        // Written under the lock, so that events stand in the order they happened.
        self.emit(&Event::Progress { phase: state.phase.name(), done, total });
    }

    fn warning(&self, message: &str) {
        self.emit(&Event::Warning { message });
        if self.is_quiet || self.events.is_some() {
            return;
        }
        let line = format!("warning: {}", failure::one_line(message));
        match &self.bar {
            Some(bar) => bar.line(&line),
            // Not `eprintln`, which panics where nobody reads.
            None => _ = writeln!(std::io::stderr(), "{line}"),
        }
    }

    fn is_cancelled(&self) -> bool {
        self.is_interrupted.load(Ordering::Relaxed)
    }
}
