//! Everything on a destination's disk that outlives a cut: unfinished files, journals, receipts.
//! SPEC 3.1, 9, 10.
//!
//! ```text
//! unfinished   a new raw or qcow2 disk under temporary names, gone on with where it was begun
//! kept         the journal of a disk that is written in place
//! log          the journal beside it, by name
//! base         what a new disk stands on
//! device       what the journal of a block device is named after
//! receipt      what is left when it was published
//! room         whether what is to come fits
//! recover      a publication that a crash interrupted is finished
//! trace        what is answered to a source because of what lies there
//! proved       whether what was proved is still as it was
//! prover       what has arrived is read back while more arrives
//! files        all of it as what a migration arrives at, disk by disk (place)
//! ```

mod base;
mod device;
mod files;
mod kept;
mod log;
mod place;
mod proved;
mod prover;
mod receipt;
mod recover;
pub(crate) mod room;
mod sink;
mod size;
#[cfg(test)]
mod tests;
mod trace;
mod unfinished;

pub use base::Base;
pub(crate) use device::change_unseen;
pub use files::{DiskPlace, FileOptions, Files};
pub(crate) use files::{all_came, gone, no_place};
pub(crate) use kept::{Kept, log_of};
pub(crate) use log::{Log, has_traces};
pub(crate) use prover::{Finds, Prover};
pub(crate) use receipt::{Receipt, ReceiptBitmap};
pub(crate) use recover::{Half, Recovered, recover};
pub(crate) use sink::Closed;
pub(crate) use trace::{Trace, state};
pub(crate) use unfinished::{NewDisk, NewKind, Unfinished, publish_together, short_words};
