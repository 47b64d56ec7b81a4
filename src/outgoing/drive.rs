//! The phases of the source, one after another.

use std::time::{Duration, Instant};

use format_spec::Blame;
use format_spec::native::answer::Ready;
use format_spec::native::block::DiskId;
use format_spec::native::control::Control;
use format_spec::native::hello::{RESUME, SessionState};
use mig_core::channels::{CONTROL, CONTROL_ID, Channels, Main, Outlet};
use mig_core::heart::Heart;
use mig_core::section::{Pass, Pending, SaveHandler, SectionKey, Stage, Start};
use mig_core::stream::{Breaker, Error, Result, StreamReader};

use super::answers::{Answers, Told, Waiting};
use super::connect::Connected;
use super::policy::{Next, Policy, Round};
use super::receipt;
use super::{Outcome, OutgoingOptions, RollBack, Sent};

/// Bytes that a handler sends before the others have their turn, and before a barrier makes durable
/// what arrived: about what is sent again after a cut.
const TURN_BYTES: u64 = 256 << 20;
/// What is waited for one after another when a migration is called off: COMMITTED, where it was
/// asked for, its reason, the end.
const FAREWELLS: u32 = 3;
/// How often it is looked whether all is to stop.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Drives one migration over connections that are made.
pub(super) fn drive(
    connected: Connected,
    rollback: &mut RollBack<'_, '_>,
    policy: &mut dyn Policy,
    options: &OutgoingOptions<'_>,
) -> Result<Sent> {
    let Connected { channels, breaker, answers: reader, choice, silent: _silent } = connected;
    let mut sent = Sent {
        outcome: Outcome::AlreadyComplete(Vec::new()),
        peer: choice.program,
        wire_bytes: channels.written(),
        resumed: choice.state != SessionState::Fresh,
        confirmed: None,
    };
    if choice.state == SessionState::Committed {
        sent.outcome = finished(reader, &breaker, options)?;
        return Ok(sent);
    }
    let answers = Answers::new(choice.state == SessionState::Resumable);
    let heart = Heart::new();
    let is_one_way = reader.is_none();
    let result = std::thread::scope(|scope| {
        let _ending = Ending { heart: &heart, answers: &answers, breaker: &breaker };
        scope.spawn(|| tend(&heart, &channels, (&breaker, &answers), options));
        if let Some(reader) = reader {
            scope.spawn(|| answers.read(reader, &breaker));
        }
        let mut driver = Driver {
            channels: &channels,
            answers: (!is_one_way).then_some(&answers),
            breaker: &breaker,
            state: choice.state,
            keeps: choice.features & RESUME != 0,
            sections: Vec::new(),
            barriers: 0,
            until: None,
            options,
        };
        driver.run(rollback, policy).map_err(|error| {
            // Nobody was told to take over: the guest need not wait until the farewells are said.
            rollback.roll_back();
            driver.give_up(error)
        })
    });
    let (outcome, confirmed) = result?;
    sent.wire_bytes = channels.written();
    (sent.outcome, sent.confirmed) = (outcome, confirmed);
    Ok(sent)
}

/// The destination had finished this session: hears what it has published. Where that is not heard
/// to its end it is not known what became of it; that it is not what this side has is an error.
fn finished(
    reader: Option<StreamReader>,
    breaker: &Breaker,
    options: &OutgoingOptions<'_>,
) -> Result<Outcome> {
    let Some(reader) = reader else { return Ok(Outcome::AlreadyComplete(Vec::new())) };
    match receipt::hear(reader, breaker, options) {
        Ok(published) => {
            receipt::hold(&options.expected, &published)?;
            Ok(Outcome::AlreadyComplete(published))
        }
        Err(error) => Ok(Outcome::Unknown(error)),
    }
}

/// However driving ends, a panic included, the threads beside it end too.
struct Ending<'a> {
    heart: &'a Heart,
    answers: &'a Answers,
    breaker: &'a Breaker,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.heart.stop();
        self.answers.stop_listening();
        self.breaker.hang_up();
    }
}

/// Says now and then that this side lives, and lets go of those who wait for bandwidth when all is
/// to stop.
fn tend(
    heart: &Heart,
    channels: &Channels,
    (breaker, answers): (&Breaker, &Answers),
    options: &OutgoingOptions<'_>,
) {
    let mut silence = Duration::ZERO;
    let mut called_off: Option<Instant> = None;
    let step = LOOK_INTERVAL.min(options.timing.keepalive);
    heart.run(step, || {
        if options.monitor.is_cancelled() {
            channels.unmeter();
            // Who is stuck in a write to a peer that does not read cannot look by itself.
            let since = called_off.get_or_insert_with(Instant::now);
            if since.elapsed() >= options.timing.linger.saturating_mul(FAREWELLS) {
                breaker.note(Error::Interrupted);
                breaker.hang_up();
            }
        }
        silence = silence.saturating_add(step);
        if silence >= options.timing.keepalive {
            silence = Duration::ZERO;
            // A lane that fails is seen by whoever writes to it next, or waits.
            if let Err(error) = channels.keepalive() {
                tracing::debug!(%error, "cannot say that this side is alive");
                answers.lose(error);
            }
        }
    });
}

/// The token of the handover, with which COMMIT is written: whoever holds it has let go of the
/// guest. What fails from here on is no reason to resume it at the source, since the destination
/// may have taken over.
struct Token<'d>(Main<'d>);

struct Driver<'d> {
    channels: &'d Channels,
    /// `None` on a one-way stream.
    answers: Option<&'d Answers>,
    breaker: &'d Breaker,
    state: SessionState,
    /// Whether what arrived is kept over a cut, so that it is worth making it durable on the way.
    keeps: bool,
    /// Sections by number, from 1.
    sections: Vec<SectionKey>,
    barriers: u64,
    /// When the guest has been paused for as long as it may.
    until: Option<Instant>,
    options: &'d OutgoingOptions<'d>,
}

impl Driver<'_> {
    fn run(
        &mut self,
        rollback: &mut RollBack<'_, '_>,
        policy: &mut dyn Policy,
    ) -> Result<(Outcome, Option<Ready>)> {
        self.setup(&mut rollback.handlers)?;
        if self.state == SessionState::Ready && self.options.has_moved_on {
            return Err(Error::Stale);
        }
        self.begin(&mut rollback.handlers)?;
        self.rounds(rollback, policy)?;
        self.until = self.options.max_pause.and_then(|max| Instant::now().checked_add(max));
        rollback.pause()?;
        self.complete(&mut rollback.handlers)?;
        let ready = self.prepare(&mut rollback.handlers, policy)?;
        let token = Token(self.channels.hold_main()?);
        rollback.is_done = true;
        Ok((self.commit(token), ready))
    }

    /// Starts the sections; handlers introduce what they will send.
    fn setup(&mut self, handlers: &mut [Box<dyn SaveHandler + '_>]) -> Result<()> {
        self.channels.start()?;
        self.sections = vec![CONTROL];
        self.channels.start_section(CONTROL_ID, CONTROL)?;
        for handler in &mut *handlers {
            let key = handler.section();
            if self.section_id(key).is_none() {
                self.sections.push(key);
                let id = self.section_id(key).unwrap_or_default();
                self.channels.start_section(id, key)?;
            }
            handler.setup(&self.outlet(&**handler))?;
        }
        self.barrier(handlers, false)?;
        Ok(())
    }

    /// Handlers learn what the destination has from an earlier attempt.
    fn begin(&mut self, handlers: &mut [Box<dyn SaveHandler + '_>]) -> Result<()> {
        let monitor = self.options.monitor;
        for handler in handlers {
            let outlet = self.outlet(&**handler);
            let mut told = self.answers.map(|answers| Told { answers, monitor });
            let mut start = match (self.state, &mut told) {
                (SessionState::Resumable, Some(told)) => Start::Resumable(told),
                (SessionState::Ready, _) => Start::Ready,
                _ => Start::Fresh,
            };
            handler.begin(&mut start, &outlet)?;
        }
        self.answers.map_or(Ok(()), Answers::told_all)
    }

    /// Rounds while the guest runs, until all was sent once and the policy is content.
    fn rounds(&mut self, rollback: &mut RollBack<'_, '_>, policy: &mut dyn Policy) -> Result<()> {
        let handlers = &mut rollback.handlers;
        for number in 1.. {
            let (begun, written) = (Instant::now(), self.channels.written());
            let mut passes: Vec<_> = handlers.iter().map(|_| Pass::Open).collect();
            while self.turn(handlers, &mut passes)? == Pass::Open {
                if self.keeps {
                    self.barrier(handlers, true)?;
                }
            }
            let measures = policy.measures();
            // What storage takes is not told apart unless all has arrived before.
            if measures {
                self.pass_barrier(handlers, false)?;
            }
            let sending = begun.elapsed();
            // Durable, so that the pause that may follow covers the final pass alone.
            let settling = self.pass_barrier(handlers, true)?;
            let took = begun.elapsed();
            let wire_bytes = self.channels.written().saturating_sub(written);
            let round_trip = match measures {
                true => self.pass_barrier(handlers, false)?,
                false => Duration::ZERO,
            };
            let pending =
                handlers.iter().map(|h| h.pending()).fold(Pending::default(), |a, b| a + b);
            let sending = if measures { sending } else { took };
            let round = Round { number, took, sending, wire_bytes, settling, round_trip, pending };
            tracing::debug!(?round, "round done");
            if pending.has_bulk {
                continue;
            }
            match policy.next(&round) {
                Next::Round => {}
                Next::Throttle(percent) => rollback.guest.throttle(percent),
                Next::Complete => break,
                Next::GiveUp => return Err(Error::Interrupted),
            }
        }
        Ok(())
    }

    /// Every handler whose pass is open sends its share. One that is done waits for the others:
    /// what gets dirty meanwhile belongs to the next round.
    fn turn(
        &mut self,
        handlers: &mut [Box<dyn SaveHandler + '_>],
        passes: &mut [Pass],
    ) -> Result<Pass> {
        for (handler, pass) in handlers.iter_mut().zip(&mut *passes) {
            if *pass == Pass::Open {
                self.go_on()?;
                *pass = handler.iterate(&self.outlet(&**handler), TURN_BYTES)?;
            }
        }
        Ok(if passes.contains(&Pass::Open) { Pass::Open } else { Pass::Done })
    }

    /// The final pass, and what it all hashes to. Seals rely on what other connections carried, so
    /// there is a barrier before them. Nothing that is written next depends on its answer: only
    /// READY is waited for, so that a guest is paused for one answer and not for three.
    fn complete(&mut self, handlers: &mut [Box<dyn SaveHandler + '_>]) -> Result<()> {
        for stage in [Stage::Content, Stage::Seal] {
            let begun = Instant::now();
            for handler in &mut *handlers {
                self.go_on()?;
                handler.complete(stage, &self.outlet(&**handler))?;
            }
            let sent = begun.elapsed();
            self.barrier(handlers, false)?;
            tracing::debug!(?stage, ?sent, took = ?begun.elapsed(), "guest paused");
        }
        Ok(())
    }

    /// Asks the destination to make everything durable and to read it back, and holds what it says
    /// against what was sent. Nobody answers on a one-way stream.
    fn prepare(
        &mut self,
        handlers: &mut [Box<dyn SaveHandler + '_>],
        policy: &mut dyn Policy,
    ) -> Result<Option<Ready>> {
        let session = self.options.session;
        let Some(answers) = self.answers else {
            self.channels.control(&Control::Prepare(session))?;
            return Ok(None);
        };
        answers.expect_ready();
        policy.preparing();
        let begun = Instant::now();
        self.channels.control(&Control::Prepare(session))?;
        let ready = answers.wait_ready(self.waiting())?;
        let took = begun.elapsed();
        tracing::debug!(?took, "the destination is ready");
        policy.prepared(took);
        handlers.iter_mut().for_each(|handler| handler.acknowledged());
        let mut expected = Ready { session, disks: Vec::new(), bitmaps: Vec::new() };
        handlers.iter().for_each(|handler| handler.expect(&mut expected));
        if ready != expected {
            return Err(Error::Mismatch { reason: difference(&expected, &ready, handlers) });
        }
        self.go_on()?;
        Ok(Some(ready))
    }

    /// Lets the destination publish. From here on nothing is rolled back.
    fn commit(&self, Token(main): Token<'_>) -> Outcome {
        let commit = Control::Commit(self.options.session);
        let Some(answers) = self.answers else {
            let written = main.control(&commit).and_then(|()| self.end());
            return written.map_or_else(Outcome::Unknown, |()| Outcome::Unconfirmed);
        };
        answers.expect_committed(self.options.session);
        let waiting = Waiting { linger: self.options.timing.linger, ..self.waiting() };
        let begun = Instant::now();
        let committed = main.control(&commit).and_then(|()| answers.wait_committed(waiting));
        tracing::debug!(took = ?begun.elapsed(), "COMMIT was answered");
        if let Err(error) = committed {
            return Outcome::Unknown(self.last_word(error));
        }
        // The destination has published and may have closed: whether this arrives changes nothing.
        let _ = self.end();
        Outcome::Completed
    }

    /// Ends the sections and all connections.
    fn end(&self) -> Result<()> {
        let count = u32::try_from(self.sections.len()).unwrap_or(u32::MAX);
        let ids: Vec<u32> = (CONTROL_ID..=count).collect();
        self.channels.finish(&ids)
    }

    /// Tells the destination why this side gives up, if it is there to hear it.
    fn give_up(&self, error: Error) -> Error {
        self.answers.inspect(|answers| answers.stop_listening());
        let error = self.last_word(error);
        if !matches!(error, Error::Peer { .. } | Error::Connection { .. } | Error::Ended) {
            let text = crate::report::error_chain(&error);
            let blame = match error {
                Error::Interrupted => Blame::Caller,
                ref error => error.blame(),
            };
            // The first error is the one to report.
            if self.channels.control(&Control::Abort { blame, text }).is_ok()
                && self.answers.is_some()
            {
                self.answers.inspect(|answers| answers.wait_over(self.options.timing.linger));
            }
        }
        error
    }

    /// The reason for an error of a connection may still be on its way in the other direction.
    fn last_word(&self, error: Error) -> Error {
        if error.is_secondary() {
            self.answers.inspect(|answers| answers.wait_over(self.options.timing.linger));
        }
        self.breaker.explain(error)
    }

    /// Places a barrier on all connections. Only here.
    fn barrier(
        &mut self,
        handlers: &mut [Box<dyn SaveHandler + '_>],
        is_durable: bool,
    ) -> Result<u64> {
        self.barriers = match self.answers {
            Some(answers) => answers.expect_ack(),
            None => self.barriers.saturating_add(1),
        };
        self.channels.barrier(self.barriers, is_durable)?;
        handlers.iter_mut().for_each(|handler| handler.barrier());
        Ok(self.barriers)
    }

    /// Places a barrier and waits until everything before it has been applied: only then does it
    /// count as sent. Answers how long that took.
    fn pass_barrier(
        &mut self,
        handlers: &mut [Box<dyn SaveHandler + '_>],
        is_durable: bool,
    ) -> Result<Duration> {
        let begun = Instant::now();
        let barrier = self.barrier(handlers, is_durable)?;
        if let Some(answers) = self.answers {
            answers.wait_ack(barrier, self.waiting())?;
            handlers.iter_mut().for_each(|handler| handler.acknowledged());
        }
        Ok(begun.elapsed())
    }

    fn waiting(&self) -> Waiting<'_> {
        Waiting { until: self.until, ..Waiting::patient(self.options.monitor) }
    }

    fn go_on(&self) -> Result<()> {
        if self.options.monitor.is_cancelled() { Err(Error::Interrupted) } else { Ok(()) }
    }

    fn section_id(&self, key: SectionKey) -> Option<u32> {
        let at = self.sections.iter().position(|known| *known == key)?;
        u32::try_from(at).ok()?.checked_add(CONTROL_ID)
    }

    fn outlet(&self, handler: &dyn SaveHandler) -> Outlet<'_> {
        Outlet::new(self.channels, self.section_id(handler.section()).unwrap_or_default())
    }
}

/// Where two proofs differ, in words.
fn difference(sent: &Ready, read: &Ready, names: &[Box<dyn SaveHandler + '_>]) -> String {
    let called = |disk: DiskId| {
        let name = names.iter().find_map(|handler| handler.disk_name(disk));
        name.map_or_else(|| format!("disk {}", disk.0), |name| format!("disk {name:?}"))
    };
    let disks = sent.disks.iter().zip(&read.disks).find(|(sent, read)| sent != read);
    if let Some(((disk, sent), (_, read))) = disks {
        return format!("{} was sent as {sent} and reads as {read}", called(*disk));
    }
    let bitmaps = sent.bitmaps.iter().zip(&read.bitmaps).find(|(sent, read)| sent != read);
    if let Some(((version, sent), (_, read))) = bitmaps {
        let number = version.bitmap;
        let name = names.iter().find_map(|handler| handler.bitmap_name(number));
        let bitmap = name.map_or_else(
            || format!("bitmap {number}"),
            |(disk, name)| format!("bitmap {name:?} of {}", called(disk)),
        );
        return format!("{bitmap} was sent as {sent} and reads as {read}");
    }
    "READY does not name the disks and bitmaps that were sent".to_owned()
}
