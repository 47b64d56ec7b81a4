//! The qcow2 file as a whole: header and extensions, map, allocator and refcounts, writers and
//! persistent bitmaps, with locks that QEMU respects. Panic-free on any input.
//!
//! What this crate does not do: format probing by content on its own account, encryption, growing
//! or shrinking a disk, reading internal snapshots. It opens no file whose name it found inside an
//! image unless its caller allowed that.
//!
//! Layout questions are answered by the published qcow2 specification; doc comments cite it as
//! "qcow2 spec".
#![cfg_attr(
    not(test),
    deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used, clippy::panic)
)]

pub mod allocate;
pub mod bitmaps;
pub mod chain;
pub mod check;
pub mod create;
pub mod edit;
pub mod error;
pub mod guard;
pub mod image;
pub mod layout;
pub mod limits;
pub mod lock;
pub mod preflight;
pub mod storage;
mod zeroes;

pub use chain::{Chain, ChainExtent, ChainKind, Format, Layer, Opener};
pub use error::{Error, Result};
pub use guard::Guard;
pub use image::{Image, LayerExtent, LayerKind};
pub use layout::units::{GuestOffset, HostOffset};
pub use storage::{Access, HostFile, Memory, Storage};

/// A length or index within what is held in memory, whose bounds were checked in 64 bits.
pub(crate) fn in_memory(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}
