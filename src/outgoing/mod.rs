//! The source's side of a migration in the native dialect (SPEC 4.1, 8, 9).
//!
//! ```text
//! source                           destination (crate::incoming)
//! connect    OFFER              ->
//!                               <- CHOICE or REFUSAL                           accept
//!            JOIN …             ->                                             join
//! setup      START, DISK, …     -> finds places                               receive
//!            BARRIER            <- HAVE …, ACK
//! rounds     RUN …, BARRIER     -> stores                <- ACK
//! complete   RUN …, BARRIER     -> stores                <- ACK
//!            seals, BARRIER     -> holds what came against the seals
//! handover   PREPARE            -> makes it durable, reads it back
//!                               <- READY: how the storage reads, or FAILED    prepare
//!            COMMIT             -> publishes
//!                               <- COMMITTED                                  commit
//! end        END …, EOF         ->                                            end
//! ```
//!
//! Handlers send; the driver here places barriers, decides what comes next, and rolls back.

mod answers;
mod connect;
mod drive;
mod image;
mod policy;
mod receipt;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use block_mig::Monitor;
use format_spec::Blame;
use format_spec::native::answer::{Published, Ready};
use mig_core::guest::{Guest, GuestError};
use mig_core::meter::Meter;
use mig_core::section::SaveHandler;
use mig_core::stream::{Breaker, Compression, Error, Result};
use mig_core::transport::Dial;

pub use self::image::{SentDisk, SentImage, send_image};
pub use self::policy::{AtRest, Next, Policy, Round};
pub use self::receipt::ExpectedDisk;
use crate::Timing;
use crate::incoming::SessionId;

/// How to send.
#[derive(Clone)]
pub struct OutgoingOptions<'a> {
    /// Equal in every attempt of the same command.
    pub session: SessionId,
    /// Connections wanted; a transport or a destination that has fewer grants fewer.
    pub channels: u16,
    /// What compresses, if the destination knows it.
    pub compression: Option<Compression>,
    /// Whether the destination is asked to keep what arrived for another attempt.
    pub resumes: bool,
    /// Whether what an earlier attempt of this session had prepared is not so any more. A
    /// destination that is ready with it is told to take it back, and the attempt ends with
    /// [`Stale`](Error::Stale).
    pub has_moved_on: bool,
    /// Longest pause of the guest. When it is over and the destination has not answered, the guest
    /// goes on, or, where COMMIT was written, the outcome is unknown.
    pub max_pause: Option<Duration>,
    /// The limit on all connections together.
    pub meter: Arc<Meter>,
    /// Asked now and then whether to stop.
    pub monitor: &'a dyn Monitor,
    /// How patient to be.
    pub timing: Timing,
    /// What is known of the disks, for a destination that says it had finished: something else is
    /// an error then. Nothing is held against anything where it is empty.
    pub expected: Vec<ExpectedDisk>,
}

impl<'a> OutgoingOptions<'a> {
    /// One connection, nothing fancy.
    pub fn new(session: SessionId, monitor: &'a dyn Monitor) -> Self {
        Self {
            session,
            channels: 1,
            compression: None,
            resumes: true,
            has_moved_on: false,
            max_pause: None,
            meter: Arc::default(),
            monitor,
            timing: Timing::default(),
            expected: Vec::new(),
        }
    }
}

/// How a migration ended at the source, if not in an error: then it was rolled back.
#[derive(Debug)]
pub enum Outcome {
    /// The destination has published everything.
    Completed,
    /// It had, before this attempt began, and says what. Nothing was sent.
    AlreadyComplete(Vec<Published>),
    /// Everything was written to a stream that nobody answers on.
    Unconfirmed,
    /// COMMIT had begun to go out, and no answer came. The destination may have published or not;
    /// the guest stays paused; the same session can be asked for again.
    Unknown(Error),
}

/// What was sent, and what became of it.
#[derive(Debug)]
pub struct Sent {
    /// How it ended.
    pub outcome: Outcome,
    /// The destination's program and version; empty on a one-way stream.
    pub peer: String,
    /// Bytes written to all connections.
    pub wire_bytes: u64,
    /// Whether the destination had something from an earlier attempt.
    pub resumed: bool,
    /// How the destination's storage reads back: equal to what was sent. Nothing where nobody
    /// answers, or where no proof was wanted.
    pub confirmed: Option<Ready>,
}

impl Sent {
    /// Nothing new was heard of a session that may have been handed over.
    pub(crate) fn unknown(error: Error) -> Self {
        let outcome = Outcome::Unknown(error);
        Self { outcome, peer: String::new(), wire_bytes: 0, resumed: false, confirmed: None }
    }
}

/// Sends all that `handlers` have to one destination. `guest` is paused for the final pass, and
/// goes on if that fails before the handover.
pub fn send<'a>(
    dial: &dyn Dial,
    handlers: Vec<Box<dyn SaveHandler + 'a>>,
    guest: &mut dyn Guest,
    policy: &mut dyn Policy,
    options: &OutgoingOptions<'_>,
) -> Result<Sent> {
    let breaker = Arc::new(Breaker::new());
    let mut rollback = RollBack { handlers, guest, is_paused: false, is_done: false, stuck: None };
    let result = connect::connect(dial, options, &breaker)
        .and_then(|connected| drive::drive(connected, &mut rollback, policy, options));
    let result = result.map_err(|error| breaker.explain(error));
    breaker.hang_up();
    match result {
        Ok(sent) => {
            rollback.is_done = true;
            Ok(sent)
        }
        Err(error) => {
            rollback.roll_back();
            Err(rollback.explain(error))
        }
    }
}

/// What has to be undone when a migration fails before the handover, also by a panic.
struct RollBack<'g, 'a> {
    handlers: Vec<Box<dyn SaveHandler + 'a>>,
    guest: &'g mut dyn Guest,
    is_paused: bool,
    /// Nothing is left to be undone, or nothing may be.
    is_done: bool,
    /// Why the guest does not go on.
    stuck: Option<GuestError>,
}

impl Drop for RollBack<'_, '_> {
    fn drop(&mut self) {
        self.roll_back();
    }
}

impl RollBack<'_, '_> {
    fn pause(&mut self) -> Result<()> {
        let paused = self.guest.pause();
        paused.map_err(|e| Error::handler(Blame::Device, e))?;
        self.is_paused = true;
        Ok(())
    }

    /// Gives back what was not acknowledged, in reverse order, and lets the guest go on. Once.
    fn roll_back(&mut self) {
        if std::mem::replace(&mut self.is_done, true) {
            return;
        }
        self.handlers.iter_mut().rev().for_each(|handler| handler.abort());
        if self.is_paused
            && let Err(error) = self.guest.resume()
        {
            tracing::error!(%error, "the guest stays paused");
            self.stuck = Some(error);
        }
    }

    /// An error, and that the guest could not go on after it.
    fn explain(&mut self, error: Error) -> Error {
        let Some(stuck) = self.stuck.take() else { return error };
        let why = crate::report::error_chain(&error);
        Error::handler(Blame::Device, format!("{why}; and the guest stays paused: {stuck}"))
    }
}
