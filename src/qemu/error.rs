//! Why a migration from or to QEMU stopped.

use std::io;
use std::path::PathBuf;

use format_spec::{Blame, Malformed};

/// Result of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a migration from or to QEMU stopped.
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
    /// A source went away before it had heard that everything is stored: it goes on with its guest.
    #[error(
        "the source went away before it heard that everything is stored, and goes on with its \
         guest; none of its bitmaps is kept"
    )]
    Left {
        /// How that showed.
        source: io::Error,
    },
    /// The same, and what was stored could not be taken out again.
    #[error(
        "the source does not rely on what is stored, and bitmap {bitmap:?} could not be taken out \
         of {} again: it is stale, remove it before the image is used", .path.display()
    )]
    Stale {
        /// Its name in the image.
        bitmap: String,
        /// The image.
        path: PathBuf,
        /// Why it is still there.
        source: Box<crate::Error>,
    },
    /// What the peer sent is not well formed.
    #[error("the peer's stream is malformed")]
    Malformed(#[from] Malformed),
    /// What the peer sent is well formed and makes no sense now.
    #[error("the peer broke the protocol at stream offset {offset}: {reason}")]
    Protocol {
        /// Where the element or record starts.
        offset: u64,
        /// What it did, with the values.
        reason: String,
    },
    /// The peer uses something that is not supported here.
    #[error("stream offset {offset}: {reason}")]
    Unsupported {
        /// Where it says so.
        offset: u64,
        /// What it is, and how to do without it.
        reason: String,
    },
    /// Something on the wire and this side's disk do not go together.
    #[error("{subject}, stream offset {offset}: {reason}")]
    Misfit {
        /// The disk, and the bitmap if it is about one.
        subject: Subject,
        /// Where the record starts.
        offset: u64,
        /// What does not fit, with both values.
        reason: String,
        /// Whose fault it is.
        blame: Blame,
    },
    /// The peer said that it failed.
    #[error("the peer says that the migration failed: {0}")]
    Peer(String),
    /// The destination, as its monitor describes it, would fail or die of what is to be sent.
    /// Nothing was sent.
    #[error("nothing was sent: {subject}: {reason}")]
    Unfit {
        /// The disk, and the bitmap if it is about one.
        subject: Subject,
        /// What does not fit, and what to do.
        reason: String,
    },
    /// The destination, as its monitor describes it, would fail of any stream of this kind. Nothing
    /// was sent.
    #[error("nothing was sent: {reason}")]
    Unready {
        /// What is in the way, and what to do.
        reason: String,
    },
    /// The peer's monitor could not be asked.
    #[error(transparent)]
    Monitor(#[from] super::qmp::Error),
    /// Something on this side failed: an image, a device, the user's wish.
    #[error(transparent)]
    Local(Box<crate::Error>),
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// What an error is about, by its names on the wire. Never a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The disk.
    pub disk: String,
    /// Its bitmap.
    pub bitmap: Option<String>,
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.bitmap {
            Some(bitmap) => write!(f, "bitmap {bitmap:?} of disk {:?}", self.disk),
            None => write!(f, "disk {:?}", self.disk),
        }
    }
}

impl Error {
    /// What to do about it, where that is not what its blame suggests.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Misfit { blame: Blame::WouldLose, .. } => {
                "nothing was written; change what the message names, then migrate again"
            }
            Self::Misfit { blame: Blame::Bytes, .. } => {
                "the image must be as large as the source's disk: compare `bitferry info` here \
                 with `info block -v` there; if they are, the stream is damaged"
            }
            Self::Misfit { blame: Blame::PeerBehaviour, .. } | Self::Unsupported { .. } => {
                "change at the source what the message names, then migrate again"
            }
            Self::Unfit { .. } => {
                "change at the destination what the message names, then send again"
            }
            Self::Left { .. } => "look at `info migrate` at the source, then migrate again",
            Self::Stale { .. } => "`bitferry bitmap remove` takes it out",
            _ => return None,
        })
    }

    /// The error where the user wanted to stop, and the connection was hung up for it.
    pub(crate) fn when_cancelled(self) -> Self {
        match self {
            Self::Connection { .. } | Self::Peer(_) => Self::Interrupted,
            other => other,
        }
    }

    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Connection { .. } | Self::Left { .. } => Blame::Transport,
            Self::Stale { .. } => Blame::Device,
            Self::Malformed(_) => Blame::Bytes,
            Self::Protocol { .. } | Self::Peer(_) => Blame::PeerBehaviour,
            Self::Unsupported { .. } | Self::Unfit { .. } | Self::Unready { .. } => {
                Blame::PeerFeatures
            }
            Self::Monitor(error) => error.blame(),
            Self::Misfit { blame, .. } => *blame,
            Self::Local(error) => error.blame(),
            Self::Interrupted => Blame::Caller,
        }
    }
}

impl From<crate::Error> for Error {
    fn from(error: crate::Error) -> Self {
        match error {
            crate::Error::Interrupted => Self::Interrupted,
            other => Self::Local(Box::new(other)),
        }
    }
}

impl From<qcow2_file::Error> for Error {
    fn from(error: qcow2_file::Error) -> Self {
        crate::Error::from(error).into()
    }
}

impl From<mig_core::Error> for Error {
    fn from(error: mig_core::Error) -> Self {
        crate::Error::from(error).into()
    }
}
