//! What every migration handler stands on: the contracts of block devices, bitmap stores and
//! section handlers; streams, channels and barrier; the zero test, the meter.
//!
//! The traits belong to whoever *moves* data: they ask for what a move needs and say nothing of how
//! a device keeps its bytes. No disk format, socket or runtime is known here.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod bitmap;
pub mod block;
pub mod channels;
pub mod dirty;
mod error;
pub mod gate;
pub mod guest;
pub mod heart;
pub mod jobs;
pub mod limits;
pub mod meter;
pub mod section;
pub mod stream;
pub mod transport;

pub use error::{Error, Result};
pub use format_spec::Blame;
