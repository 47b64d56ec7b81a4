//! Why a transfer stopped.

use format_spec::Blame;
use format_spec::content_hash::{HashError, Missing};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a transfer stopped. The first error wins; what other workers ran into is not told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The disk that is read failed.
    #[error("cannot read the source")]
    Source(#[source] mig_core::Error),
    /// The disk that is written failed.
    #[error("cannot write the destination")]
    Sink(#[source] mig_core::Error),
    /// Sizes do not fit.
    #[error("a disk of {source_bytes} bytes does not fit one of {sink_bytes} bytes")]
    Size {
        /// Size of what is read.
        source_bytes: u64,
        /// Size of what is written.
        sink_bytes: u64,
    },
    /// The content hash could not be computed.
    #[error(transparent)]
    Hash(#[from] HashError),
    /// The temporary file of a ledger failed.
    #[error("cannot {action} the temporary file that holds the hashes of a disk")]
    Ledger {
        /// "create", "read", "write".
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The journal of a destination failed.
    #[error("cannot {action} the journal")]
    Journal {
        /// "read", "write", "sync", …
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The stream to or from the other side stopped.
    #[error(transparent)]
    Stream(#[from] mig_core::stream::Error),
    /// The monitor asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl From<Error> for mig_core::stream::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Stream(error) => error,
            Error::Cancelled => Self::Interrupted,
            other => Self::handler(other.blame(), other),
        }
    }
}

impl From<Missing> for Error {
    fn from(missing: Missing) -> Self {
        Self::Hash(missing.into())
    }
}

impl Error {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Source(e) | Self::Sink(e) => e.blame(),
            Self::Ledger { .. } | Self::Journal { .. } => Blame::Device,
            Self::Stream(e) => e.blame(),
            Self::Size { .. } | Self::Hash(_) | Self::Cancelled => Blame::Caller,
        }
    }
}
