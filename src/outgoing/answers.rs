//! The return path: a thread reads what the destination answers, so that a failure is seen while
//! the others write.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block_mig::Monitor;
use format_spec::Blame;
use format_spec::content_hash::Node;
use format_spec::native::answer::{Answer, Ready};
use format_spec::native::block::{BitmapVersion, DiskId};
use mig_core::limits::HAVE_QUEUE;
use mig_core::section::{Have, HaveReader};
use mig_core::stream::{Arrival, Breaker, Buffers, Error, Result, StreamReader};

/// How often whoever waits looks whether the user wants to stop.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// How long an answer is waited for.
#[derive(Clone, Copy)]
pub(super) struct Waiting<'a> {
    /// Asked now and then whether the user wants to stop.
    pub(super) monitor: &'a dyn Monitor,
    /// How much longer it is waited for then.
    pub(super) linger: Duration,
    /// When a paused guest has waited long enough, whatever else the destination says.
    pub(super) until: Option<Instant>,
}

impl<'a> Waiting<'a> {
    /// As long as the user wants, and no longer.
    pub(super) fn patient(monitor: &'a dyn Monitor) -> Self {
        Self { monitor, linger: Duration::ZERO, until: None }
    }
}

/// What the destination has answered so far.
#[derive(Debug)]
pub(super) struct Answers {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    acknowledged: u64,
    /// What was asked: answers that nobody asked for are errors.
    placed: u64,
    has_prepared: bool,
    /// The session that was told to COMMIT.
    asked_to_commit: Option<[u8; 16]>,
    /// Whether HAVE is awaited.
    is_told: bool,
    /// Whether this side has given up: what is told is forgotten.
    is_deaf: bool,
    have: VecDeque<Had>,
    ready: Option<Ready>,
    is_committed: bool,
    is_over: bool,
    /// Why one of the connections is of no use any more.
    lost: Option<Error>,
}

/// What the destination has already.
#[derive(Debug)]
enum Had {
    /// Of a disk; `None` when that was all.
    Disk(DiskId, Option<Have>),
    /// Of a bitmap.
    Bitmap(BitmapVersion, Vec<(u64, Node)>),
}

impl Answers {
    /// Nothing was answered. `is_told`: whether the destination tells what it has.
    pub(super) fn new(is_told: bool) -> Self {
        let state = State { is_told, ..State::default() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Reads answers until the connection ends or the destination fails. Then nothing that this
    /// side still does matters: all connections are ended.
    pub(super) fn read(&self, mut reader: StreamReader, breaker: &Breaker) {
        let buffers = Buffers::new(1);
        let error = loop {
            let took = reader.record(&buffers).and_then(|arrival| self.take(&arrival, breaker));
            if let Err(error) = took {
                break error;
            }
        };
        let (is_committed, is_deaf) = {
            let state = self.lock();
            (state.is_committed, state.is_deaf)
        };
        if !is_committed {
            // How it ends once this side has given up is no reason for that.
            if !(is_deaf && error.is_secondary()) {
                breaker.note(error);
            }
            breaker.hang_up();
        }
        self.lock().is_over = true;
        self.changed.notify_all();
    }

    fn take(&self, arrival: &Arrival, breaker: &Breaker) -> Result<()> {
        let record = arrival.record();
        let answer = Answer::decode(&record).map_err(|e| arrival.malformed(e))?;
        let mut state = self.lock();
        match answer {
            None | Some(Answer::Keepalive) => {}
            Some(Answer::Failed { blame, text, .. }) => return Err(Error::Peer { blame, text }),
            Some(Answer::Ack(number)) => {
                if number != state.acknowledged.saturating_add(1) || number > state.placed {
                    let reason = format!("it acknowledges barrier {number}, which is not next");
                    return Err(arrival.protocol(reason));
                }
                state.acknowledged = number;
            }
            Some(Answer::Have(disk, units)) => {
                let have = Have::Units(units.first, units.nodes.to_vec());
                self.tell(state, Had::Disk(disk, Some(have)), arrival, breaker)?;
            }
            Some(Answer::HaveZeroes(disk, units)) => {
                let have = Have::Zeroes(units.first, units.count);
                self.tell(state, Had::Disk(disk, Some(have)), arrival, breaker)?;
            }
            Some(Answer::HaveDone(disk)) => {
                self.tell(state, Had::Disk(disk, None), arrival, breaker)?;
            }
            Some(Answer::HaveBitmap(version, leaves)) => {
                self.tell(state, Had::Bitmap(version, leaves), arrival, breaker)?;
            }
            Some(Answer::Ready(ready)) if state.has_prepared && state.ready.is_none() => {
                state.ready = Some(ready);
            }
            Some(Answer::Committed(session)) if state.asked_to_commit == Some(session) => {
                state.is_committed = true;
            }
            Some(Answer::Ready(_) | Answer::Committed(_) | Answer::Published(_)) => {
                return Err(arrival.protocol("it answers what was not asked"));
            }
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Queues what the destination has, once there is room.
    fn tell(
        &self,
        state: MutexGuard<'_, State>,
        have: Had,
        arrival: &Arrival,
        breaker: &Breaker,
    ) -> Result<()> {
        let mut state = state;
        loop {
            if state.is_deaf {
                return Ok(());
            }
            if !state.is_told {
                return Err(arrival.protocol("it tells what it has, and nobody asked"));
            }
            if state.have.len() < HAVE_QUEUE {
                break;
            }
            breaker.check()?;
            let waited = self.changed.wait_timeout(state, LOOK_INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.have.push_back(have);
        self.changed.notify_all();
        Ok(())
    }

    /// All that was asked for was told. More of it would keep acknowledgements from being read.
    pub(super) fn told_all(&self) -> Result<()> {
        let mut state = self.lock();
        state.is_told = false;
        self.changed.notify_all();
        if state.have.is_empty() {
            return Ok(());
        }
        Err(Error::protocol(0, 0, "it tells more of what it has than was asked for"))
    }

    /// One of the connections is of no use any more, and nobody may write to it for long: who waits
    /// for an answer would wait in vain. Once COMMIT is on its way nothing but its answer counts.
    pub(super) fn lose(&self, error: Error) {
        let mut state = self.lock();
        if state.asked_to_commit.is_none() {
            state.lost.get_or_insert(error);
            self.changed.notify_all();
        }
    }

    /// This side gives up, and listens only for the end.
    pub(super) fn stop_listening(&self) {
        let mut state = self.lock();
        state.is_deaf = true;
        state.have.clear();
        self.changed.notify_all();
    }

    /// A barrier is about to be written.
    pub(super) fn expect_ack(&self) -> u64 {
        let mut state = self.lock();
        state.placed = state.placed.saturating_add(1);
        state.placed
    }

    /// PREPARE is about to be written.
    pub(super) fn expect_ready(&self) {
        self.lock().has_prepared = true;
    }

    /// COMMIT is about to be written.
    pub(super) fn expect_committed(&self, session: [u8; 16]) {
        let mut state = self.lock();
        (state.asked_to_commit, state.lost) = (Some(session), None);
    }

    /// Waits until this barrier is acknowledged.
    pub(super) fn wait_ack(&self, number: u64, waiting: Waiting<'_>) -> Result<()> {
        self.wait(waiting, |state| (state.acknowledged >= number).then_some(()))
    }

    /// Waits for READY.
    pub(super) fn wait_ready(&self, waiting: Waiting<'_>) -> Result<Ready> {
        self.wait(waiting, |state| state.ready.clone())
    }

    /// Waits for COMMITTED. Nothing can be taken back any more: a user who does not want to wait
    /// gets what is on its way while it lingers, and does not know otherwise.
    pub(super) fn wait_committed(&self, waiting: Waiting<'_>) -> Result<()> {
        self.wait(waiting, |state| state.is_committed.then_some(()))
    }

    /// Waits until the destination has said its last word, but not for long.
    pub(super) fn wait_over(&self, limit: Duration) {
        let goes_on = |state: &mut State| !state.is_over;
        let waited = self.changed.wait_timeout_while(self.lock(), limit, goes_on);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits for what `look` finds.
    fn wait<T>(
        &self,
        Waiting { monitor, linger, until }: Waiting<'_>,
        mut look: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T> {
        let mut cancelled: Option<Instant> = None;
        let mut state = self.lock();
        loop {
            if let Some(found) = look(&mut state) {
                self.changed.notify_all();
                return Ok(found);
            }
            if state.is_over {
                return Err(Error::Ended);
            }
            if let Some(lost) = state.lost.take() {
                return Err(lost);
            }
            if monitor.is_cancelled()
                && cancelled.get_or_insert_with(Instant::now).elapsed() >= linger
            {
                return Err(Error::Interrupted);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                let reason = "the guest has been paused for as long as it may, and the destination \
                              has not answered";
                return Err(Error::handler(Blame::PeerBehaviour, reason));
            }
            let waited = self.changed.wait_timeout(state, LOOK_INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hears what the destination has, disk by disk.
pub(super) struct Told<'a> {
    pub(super) answers: &'a Answers,
    pub(super) monitor: &'a dyn Monitor,
}

impl HaveReader for Told<'_> {
    fn next(&mut self, disk: DiskId) -> Result<Option<Have>> {
        match self.next_had()? {
            Had::Disk(told, have) if told == disk => Ok(have),
            other => Err(other.instead_of(format!("disk {}", disk.0))),
        }
    }

    fn next_bitmap(&mut self, version: BitmapVersion) -> Result<Vec<(u64, Node)>> {
        match self.next_had()? {
            Had::Bitmap(told, leaves) if told == version => Ok(leaves),
            other => Err(other.instead_of(format!("bitmap {}", version.bitmap))),
        }
    }
}

impl Told<'_> {
    fn next_had(&self) -> Result<Had> {
        self.answers.wait(Waiting::patient(self.monitor), |state| state.have.pop_front())
    }
}

impl Had {
    fn instead_of(&self, expected: String) -> Error {
        let told = match self {
            Self::Disk(disk, _) => format!("disk {}", disk.0),
            Self::Bitmap(version, _) => format!("bitmap {}", version.bitmap),
        };
        Error::protocol(0, 0, format!("it tells of {told} where {expected} is next"))
    }
}
