//! Everything on a destination's disk that outlives a cut: unfinished files, journals, receipts.
//! SPEC 3.1, 9, 10.
//!
//! ```text
//! unfinished   a new raw or qcow2 disk under temporary names, gone on with where it was begun
//! log          the journal beside it, by name
//! receipt      what is left when it was published
//! recover      a publication that a crash interrupted is finished
//! ```

mod log;
mod receipt;
mod recover;
mod sink;
mod unfinished;

pub(crate) use recover::recover;
pub(crate) use unfinished::{NewDisk, NewKind, Unfinished};
