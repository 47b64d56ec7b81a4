//! Disks that a guest writes to, migrated while it does.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use bitferry::live::Outgoing;
//! # fn example(
//! #     vda: Arc<dyn block_mig::tracked::LiveSource>, bitmaps: Arc<bitmap_mig::LiveBitmaps>,
//! #     my_device: impl Fn() -> Box<dyn mig_core::section::SaveHandler> + Sync + 'static,
//! #     dial: &dyn mig_core::transport::Dial, guest: &mut dyn mig_core::guest::Guest,
//! # ) -> bitferry::Result<()> {
//! let report = Outgoing::builder()
//!     .disk("vda", vda, bitmaps)
//!     .state(my_device)
//!     .channels(4)
//!     .build()?
//!     .run(dial, guest)?;
//! println!("the guest was paused for {:?}", report.downtime);
//! # Ok(()) }
//! ```
//!
//! Rounds follow one another while the guest runs: everything, then what changed meanwhile, until
//! what is left fits into the pause that is allowed ([`crate::policy`]). Bitmaps go along in each
//! round. Then the guest is paused, the rest is sent, both sides hold their hashes against each
//! other, and the destination takes over. Whatever fails before that leaves the guest running here,
//! its bitmaps right.

mod builder;
mod image;
mod moving;
mod paused;
mod qemu;
mod run;
mod steering;
#[cfg(test)]
mod tests;
mod unsettled;

use std::time::Duration;

use crate::incoming::SessionId;
use crate::outgoing::Sent;

pub use builder::{Builder, Outgoing};
pub use image::LiveImage;
pub use qemu::QemuTarget;

/// What became of a migration that was not rolled back.
#[derive(Debug)]
pub struct Report {
    /// How it ended, and what the destination said. With
    /// [`Unknown`](crate::outgoing::Outcome::Unknown) the guest stays paused.
    pub sent: Sent,
    /// The session to ask for again. Not the one that was given where a connection was lost when
    /// the destination may have been ready, since the guest has gone on after that.
    pub session: SessionId,
    /// How long the guest was paused, from the call to pause it until the destination had answered
    /// that it has taken over.
    pub downtime: Duration,
    /// Passes over what changed, the first one over everything included.
    pub passes: u32,
    /// How often the connection was lost and made again.
    pub reconnects: u32,
    /// What went over the wire, for each disk.
    pub disks: Vec<DiskReport>,
}

/// What went over the wire for one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskReport {
    /// Its name on the wire.
    pub name: String,
    /// Bytes of content sent, repeated ones included.
    pub bytes_data: u64,
    /// Bytes of content sent because the guest had changed them.
    pub bytes_repeated: u64,
    /// Bytes sent as runs of zeroes.
    pub bytes_zero: u64,
}
