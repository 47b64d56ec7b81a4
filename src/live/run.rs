//! One migration: attempts until one succeeds or nothing can be hoped for.

use std::sync::atomic::Ordering;
use std::sync::{Arc, TryLockError};
use std::time::{Duration, Instant};

use bitmap_mig::live::{Numbers, SaveLive, Sender};
use block_mig::device::HeldSource;
use block_mig::limits::UNIT_BYTES;
use block_mig::plan::{Scope, survey};
use block_mig::save::SaveCounts;
use block_mig::{SaveBlocks, SaveDisk, SaveOptions};
use format_spec::Blame;
use format_spec::native::answer::Ready;
use format_spec::native::block::DiskId;
use mig_core::block::BlockSource;
use mig_core::guest::Guest;
use mig_core::heart::Heart;
use mig_core::meter::Meter;
use mig_core::section::SaveHandler;
use mig_core::stream;
use mig_core::transport::Dial;

use super::builder::{LiveDisk, Outgoing};
use super::paused::Whole;
use super::steering::{Eye, Steering, millis};
use super::unsettled::Unsettled;
use super::{DiskReport, Report};
use crate::incoming::SessionId;
use crate::observe::Progress;
use crate::outgoing::{ExpectedDisk, Outcome, OutgoingOptions, Sent, send};
use crate::policy::Reason;
use crate::status::{Amounts, Status};
use crate::{Error, Phase, Result};

/// How often parameters are looked at while data is being sent.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Pause between two attempts to connect again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

impl Outgoing<'_> {
    /// Migrates `guest`, which runs, to the destination that `dial` reaches. An error means that it
    /// goes on here. After success its disks are [retired](block_mig::TrackedDisk::retire).
    ///
    /// After [`Unknown`](Outcome::Unknown) the guest is paused, and calling this again asks the
    /// destination what became of it: it stays paused, and unknown, as long as there is no answer.
    pub fn run(&self, dial: &dyn Dial, guest: &mut dyn Guest) -> Result<Report> {
        if dial.nature().is_one_way {
            let reason = "nobody answers on a one-way stream, and a guest is not let go unheard";
            return Err(Error::Usage { reason: reason.to_owned() });
        }
        let mut unsettled = match self.unsettled.try_lock() {
            Ok(unsettled) => unsettled,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Usage { reason: "this migration runs already".to_owned() });
            }
        };
        let migration = &*self.migration;
        migration.ask_again();
        migration.update(|info| {
            info.status = Status::Setup;
            let carried = self.disks.iter().filter(|_| self.blocks);
            let total = carried.map(|disk| disk.disk.size()).sum();
            info.disk = Some(Amounts { total, remaining: total, ..Amounts::default() });
        });
        let before = unsettled.take();
        let since = before.as_ref().map(|before| before.since);
        let mut whole = Whole { guest, disks: &self.disks, migration, since };
        let mut steering = Steering::new(migration, self.limits);
        let session = before.as_ref().map_or(self.session, |before| before.session);
        let expected = self.expected(before.as_ref());
        let confirmed = before.and_then(|before| before.confirmed);
        let mut tries = Tries { session, expected, confirmed, ..Tries::default() };
        let result = self.attempts(dial, &mut whole, &mut steering, &mut tries);
        whole.throttle(0);
        let downtime = whole.since.map(|since| since.elapsed()).unwrap_or_default();
        let sent = match result {
            Ok(sent) => sent,
            Err(error) => return Err(self.note_failure(error, steering.reason)),
        };
        let Tries { session, confirmed, counts, losses, .. } = tries;
        let since = settle(&sent, &mut whole)?;
        *unsettled = since.map(|since| Unsettled { session, since, confirmed });
        self.note_end(&sent, downtime);
        let disks = self.disks.iter().zip(&counts);
        let disks = disks.map(|(disk, counts)| report(&disk.name, counts)).collect();
        let (passes, reconnects) = (steering.passes, losses.made);
        Ok(Report { sent, session, downtime, passes, reconnects, disks })
    }

    /// Attempts until one ends otherwise than by a connection that may be made again. A guest that
    /// is paused behind one of them has been let go of, and the same session is asked for again.
    fn attempts(
        &self,
        dial: &dyn Dial,
        whole: &mut Whole<'_>,
        steering: &mut Steering<'_>,
        tries: &mut Tries,
    ) -> Result<Sent, stream::Error> {
        let mut was_unknown = false;
        loop {
            let error = match self.attempt(dial, whole, steering, tries) {
                Err(stream::Error::Stale) => {
                    steering.taken_back();
                    steering.restart();
                    continue;
                }
                Ok(Sent {
                    outcome: Outcome::Unknown(error), peer, confirmed, wire_bytes, ..
                }) => {
                    was_unknown = true;
                    (tries.peer, tries.wire_bytes) = (peer, wire_bytes);
                    self.note_unknown(confirmed, whole, tries)?;
                    error
                }
                // It was this run whose last answer was lost.
                Ok(sent) if was_unknown => return Ok(tries.answered(sent)),
                Ok(sent) => return Ok(sent),
                Err(error) => error,
            };
            if !self.may_go_on(&error) || tries.is_over(&error, self) {
                return tries.give_up(error, whole);
            }
            tracing::warn!(%error, "the connection was lost; trying again");
            steering.restart();
            std::thread::sleep(RETRY_PAUSE.min(self.reconnect));
        }
    }

    /// Nobody knows who has the guest: it does not run here, and what it was is what the
    /// destination must have.
    fn note_unknown(
        &self,
        confirmed: Option<Ready>,
        whole: &mut Whole<'_>,
        tries: &mut Tries,
    ) -> Result<(), stream::Error> {
        // In another process, it was let go of.
        let Some(since) = whole.since else { return pause(whole) };
        tries.confirmed = confirmed.or_else(|| tries.confirmed.take());
        let (session, confirmed) = (tries.session, tries.confirmed.clone());
        tries.expected = self.expected(Some(&Unsettled { session, since, confirmed }));
        Ok(())
    }

    /// One attempt, from the first connection on. On an error everything is as before it.
    fn attempt(
        &self,
        dial: &dyn Dial,
        whole: &mut Whole<'_>,
        steering: &mut Steering<'_>,
        tries: &mut Tries,
    ) -> Result<Sent, stream::Error> {
        let meter = Arc::new(Meter::default());
        // What is not sent is read all the same where it is hashed.
        let total = self.content(self.shared_base && !self.hashes)?;
        let progress = Progress::begin(self.observer, Phase::Transfer, total);
        let eye =
            Eye::new(&self.migration, &meter, steering.deadline(), (self.observer, &progress));
        let ids = || (0..).map(DiskId);
        let disks = ids().zip(&self.disks).map(|(id, live)| {
            let dirty = self.blocks.then(|| live.disk.start_tracking()).transpose()?;
            Ok(SaveDisk { id, name: live.name.clone(), source: &*live.disk, dirty })
        });
        let disks = disks.collect::<mig_core::Result<Vec<_>>>().map_err(Error::from)?;
        let options = SaveOptions { hashes: self.hashes, workers: self.workers, monitor: &eye };
        let held: Vec<_> = self.disks.iter().map(|live| HeldSource(&*live.disk)).collect();
        let blocks = match self.blocks {
            true => SaveBlocks::above(self.above(disks, &held), options),
            false => SaveBlocks::without_content(disks, options),
        };
        let blocks = blocks.map_err(Error::from)?;
        tries.counts = blocks.counts();
        let numbers = Arc::new(Numbers::default());
        let senders = ids().zip(&self.disks).map(|(id, live)| {
            let choose = self.choose.clone();
            let carry = Box::new(move |info: &_| choose(info));
            Sender::new(live.bitmaps.clone(), id, numbers.clone(), carry)
        });
        let bitmaps = SaveLive::new(senders.collect(), self.hashes);
        let mut handlers: Vec<Box<dyn SaveHandler + '_>> =
            vec![Box::new(blocks), Box::new(bitmaps)];
        handlers.extend(self.states.iter().map(|make| make()));
        let options = OutgoingOptions {
            session: tries.session,
            channels: self.channels,
            compression: self.compression,
            resumes: !self.reconnect.is_zero(),
            // A guest that is paused has changed nothing since.
            has_moved_on: steering.has_prepared() && whole.since.is_none(),
            max_pause: Some(self.max_pause),
            meter: meter.clone(),
            monitor: &eye,
            timing: self.timing,
            expected: tries.expected.clone(),
        };
        // A guest that was let go of is not waited for: what is left is the handover.
        steering.is_let_go = whole.since.is_some();
        let status = if steering.is_let_go { Status::Device } else { Status::Active };
        self.migration.enter(status);
        let watch = Heart::new();
        std::thread::scope(|scope| {
            // Whoever waits for bandwidth learns of a new limit, and of a call to stop.
            scope.spawn(|| watch.run(LOOK_INTERVAL, || eye.steer_meter()));
            let _stopping = watch.stop_on_drop();
            send(dial, handlers, whole, steering, &options)
        })
    }

    /// What of each disk is to be sent: where the other side shares the base, what it holds.
    fn above<'s>(
        &self,
        disks: Vec<SaveDisk<'s>>,
        held: &'s [HeldSource<'_>],
    ) -> Vec<(SaveDisk<'s>, Option<&'s dyn BlockSource>)> {
        let is_above = |live: &LiveDisk| live.scope(self.shared_base) == Scope::Above;
        let above = self.disks.iter().zip(held);
        let above = above.map(|(live, held)| is_above(live).then_some(held as &dyn BlockSource));
        disks.into_iter().zip(above).collect()
    }

    /// Bytes that were sent of all disks in all attempts.
    fn sent_bytes(&self) -> u64 {
        self.migration.info().disk.map_or(0, |disk| disk.normal_bytes)
    }

    /// Bytes of content to be read at least, as the disks say; only of what they hold themselves,
    /// where the other side `shares` what is below.
    pub(super) fn content(&self, shares: bool) -> Result<u64> {
        let of_disk = |live: &LiveDisk| match live.scope(shares) {
            Scope::Whole => survey(&*live.disk, Scope::Whole, UNIT_BYTES),
            Scope::Above => survey(&HeldSource(&*live.disk), Scope::Above, UNIT_BYTES),
        };
        let carried = self.disks.iter().filter(|_| self.blocks);
        let contents = carried.map(|live| of_disk(live).map(|survey| survey.content));
        Ok(contents.sum::<block_mig::Result<u64>>()?)
    }

    /// Whether an attempt failed for a reason that may pass.
    fn may_go_on(&self, error: &stream::Error) -> bool {
        let is_connection = matches!(
            error,
            stream::Error::Connection { .. } | stream::Error::Connect(_) | stream::Error::Ended
        );
        is_connection && !self.reconnect.is_zero() && !self.migration.is_cancelled()
    }

    fn note_end(&self, sent: &Sent, downtime: Duration) {
        self.migration.update(|info| {
            info.downtime = Some(millis(downtime));
            if let Some(disk) = &mut info.disk {
                (disk.transferred, disk.remaining) = (sent.wire_bytes, 0);
            }
            match &sent.outcome {
                Outcome::Unknown(error) => {
                    info.error_desc = Some(crate::report::error_chain(error));
                    info.status = Status::Unknown;
                }
                _ => info.status = Status::Completed,
            }
        });
    }

    pub(super) fn note_failure(&self, error: stream::Error, reason: Option<Reason>) -> Error {
        let is_cancelled = self.migration.is_cancelled();
        let error = match (reason, error) {
            (Some(Reason::Cancelled), _) => Error::Interrupted,
            (Some(reason), _) => Error::NotConverged(reason),
            (None, stream::Error::Interrupted) if !is_cancelled => {
                Error::NotConverged(Reason::Timeout)
            }
            (None, error) => error.into(),
        };
        self.migration.update(|info| {
            info.error_desc = Some(crate::report::error_chain(&error));
            info.status = if is_cancelled { Status::Cancelled } else { Status::Failed };
        });
        error
    }
}

fn pause(whole: &mut Whole<'_>) -> Result<(), stream::Error> {
    whole.pause().map_err(|source| stream::Error::handler(Blame::Device, source))
}

/// Lets go of a guest that the destination has. Answers since when it is paused where nobody knows
/// whether it does.
fn settle(sent: &Sent, whole: &mut Whole<'_>) -> Result<Option<Instant>> {
    match (&sent.outcome, whole.since) {
        (_, Some(_)) => {}
        // It has taken over in an earlier process: the guest must not go on here.
        (_, None) => {
            tracing::warn!("the destination had taken over already");
            pause(whole)?;
        }
    }
    if matches!(sent.outcome, Outcome::Unknown(_)) {
        return Ok(whole.since);
    }
    whole.retire();
    Ok(None)
}

/// What the attempts of one run leave to the next one.
#[derive(Default)]
struct Tries {
    session: SessionId,
    /// What a destination must have that says it had finished.
    expected: Vec<ExpectedDisk>,
    /// What it proved to have before the guest was let go of.
    confirmed: Option<Ready>,
    /// Who was told to take over, and what had been written by then.
    peer: String,
    wire_bytes: u64,
    counts: Vec<Arc<SaveCounts>>,
    losses: Losses,
}

impl Tries {
    /// Notes a lost connection. Whether that lasts for too long.
    fn is_over(&mut self, error: &stream::Error, outgoing: &Outgoing<'_>) -> bool {
        let is_connected = !matches!(error, stream::Error::Connect(_));
        let since = self.losses.note(is_connected, outgoing.sent_bytes());
        since.elapsed() >= outgoing.reconnect
    }

    /// An answer to what was unknown: what is complete became so in this run.
    fn answered(&mut self, sent: Sent) -> Sent {
        match sent.outcome {
            Outcome::AlreadyComplete(_) => {
                let confirmed = self.confirmed.take();
                Sent { outcome: Outcome::Completed, confirmed, ..sent }
            }
            _ => sent,
        }
    }

    /// No more attempts. A guest that is still paused was let go of, and nobody has said anything
    /// else since.
    fn give_up(&self, error: stream::Error, whole: &Whole<'_>) -> Result<Sent, stream::Error> {
        match whole.since {
            Some(_) => Ok(Sent {
                peer: self.peer.clone(),
                confirmed: self.confirmed.clone(),
                wire_bytes: self.wire_bytes,
                ..Sent::unknown(error)
            }),
            None => Err(error),
        }
    }
}

/// Connections that were lost.
#[derive(Debug, Default)]
struct Losses {
    /// How many of them had been made.
    made: u32,
    /// Since when nothing comes of it, and what had been sent by then.
    since: Option<(Instant, u64)>,
}

impl Losses {
    /// Notes one, and answers since when nothing comes of it: a peer that takes connections and
    /// drops them is waited for no longer than one that takes none.
    fn note(&mut self, is_made: bool, sent_bytes: u64) -> Instant {
        self.made += u32::from(is_made || self.since.is_none());
        let vain = self.since.filter(|(_, before)| *before == sent_bytes);
        self.since.insert(vain.unwrap_or_else(|| (Instant::now(), sent_bytes))).0
    }
}

fn report(name: &str, counts: &SaveCounts) -> DiskReport {
    DiskReport {
        name: name.to_owned(),
        bytes_data: counts.data.load(Ordering::Relaxed),
        bytes_repeated: counts.repeated.load(Ordering::Relaxed),
        bytes_zero: counts.zero.load(Ordering::Relaxed),
    }
}
