//! When the final pass begins.

use std::time::Duration;

use mig_core::section::Pending;
use mig_core::stream::Result;

/// What happened in one round, and what is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Round {
    /// Counts from 1.
    pub number: u32,
    /// How long it took, all that was waited for included.
    pub took: Duration,
    /// How long it took until all had arrived and was hashed at both ends. Equal to `took` where
    /// that is not told apart from what storage takes.
    pub sending: Duration,
    /// Bytes that it wrote to the connections.
    pub wire_bytes: u64,
    /// How long the barrier behind it, which is durable, was waited for.
    pub settling: Duration,
    /// What an answer takes where nothing is left to be done for it; zero where nobody asked, or
    /// nobody answers.
    pub round_trip: Duration,
    /// What is left, guest running.
    pub pending: Pending,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// One more round, while the guest runs.
    Round,
    /// The same, with the guest slowed down by so many percent.
    Throttle(u8),
    /// Pause the guest and send the rest.
    Complete,
    /// Call it off: it ends as if interrupted. The policy knows why.
    GiveUp,
}

/// Decides when the final pass begins. Never asked while bulk work is left.
pub trait Policy: Send {
    /// What comes next after a round.
    fn next(&mut self, round: &Round) -> Next;

    /// Whether round trips are to be measured: that costs one for each round.
    fn measures(&self) -> bool {
        false
    }

    /// PREPARE is about to be written.
    fn preparing(&mut self) {}

    /// READY has come, so long after PREPARE.
    fn prepared(&mut self, _took: Duration) {}

    /// All was read, and proved where somebody answers: COMMIT comes next. An error calls it off,
    /// and the destination is told why.
    fn committing(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Nothing changes: one round is enough.
#[derive(Debug, Clone, Copy, Default)]
pub struct AtRest;

impl Policy for AtRest {
    fn next(&mut self, _round: &Round) -> Next {
        Next::Complete
    }
}
