//! Talking to a running migration: one JSON command per line over a UNIX socket, in QEMU's words.
//!
//! ```text
//! {"execute": "query-migrate"}
//! {"return": {"status": "active", …}}
//! {"execute": "migrate-set-parameters", "arguments": {"downtime-limit": 100}, "id": 7}
//! {"return": {}, "id": 7}
//! {"execute": "dance"}
//! {"error": {"class": "CommandNotFound", "desc": "…"}}
//! ```
//!
//! There is no greeting; `qmp_capabilities` is taken and does nothing, so that a client of QEMU's
//! monitor need not be told apart.

mod client;
mod commands;
mod server;
mod supervised;
#[cfg(test)]
mod tests;

pub use client::{ask, value_of};
pub use commands::{Controlled, Refused};
pub use server::Server;
pub use supervised::{Metered, Supervised};

/// Longest command line, in bytes.
pub const MAX_LINE: usize = 64 << 10;
/// Connections at the same time; further ones are told so and closed.
pub const MAX_CONNECTIONS: usize = 8;
/// Longest pause of a guest that may be allowed, in milliseconds: as in QEMU.
pub const MAX_DOWNTIME_MS: u64 = 2_000_000;
