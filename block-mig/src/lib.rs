//! Disks: devices as sources and sinks, the cutting of a disk into units, the copy engine, proof
//! and comparison.
//!
//! A copy is three steps that know nothing of one another: [`plan::Cutter`] turns extents into
//! [`plan::Unit`]s, [`pool`] hands them to workers through a bounded queue, and a worker loads a
//! unit from its source ([`load::Loader`]) and stores it in its sink ([`store::Storer`]). A network
//! may later stand where the queue is.
//!
//! What this crate does not do: decide what may be opened or overwritten, bitmaps, publication.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod arrive;
mod compare;
pub mod device;
mod error;
pub mod fingerprint;
pub mod journal;
mod landing;
pub mod ledger;
pub mod limits;
pub mod load;
#[cfg(test)]
mod memory;
pub mod monitor;
pub mod plan;
pub mod pool;
pub mod proof;
pub mod proven;
pub mod recheck;
pub mod recorded;
pub mod save;
pub mod store;
pub mod tracked;
mod transfer;

pub use arrive::LoadBlocks;
pub use compare::{Difference, first_difference};
pub use error::{Error, Result};
pub use fingerprint::Fingerprint;
pub use journal::Journal;
pub use landing::Landing;
pub use ledger::Ledger;
pub use monitor::{Monitor, Unwatched};
pub use proof::{content_hash, fingerprint_of};
pub use save::{SaveBlocks, SaveDisk, SaveOptions};
pub use tracked::TrackedDisk;
pub use transfer::{TransferOptions, Transferred, transfer};
