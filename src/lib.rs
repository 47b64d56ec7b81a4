//! Move VM disk images with their backup bitmaps: copy them, prove the copy, report honestly.
//!
//! The verbs of the command line are functions here: [`copy::run`] and [`copy::plan`],
//! [`compare::run`], [`hash::run`], [`info::run`], [`inspect::run`], and
//! [`qemu::incoming::run`]. Each takes a plain options struct and, where it
//! takes a while, an [`Observer`]; each returns a value that serialises to the documented JSON.
//! [`report::exit_status`] maps a report to the process's exit status, and [`Error::exit_status`]
//! does it for failures.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod berth;
pub mod bitmap;
mod carry;
pub mod compare;
#[cfg(feature = "net")]
pub mod connect;
pub mod control;
pub mod copy;
mod destinations;
mod disk;
mod error;
pub mod facts;
pub mod hash;
pub mod incoming;
pub mod info;
pub mod inspect;
pub mod live;
mod observe;
pub mod options;
pub mod outgoing;
pub mod policy;
mod preserve;
mod proof;
mod publish;
pub mod qemu;
pub mod receive;
mod reconnect;
mod renames;
pub mod report;
pub mod send;
mod session;
pub mod status;

pub use error::{Error, Result};
pub use format_spec::Blame;
pub use observe::{Observer, Phase, Silent};
pub use preserve::Preserve;
pub use proof::DiskProof;
pub use renames::Renames;
pub use report::{Report, exit_status};
pub use session::{Timing, random_id};
