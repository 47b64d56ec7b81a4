//! What can go wrong with an image, whose fault it is, and in which file.

use std::io;
use std::sync::Arc;

use format_spec::{Blame, Malformed};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be read, written, locked or synced.
    #[error("{file}: cannot {action} at offset {offset}")]
    Io {
        /// The file's name.
        file: Arc<str>,
        /// What was tried: "read", "write", "sync", …
        action: &'static str,
        /// Byte offset in the file.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The file could not be opened.
    #[error("cannot open {file}")]
    Open {
        /// The file's name.
        file: Arc<str>,
        /// The system's answer.
        source: io::Error,
    },
    /// The image breaks the format.
    #[error("{file}: {what}")]
    Malformed {
        /// The file's name.
        file: Arc<str>,
        /// Where and how. Part of the message, hence no source: a chain would say it twice.
        what: Malformed,
    },
    /// The image needs something that this crate does not do.
    #[error("{file}: {feature} is not supported")]
    Unsupported {
        /// The file's name.
        file: Arc<str>,
        /// What it needs, in words.
        feature: String,
    },
    /// The image is sound but may not be used this way, for the reason given.
    #[error("{file}: {reason}")]
    Refused {
        /// The file's name.
        file: Arc<str>,
        /// Why, and what to do instead.
        reason: String,
    },
    /// Another process has the image open in a conflicting way.
    #[error("{file} is in use{}", holders_text(.holders))]
    InUse {
        /// The file's name.
        file: Arc<str>,
        /// Who holds it, where that is known, as "name (pid N)".
        holders: Vec<String>,
    },
    /// The image names another file, and the caller did not allow opening it.
    #[error("{file} names the {role} {named:?}, which is not opened unless that is allowed")]
    NotAllowed {
        /// The file's name.
        file: Arc<str>,
        /// "backing file" or "external data file".
        role: &'static str,
        /// The name found in the image.
        named: String,
    },
    /// No bitmap of that name.
    #[error("{file} has no bitmap named {name:?}")]
    NoBitmap {
        /// The file's name.
        file: Arc<str>,
        /// The bitmap's name.
        name: String,
    },
    /// The bitmap cannot be used as asked.
    #[error("{file}: bitmap {name:?} {reason}")]
    Bitmap {
        /// The file's name.
        file: Arc<str>,
        /// The bitmap's name.
        name: String,
        /// Why, as a phrase that follows the name.
        reason: String,
    },
}

fn holders_text(holders: &[String]) -> String {
    if holders.is_empty() { String::new() } else { format!(" by {}", holders.join(", ")) }
}

impl Error {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Io { .. } | Self::Open { .. } | Self::InUse { .. } => Blame::Device,
            Self::Malformed { .. } => Blame::Bytes,
            Self::Unsupported { .. } => Blame::PeerFeatures,
            Self::Refused { .. } | Self::NotAllowed { .. } => Blame::Caller,
            Self::NoBitmap { .. } | Self::Bitmap { .. } => Blame::Caller,
        }
    }
}
