#![doc = include_str!("../README.md")]
//!
//! ## Where to begin
//!
//! | to | use |
//! |---|---|
//! | read a disk, with everything below it | [`Opener`], [`Chain`] |
//! | read one layer from any [`Storage`] | [`Image`] |
//! | make an image | [`create::NewImage`] |
//! | change one in place | [`edit::Editor`] |
//! | look at bitmaps, and change them | [`bitmaps::Bitmaps`], [`bitmaps::BitmapEditor`] |
//! | keep bitmaps right while something else writes | [`Guard`] |
//! | check, and give leaks back | [`check::check`], [`check::reclaim`] |
//! | take bytes apart | [`layout`], [`preflight::read_header`] |
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
mod first_failure;
pub mod guard;
pub mod image;
pub mod layout;
pub mod limits;
pub mod lock;
pub mod preflight;
pub mod storage;
mod zeroes;

pub use chain::{Chain, ChainExtent, ChainKind, Format, Layer, Opener};
pub use error::{Condition, Error, Result};
pub use guard::Guard;
pub use image::{Image, LayerExtent, LayerKind};
pub use layout::units::{GuestOffset, HostOffset};
pub use storage::{Access, HostFile, Memory, Storage};

/// A length or index within what is held in memory, whose bounds were checked in 64 bits.
pub(crate) fn in_memory(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}
