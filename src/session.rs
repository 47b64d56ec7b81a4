//! What both sides of a migration share.

use std::time::Duration;

use mig_core::limits;

/// How patient a side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Longest silence before it says that it is still there.
    pub keepalive: Duration,
    /// How long the peer may take to say hello.
    pub hello: Duration,
    /// How long the source may take to open all its connections.
    pub join: Duration,
    /// How long a side that gave up stays, so that its reason is read.
    pub linger: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            keepalive: limits::KEEPALIVE_INTERVAL,
            hello: limits::HELLO_LIMIT,
            join: limits::JOIN_LIMIT,
            linger: limits::LINGER,
        }
    }
}

/// This program, as it calls itself in a hello.
pub(crate) fn program() -> String {
    concat!("bitferry ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// 16 bytes that nobody can guess, for sessions and tickets.
pub fn random_id() -> std::io::Result<[u8; 16]> {
    use std::io::Read as _;
    let mut id = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut id)?;
    Ok(id)
}
