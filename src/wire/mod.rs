//! Disks and bitmaps at rest over a connection, in the native dialect (SPEC 4.1, 5, 6, 9).
//!
//! [`Outgoing`] is the source, [`Incoming`] the destination; their phases have the same names and
//! mirror each other. Both are blocking, on one connection, and know nothing of files: disks come
//! and go as [`BlockSource`](mig_core::block::BlockSource) and
//! [`BlockSink`](mig_core::block::BlockSink), bitmaps as values.
//!
//! ```text
//! source                           destination
//! connect   OFFER               ->
//!                               <- CHOICE or REFUSAL                              accept
//! transfer  DISK, RUN, …        -> writes, hashes                               transfer
//!           BITMAP_SEAL, …      -> holds what arrived against the seals
//!           END, PREPARE        -> makes it durable, reads it back
//! prepare                       <- READY: how the storage reads back, or FAILED  prepare
//! commit    COMMIT              -> publishes
//!                               <- COMMITTED                                      commit
//! ```
//!
//! The source compares READY with its own hashes before it says COMMIT, so that nothing gets its
//! final name that was not seen to be equal. One section of each kind follows the other directly;
//! the container around them (SPEC 4.2) is not spoken yet.

mod error;
mod image;
mod incoming;
mod landing;
mod outgoing;

mod records;
#[cfg(test)]
mod tests;

pub use crate::proof::DiskProof;
pub use error::{Error, Result};
pub use image::{SentImage, receive_image, send_image};
pub use incoming::{Arrived, Incoming, Place};
pub use outgoing::{Outgoing, OutgoingDisk, Sent};

/// This program, as it calls itself in a hello.
fn program() -> String {
    concat!("bitferry ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// 16 bytes that nobody can guess, for sessions and tickets.
pub fn random_id() -> std::io::Result<[u8; 16]> {
    use std::io::Read as _;
    let mut id = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut id)?;
    Ok(id)
}

fn no_random(source: std::io::Error) -> crate::Error {
    crate::Error::File { action: "read", path: "/dev/urandom".into(), source }
}
