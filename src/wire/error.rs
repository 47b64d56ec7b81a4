//! Why a transfer over a connection stopped.

use std::io;

use format_spec::{Blame, Malformed};

/// Result of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a transfer over a connection stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The connection failed or ended early.
    #[error("cannot {action} the connection at stream offset {offset}")]
    Connection {
        /// "read from", "write to".
        action: &'static str,
        /// Bytes that had passed in that direction.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// What the peer sent is not well formed.
    #[error("the peer's stream is malformed")]
    Malformed(#[from] Malformed),
    /// What the peer sent is well formed and makes no sense now.
    #[error("the peer broke the protocol at stream offset {offset}: {reason}")]
    Protocol {
        /// Where the record's body starts.
        offset: u64,
        /// What it did, with the values.
        reason: String,
    },
    /// The peer refused or failed, and said so.
    #[error("the peer says: {text}")]
    Peer {
        /// Whose fault the peer says it is.
        blame: Blame,
        /// Its own words.
        text: String,
    },
    /// A disk on this side failed.
    #[error(transparent)]
    Disk(#[from] block_mig::Error),
    /// There is no place for a disk on this side.
    #[error(transparent)]
    Place(Box<crate::Error>),
    /// What was given to be sent cannot be.
    #[error("{0}")]
    Unsendable(String),
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Connection { .. } => Blame::Transport,
            Self::Malformed(_) => Blame::Bytes,
            Self::Protocol { .. } => Blame::PeerBehaviour,
            // The peer's own device or usage is, from here, a failed peer.
            Self::Peer { .. } => Blame::PeerBehaviour,
            Self::Disk(error) => error.blame(),
            Self::Place(error) => error.blame(),
            Self::Unsendable(_) | Self::Interrupted => Blame::Caller,
        }
    }
}
