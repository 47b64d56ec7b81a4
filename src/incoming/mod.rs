//! The destination's side of a migration in the native dialect (SPEC 4.1, 8, 9). Mirrors
//! [`outgoing`](crate::outgoing), phase by phase: accept, join, receive, prepare, commit, end.
//!
//! One thread reads each connection; what is to be stored goes to a few workers, so that reading
//! goes on meanwhile. Nothing is published before COMMIT, and a failure anywhere ends all
//! connections, so that nobody waits.

mod accept;
mod back;
mod block;
mod join;
mod place;
mod read;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use bitmap_mig::KeptBitmaps;
use block_mig::Monitor;
use block_mig::arrive::{Known, Tally};
use format_spec::Blame;
use format_spec::native::answer::{Answer, Published};
use format_spec::native::hello::{MAX_CHANNELS, RESUME, SessionState};
use mig_core::heart::{Heart, within};
use mig_core::section::{AnswerWriter as _, Fate, Registry};
use mig_core::stream::{Error, Result};
use mig_core::transport::{Connection, HangUp, Listen};

use self::accept::Accepted;
pub(crate) use self::accept::{is_worth_an_answer, turn_away};
use self::block::BlockSection;
pub use self::place::{Destination, Introduced, Place, Sealed, SessionId, Wanted};
use self::read::{LOOK_INTERVAL, Session};
use crate::Timing;

/// How to receive.
#[derive(Clone)]
pub struct IncomingOptions<'a> {
    /// Most connections that are granted.
    pub max_channels: u16,
    /// Whether what arrived may be kept for another attempt.
    pub resumes: bool,
    /// Asked now and then whether to stop.
    pub monitor: &'a dyn Monitor,
    /// Worker threads that store what arrived.
    pub workers: usize,
    /// How patient to be.
    pub timing: Timing,
    /// Where bitmaps are kept from one attempt to the next: share it between them.
    pub kept: Arc<KeptSession>,
    /// Where it is counted what has come.
    pub tally: Arc<Tally>,
}

/// The bitmaps of a session that was cut off, in memory.
#[derive(Debug, Default)]
pub struct KeptSession(Mutex<Option<(SessionId, KeptBitmaps)>>);

impl KeptSession {
    fn take(&self, session: SessionId) -> Option<KeptBitmaps> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        kept.filter(|(of, _)| *of == session).map(|(_, kept)| kept)
    }

    fn put(&self, session: SessionId, kept: KeptBitmaps) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((session, kept));
    }
}

impl<'a> IncomingOptions<'a> {
    /// As many connections as the source wants.
    pub fn new(monitor: &'a dyn Monitor) -> Self {
        Self {
            max_channels: MAX_CHANNELS,
            resumes: true,
            monitor,
            workers: mig_core::limits::LOAD_WORKERS,
            timing: Timing::default(),
            kept: Arc::default(),
            tally: Arc::default(),
        }
    }
}

/// A disk that was received and published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedDisk {
    /// Its name on the wire.
    pub name: String,
    /// Guest-visible bytes.
    pub size: u64,
    /// Bytes of content that came.
    pub bytes_data: u64,
    /// Bytes that came as runs of zeroes.
    pub bytes_zero: u64,
    /// How it read back, where the source wanted that.
    pub proof: Option<crate::DiskProof>,
    /// Names of its bitmaps.
    pub bitmaps: Vec<String>,
}

/// What was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// The source's program and version.
    pub peer: String,
    /// The session.
    pub session: SessionId,
    /// Whether everything had been published before, by an earlier attempt.
    pub already_complete: bool,
    /// Whether something was there from an earlier attempt.
    pub resumed: bool,
    /// Bytes read from all connections.
    pub wire_bytes: u64,
    /// The disks in the order of their numbers.
    pub disks: Vec<ReceivedDisk>,
    /// What an earlier attempt had published, where that was all of it.
    pub published: Vec<Published>,
}

/// Receives one migration whose source has made its first connection. Further connections come from
/// `listen`. `others` are handlers of sections beside that of disks.
pub fn receive(
    main: Connection,
    listen: &dyn Listen,
    destination: Arc<dyn Destination>,
    others: Registry,
    options: &IncomingOptions<'_>,
) -> Result<Received> {
    let accepted = accept::accept(main, listen.nature(), &*destination, options)?;
    let mut received = Received {
        peer: accepted.offer.program.clone(),
        session: accepted.offer.session,
        already_complete: accepted.choice.state == SessionState::Committed,
        resumed: accepted.choice.state != SessionState::Fresh,
        wire_bytes: 0,
        disks: Vec::new(),
        published: Vec::new(),
    };
    if received.already_complete {
        received.published = accepted.already_complete(destination.published(), options)?;
        return Ok(received);
    }
    let known = match accepted.choice.state {
        SessionState::Ready => Known::All,
        SessionState::Resumable => Known::Some,
        _ => Known::Nothing,
    };
    let kept = options.kept.take(received.session).filter(|_| known == Known::Some);
    let block =
        Arc::new(BlockSection::new(destination.clone(), known, kept, options.tally.clone()));
    let mut sections = others;
    sections.add(block_mig::save::SECTION, block.clone());
    let resumes = accepted.choice.features & RESUME != 0;
    let (session, result) = run(accepted, listen, sections, options);
    match result {
        Ok(()) => {}
        // Once it was asked to commit, the destination knows by itself where it stands.
        Err(error) if session.has_committed() => return Err(error),
        Err(error) => {
            // Of an attempt that has not come so far there is nothing worth keeping.
            let keeps = resumes && (received.resumed || block.is_introduced());
            session.abort(fate(&error, keeps));
            if resumes {
                options.kept.put(received.session, block.keep_bitmaps());
            }
            return Err(error);
        }
    }
    received.wire_bytes = session.read_bytes.load(Ordering::Relaxed);
    received.disks = block.received();
    Ok(received)
}

impl Accepted {
    /// All was published before: says so, and what that is, or why that is not known. A source that
    /// hears nothing is read to its end, so that it ends as well as it would have.
    fn already_complete(
        mut self,
        published: Result<Vec<Published>>,
        options: &IncomingOptions<'_>,
    ) -> Result<Vec<Published>> {
        if !self.back.is_one_way() {
            let said = match &published {
                Ok(published) => {
                    let published = published.iter().cloned().map(Answer::Published);
                    published.chain([Answer::Committed(self.offer.session)]).collect()
                }
                Err(error) => vec![read::failed(error)],
            };
            // It may ask again.
            if let Err(error) = said.iter().try_for_each(|said| self.back.answer(said)) {
                tracing::debug!(%error, "the source did not wait to hear what is published");
            }
            if published.is_err() {
                within(options.timing.linger, &*self.line, || self.reader.drain(u64::MAX));
            }
            return published;
        }
        let over = Heart::new();
        std::thread::scope(|scope| {
            let _stopping = over.stop_on_drop();
            scope.spawn(|| {
                over.run(LOOK_INTERVAL, || {
                    if options.monitor.is_cancelled() {
                        self.line.hang_up();
                    }
                });
            });
            self.reader.drain(u64::MAX);
        });
        published
    }
}

/// What is kept of a failed attempt, by what was agreed and by whether the source gave it up.
fn fate(error: &Error, resumes: bool) -> Fate {
    match error {
        _ if !resumes => Fate::Dropped,
        // What was refused is not to be gone on with.
        Error::Handler(refused) if refused.blame == Blame::WouldLose => Fate::Dropped,
        Error::Peer { .. } => Fate::Revoked,
        _ => Fate::Kept,
    }
}

/// Ends what goes on beside the reader of main.
struct End<'e> {
    over: &'e Heart,
    session: &'e Session,
    line: &'e dyn HangUp,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.over.stop();
        self.session.close();
        self.line.hang_up();
    }
}

/// Reads all connections until the source has nothing more to say.
fn run(
    accepted: Accepted,
    listen: &dyn Listen,
    sections: Registry,
    options: &IncomingOptions<'_>,
) -> (Session, Result<()>) {
    let Accepted { mut reader, line, back, offer, choice } = accepted;
    let session = Session::new(back, &offer, &choice, sections, options);
    let over = Heart::new();
    let result = std::thread::scope(|scope| {
        let (session, choice, line) = (&session, &choice, &*line);
        scope.spawn(|| session.watch(&over, line, options));
        for _ in 0..options.workers.max(1) {
            scope.spawn(|| session.work());
        }
        if choice.channels > 1 || listen.has_strangers() {
            scope.spawn(move || join::accept_all(scope, session, listen, choice, &options.timing));
        }
        // Also where somebody panics: who waits inside this scope would wait for good.
        let _end = End { over: &over, session, line };
        session.read_main(&mut reader).map_err(|error| {
            session.fail(error);
            // The source is still writing: what it wrote is read, so that it can read why.
            within(options.timing.linger, line, || reader.drain(u64::MAX));
            session.reason()
        })
    });
    (session, result)
}
