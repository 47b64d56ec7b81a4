//! Pure codecs and arithmetic of the formats that bitferry reads and writes.
//!
//! Nothing here waits, opens a file, reads a clock or starts a thread, and no length found in the
//! input is allocated before it has met a constant. The normative text is `SPEC.md` beside this
//! crate; each module names its chapter.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic
    )
)]

mod blame;
pub mod content_hash;
mod cursor;
pub mod files;
mod malformed;
pub mod native;
pub mod qemu;

pub use blame::Blame;
pub use cursor::{Reader, Writer};
pub use malformed::{Malformed, Problem};
