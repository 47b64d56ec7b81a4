//! Named dirty bitmaps: in memory, their digest, which of them are carried under which name, and
//! where they come from and go to.
//!
//! On a wire: [`SaveBitmaps`] and [`LoadBitmaps`].
//!
//! What this crate does not do: read or write guest data, decide what happens to a disk.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod arrive;
mod image_store;
pub mod live;
mod named;
mod running_digest;
mod save;
pub mod select;

pub use arrive::{ArrivedBitmap, KeptBitmaps, LoadBitmaps, MAX_BITMAPS};
pub use image_store::ImageBitmaps;
pub use live::LiveBitmaps;
pub use named::{Bitmap, load, summary};
pub use save::{SaveBitmap, SaveBitmaps};
pub use select::{Choice, Decision, Fate, Holder, Problem, Rename, Wanted, Wish, decide};
