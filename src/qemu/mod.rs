//! Migrations from and to QEMU 7.2 to 10.0, in QEMU's own dialect (SPEC 4.2 to 4.4, 7).
//!
//! [`incoming`] is a destination for a stock QEMU, [`outgoing`] a source. Codecs are in
//! `format_spec::qemu`; here are the rules between records, and what joins them to images.
//! [`peer`] asks a QEMU's monitor what became of what was sent.

mod bitmap_hash;
mod buffer;
mod error;
pub mod incoming;
pub mod outgoing;
pub mod peer;
pub mod qmp;
mod version;

pub use bitmap_hash::bitmap_sha256;
pub(crate) use buffer::Buffer;
pub use error::{Error, Result, Subject};
pub use version::Version;
