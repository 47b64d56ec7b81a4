//! Why a stream between two sides stopped.

use std::io;

use format_spec::{Blame, Malformed};

/// Result of stream code.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a stream between two sides stopped. The first error wins; what other threads run into when
/// the connections are hung up is not told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A connection failed or ended early.
    #[error("cannot {action} connection {channel} at stream offset {offset}")]
    Connection {
        /// "read from", "write to".
        action: &'static str,
        /// Which connection: 0 is main.
        channel: u16,
        /// Bytes that had passed in that direction.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// No connection could be made.
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    /// What the peer sent is not well formed.
    #[error("the peer's stream on connection {channel} is malformed")]
    Malformed {
        /// Which connection: 0 is main.
        channel: u16,
        /// Where and what.
        source: Malformed,
    },
    /// What the peer sent is well formed and makes no sense now.
    #[error(
        "the peer broke the protocol at stream offset {offset} of connection {channel}: {reason}"
    )]
    Protocol {
        /// Which connection: 0 is main.
        channel: u16,
        /// Where the record's body or the element starts.
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
    /// What the destination reads back is not what was sent.
    #[error("the destination does not read back as what was sent: {reason}")]
    Mismatch {
        /// Both hashes.
        reason: String,
    },
    /// What should be a migration's first connection is a further one of a migration that is over.
    #[error("a further connection of a migration that is over came first")]
    Stray,
    /// The destination is ready with what an earlier attempt had sent, which is not so any more. It
    /// was told to take that back: the next attempt goes on with what it has.
    #[error("the destination is ready with what has changed since")]
    Stale,
    /// A handler or a device on this side failed.
    #[error(transparent)]
    Handler(#[from] HandlerError),
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// Another thread of the session failed first; its error is the one to report.
    #[error("the session has ended")]
    Ended,
}

/// What a handler or a device on this side ran into. Shows itself as its cause does.
#[derive(Debug)]
pub struct HandlerError {
    /// Whose fault it is.
    pub blame: Blame,
    /// The cause.
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

impl std::fmt::Display for HandlerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.cause.fmt(f)
    }
}

impl std::error::Error for HandlerError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.source()
    }
}

impl Error {
    /// What a handler's own error becomes.
    pub fn handler(
        blame: Blame,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Handler(HandlerError { blame, cause: cause.into() })
    }

    /// Well-formed bytes that make no sense now.
    pub fn protocol(channel: u16, offset: u64, reason: impl Into<String>) -> Self {
        Self::Protocol { channel, offset, reason: reason.into() }
    }

    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Connection { .. } | Self::Connect(_) | Self::Ended | Self::Stale => {
                Blame::Transport
            }
            Self::Malformed { .. } => Blame::Bytes,
            Self::Protocol { .. } | Self::Stray => Blame::PeerBehaviour,
            // What it lost or read back wrong we lose too.
            Self::Peer { blame: blame @ (Blame::WouldLose | Blame::Mismatch), .. } => *blame,
            // The peer's own device or usage is, from here, a failed peer.
            Self::Peer { .. } => Blame::PeerBehaviour,
            Self::Handler(error) => error.blame,
            Self::Mismatch { .. } => Blame::Mismatch,
            Self::Interrupted => Blame::Caller,
        }
    }

    /// Where in the peer's stream, where that is known: what FAILED says.
    pub fn stream_offset(&self) -> Option<u64> {
        match self {
            Self::Connection { offset, .. } | Self::Protocol { offset, .. } => Some(*offset),
            Self::Malformed { source, .. } => Some(source.offset),
            _ => None,
        }
    }

    /// Whether it is only what follows from another error or from a connection that ended.
    pub fn is_secondary(&self) -> bool {
        matches!(self, Self::Ended | Self::Connection { .. })
    }
}

impl From<crate::Error> for Error {
    fn from(error: crate::Error) -> Self {
        Self::handler(error.blame(), error)
    }
}
