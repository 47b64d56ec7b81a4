//! A session at the destination: what its connections share, and how each is read.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::Ordering::AcqRel;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use format_spec::native::answer::{Answer, Ready};
use format_spec::native::control::Control;
use format_spec::native::hello::{Choice, Offer};
use mig_core::channels::{CONTROL, CONTROL_ID};
use mig_core::gate::{Barrier, Gate};
use mig_core::heart::Heart;
use mig_core::jobs::Jobs;
use mig_core::limits::{BODIES_PER_CONNECTION, BODIES_PER_WORKER, MAX_SECTIONS};
use mig_core::section::{AnswerWriter as _, Fate, LoadContext, LoadHandler, Registry};
use mig_core::stream::{Arrival, Breaker, Buffers, Element, Error, Method, Result, StreamReader};
use mig_core::transport::HangUp;

use super::IncomingOptions;
use super::back::Back;

/// How often it is looked whether the user wants to stop.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Longest silence of this side while connections are awaited.
const JOINING_INTERVAL: Duration = Duration::from_secs(1);

/// How far the handover is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    Receiving,
    Prepared,
    /// COMMIT was read: nothing is undone from here on.
    Committing,
    Committed,
}

/// What the connections of a session share.
pub(super) struct Session {
    pub(super) read_bytes: AtomicU64,
    session: [u8; 16],
    back: Back,
    breaker: Breaker,
    gate: Gate,
    jobs: Jobs,
    buffers: Buffers,
    sections: Registry,
    /// Handlers of started sections by number; the first one, `bitferry`, has none.
    started: RwLock<BTreeMap<u32, Option<Arc<dyn LoadHandler>>>>,
    /// Which connections are there. Main always is.
    joined: Mutex<Vec<bool>>,
    /// Reverse directions that stay silent. Dropping one may end its connection.
    silent: Mutex<Vec<Box<dyn Write + Send>>>,
    method: Option<Method>,
    progress: Mutex<Progress>,
    is_over: AtomicBool,
    /// Whether somebody has said why the session fails.
    has_reason: AtomicBool,
    linger: Duration,
}

impl Session {
    pub(super) fn new(
        back: Back,
        offer: &Offer,
        choice: &Choice,
        sections: Registry,
        options: &IncomingOptions<'_>,
    ) -> Self {
        let channels = usize::from(choice.channels);
        let bodies = channels * BODIES_PER_CONNECTION + options.workers * BODIES_PER_WORKER;
        let mut joined = vec![false; channels];
        joined.iter_mut().take(1).for_each(|main| *main = true);
        Self {
            read_bytes: AtomicU64::new(0),
            session: offer.session,
            back,
            breaker: Breaker::new(),
            gate: Gate::new(choice.channels),
            jobs: Jobs::new(),
            buffers: Buffers::new(bodies),
            sections,
            started: RwLock::default(),
            joined: Mutex::new(joined),
            silent: Mutex::default(),
            method: Method::chosen(choice.features),
            progress: Mutex::new(Progress::Receiving),
            is_over: AtomicBool::new(false),
            has_reason: AtomicBool::new(false),
            linger: options.timing.linger,
        }
    }

    /// Reads main to its end.
    pub(super) fn read_main(&self, reader: &mut StreamReader) -> Result<()> {
        let result = reader.start().and_then(|()| self.read(reader));
        self.read_bytes.fetch_add(reader.offset(), Ordering::Relaxed);
        match (result, self.progress()) {
            // It has published, and the source knows or will ask: how it ends does not matter.
            (_, Progress::Committed) => Ok(()),
            (Ok(()), _) => {
                let reason = "the stream ends before COMMIT";
                Err(Error::protocol(0, reader.offset(), reason))
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Reads a data channel to its end.
    pub(super) fn read_data(&self, reader: &mut StreamReader) {
        if let Some(method) = self.method {
            reader.decompress(method);
        }
        let result = self.read(reader);
        self.read_bytes.fetch_add(reader.offset(), Ordering::Relaxed);
        if self.is_over() {
            return;
        }
        let error = result.err().unwrap_or_else(|| {
            let reason = "a data channel ends before COMMIT";
            Error::protocol(reader.channel(), reader.offset(), reason)
        });
        self.fail_before_commit(error);
    }

    fn read(&self, reader: &mut StreamReader) -> Result<()> {
        loop {
            let (at, channel) = (reader.offset(), reader.channel());
            let id = match reader.element()? {
                Element::Eof => return Ok(()),
                Element::Part(id) => id,
                Element::Start { .. } | Element::End(_) if channel != 0 => {
                    let reason = "a section starts or ends on a data channel";
                    return Err(Error::protocol(channel, at, reason));
                }
                Element::End(id) => id,
                Element::Start { id, name, instance, version } => {
                    self.start(id, (&name, instance, version), at)?;
                    id
                }
            };
            self.body(reader, id, at)?;
            reader.footer(id)?;
        }
    }

    fn start(&self, id: u32, (name, instance, version): (&str, u32, u32), at: u64) -> Result<()> {
        let mut started = self.started.write().unwrap_or_else(PoisonError::into_inner);
        let wrong = |reason: String| Err(Error::protocol(0, at, reason));
        let is_control = (name, instance, version) == (CONTROL.name, 0, CONTROL.version);
        if (id == CONTROL_ID) != is_control || (started.is_empty() && !is_control) {
            return wrong(format!("section {name:?} has number {id}: bitferry is first, and 1"));
        }
        let handler = match self.sections.find(name, instance, version) {
            _ if is_control => None,
            Ok(handler) => Some(handler),
            Err(reason) => return wrong(reason),
        };
        if started.len() >= MAX_SECTIONS || started.insert(id, handler).is_some() {
            return wrong(format!("section {id} is started twice, or too many are"));
        }
        Ok(())
    }

    /// Reads the records of one part of a section.
    fn body(&self, reader: &mut StreamReader, id: u32, at: u64) -> Result<()> {
        let channel = reader.channel();
        let handler = match self.started.read().unwrap_or_else(PoisonError::into_inner).get(&id) {
            Some(handler) => handler.clone(),
            // What data channels begin with may come before main has started it.
            None if id == CONTROL_ID && channel != 0 => None,
            None => {
                let reason = format!("section {id} was not started");
                return Err(Error::protocol(channel, at, reason));
            }
        };
        let context = LoadContext { jobs: &self.jobs, answers: &self.back };
        loop {
            let arrival = reader.record(&self.buffers)?;
            match &handler {
                _ if arrival.header.is_end() => return Ok(()),
                Some(handler) => handler.load(arrival, context)?,
                None => self.control(arrival)?,
            }
        }
    }

    fn control(&self, arrival: Arrival) -> Result<()> {
        let decoded = Control::decode(&arrival.record()).map_err(|e| arrival.malformed(e))?;
        let (channel, offset) = (arrival.channel, arrival.offset);
        let wrong = |reason: &str| Err(Error::protocol(channel, offset, reason));
        // Others may need the buffer while this one waits.
        drop(arrival);
        match decoded {
            None | Some(Control::End | Control::Keepalive) => Ok(()),
            Some(Control::Barrier { number, is_durable }) => {
                let barrier = Barrier { number, is_durable, channel, offset };
                self.gate.arrive(barrier, || self.apply(barrier))
            }
            Some(_) if channel != 0 => wrong("the handover has its place on main"),
            Some(Control::Abort { blame, text }) => Err(Error::Peer { blame, text }),
            Some(Control::Prepare(session) | Control::Commit(session))
                if session != self.session =>
            {
                wrong("a step of the handover of another session")
            }
            Some(Control::Prepare(_)) if self.progress() != Progress::Receiving => {
                wrong("PREPARE comes twice")
            }
            Some(Control::Prepare(_)) if self.gate.passed() == 0 => {
                wrong("PREPARE comes before the first barrier")
            }
            Some(Control::Prepare(_)) => self.prepare(),
            Some(Control::Commit(_)) if self.progress() != Progress::Prepared => {
                wrong("COMMIT comes without READY before it")
            }
            Some(Control::Commit(_)) => self.commit(),
        }
    }

    /// Everything before a barrier was read: applies it, and says so.
    fn apply(&self, barrier: Barrier) -> Result<()> {
        let begun = Instant::now();
        self.jobs.wait_idle()?;
        let stored = begun.elapsed();
        self.sections.handlers().try_for_each(|handler| handler.barrier(barrier.is_durable))?;
        let Barrier { number, is_durable, .. } = barrier;
        tracing::debug!(number, is_durable, ?stored, took = ?begun.elapsed(), "barrier");
        self.back.answer(&Answer::Ack(barrier.number))
    }

    fn prepare(&self) -> Result<()> {
        self.jobs.wait_idle()?;
        let mut ready = Ready { session: self.session, disks: Vec::new(), bitmaps: Vec::new() };
        let proves_all = self.back.is_one_way();
        self.sections.handlers().try_for_each(|handler| handler.prepare(proves_all, &mut ready))?;
        self.breaker.check()?;
        self.set_progress(Progress::Prepared);
        self.back.answer(&Answer::Ready(ready))
    }

    fn commit(&self) -> Result<()> {
        {
            let mut progress = lock(&self.progress);
            self.breaker.check()?;
            *progress = Progress::Committing;
        }
        self.sections.handlers().try_for_each(|handler| handler.commit())?;
        self.set_progress(Progress::Committed);
        if let Err(error) = self.back.answer(&Answer::Committed(self.session)) {
            tracing::warn!(%error, "published, and the source could not be told");
        }
        Ok(())
    }

    /// Something failed that does not matter once COMMIT was read: what is published by then is,
    /// and the source is not told otherwise.
    pub(super) fn fail_before_commit(&self, error: Error) {
        let progress = lock(&self.progress);
        if *progress < Progress::Committing {
            let news = self.note(error);
            drop(progress);
            self.tell_and_close(news);
        }
    }

    /// Something failed: the source is told, and nobody waits any more.
    pub(super) fn fail(&self, error: Error) {
        let news = self.note(error);
        self.tell_and_close(news);
    }

    /// Notes an error. Answers what the source is to be told of it: the first one is to be
    /// reported, unless it came from there.
    fn note(&self, error: Error) -> Option<Answer<'static>> {
        let failed = failed(&error);
        // Who only ends because others do may come before who knows why.
        let is_first = !matches!(error, Error::Ended) && !self.has_reason.swap(true, AcqRel);
        let is_news = !matches!(error, Error::Peer { .. });
        self.breaker.note(error);
        (is_first && is_news).then_some(failed)
    }

    fn tell_and_close(&self, news: Option<Answer<'_>>) {
        if let Some(failed) = news {
            // The error that this one is about is the one to report.
            let _ = self.back.answer(&failed);
        }
        self.gate.close();
        self.jobs.close();
        self.buffers.close();
        self.breaker.hang_up();
    }

    /// The error to report, once something failed.
    pub(super) fn reason(&self) -> Error {
        self.breaker.explain(Error::Ended)
    }

    /// Looks now and then for life, for the user's wish to stop, and for failures of other threads
    /// than main's, whose line it ends when the source has had time to hear of them.
    pub(super) fn watch(&self, over: &Heart, main: &dyn HangUp, options: &IncomingOptions<'_>) {
        let mut silence = Duration::ZERO;
        let step = LOOK_INTERVAL.min(options.timing.keepalive);
        while !over.wait(step) {
            if self.breaker.is_broken() {
                if !over.wait(self.linger) {
                    main.hang_up();
                }
                return;
            }
            if options.monitor.is_cancelled() {
                self.fail_before_commit(Error::Interrupted);
            }
            silence += step;
            let has_all = self.has_all();
            let keepalive = options.timing.keepalive;
            if silence >= if has_all { keepalive } else { keepalive.min(JOINING_INTERVAL) } {
                silence = Duration::ZERO;
                match self.back.keepalive() {
                    // Main may wait at a barrier for connections that will not come, and does not
                    // see that the source has gone.
                    Err(error) if !has_all => self.fail_before_commit(error),
                    Err(error) => tracing::debug!(%error, "cannot say that this side is alive"),
                    Ok(()) => {}
                }
            }
        }
    }

    /// Does what was put off, until the session ends.
    pub(super) fn work(&self) {
        self.jobs.work(&|error| self.fail(error));
    }

    /// A further connection says which one it is.
    pub(super) fn join(&self, channel: u16, line: &Arc<dyn HangUp>) -> Result<()> {
        let mut joined = lock(&self.joined);
        match joined.get_mut(usize::from(channel)) {
            Some(is_there) if !*is_there => *is_there = true,
            _ => {
                return Err(Error::protocol(
                    channel,
                    0,
                    "that connection is there, or not granted",
                ));
            }
        }
        self.breaker.add(line.clone());
        Ok(())
    }

    /// Keeps the silent half of a connection.
    pub(super) fn keep(&self, writer: Box<dyn Write + Send>) {
        lock(&self.silent).push(writer);
    }

    /// Whether all connections that were granted are there.
    pub(super) fn has_all(&self) -> bool {
        lock(&self.joined).iter().all(|is_there| *is_there)
    }

    /// Whether nothing more is to be read.
    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire) || self.breaker.is_broken()
    }

    /// Whether the destination was asked to publish.
    pub(super) fn has_committed(&self) -> bool {
        self.progress() >= Progress::Committing
    }

    /// Ends everything, the session being over.
    pub(super) fn close(&self) {
        self.is_over.store(true, Ordering::Release);
        self.gate.close();
        self.jobs.close();
        self.buffers.close();
        self.breaker.hang_up();
    }

    /// Tells the handlers that nothing comes of it.
    pub(super) fn abort(&self, fate: Fate) {
        self.sections.handlers().for_each(|handler| handler.abort(fate));
    }

    fn progress(&self) -> Progress {
        *lock(&self.progress)
    }

    fn set_progress(&self, progress: Progress) {
        *lock(&self.progress) = progress;
    }
}

/// What the source is told of an error.
pub(super) fn failed(error: &Error) -> Answer<'static> {
    let (blame, offset) = (error.blame(), error.stream_offset());
    Answer::Failed { blame, offset, text: crate::report::error_chain(error) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
