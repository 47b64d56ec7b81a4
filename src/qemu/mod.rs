//! Migrations from and to QEMU 7.2 to 10.0, in QEMU's own dialect (SPEC 4.2 to 4.4, 7).
//!
//! [`incoming`] is a destination for a stock QEMU. Codecs are in `format_spec::qemu`; here are the
//! rules between records, and what joins them to images.

mod buffer;
mod error;
pub mod incoming;

pub(crate) use buffer::Buffer;
pub use error::{Error, Result, Subject};
