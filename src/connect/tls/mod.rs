//! TLS 1.3 with a certificate on both sides, the same on every connection of a migration.
//!
//! The handshake is asynchronous, because a listener has many at once; afterwards the connection is
//! a blocking reader and a blocking writer ([`stream`]) like any other.

mod error;
mod files;
mod handshake;
mod named;
mod stream;

pub use error::TlsError;
pub use files::Tls;
pub(super) use handshake::{accept, connect};
pub(super) use stream::split;
