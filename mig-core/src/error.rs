//! What a device answered when it failed.

use format_spec::Blame;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a device answered when it failed. The cause is kept as a source, never flattened to text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device could not do what was asked.
    #[error("{operation} at offset {offset} failed")]
    Device {
        /// "read", "write", "sync", …
        operation: &'static str,
        /// Byte offset in the virtual disk.
        offset: u64,
        /// Whose fault the cause says it is.
        blame: Blame,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A bitmap store could not do what was asked.
    #[error("bitmap {name:?}: {operation} failed")]
    Bitmap {
        /// "load", "create", "store", …
        operation: &'static str,
        /// The bitmap's name.
        name: String,
        /// Whose fault the cause says it is.
        blame: Blame,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Device { blame, .. } | Self::Bitmap { blame, .. } => *blame,
        }
    }
}
