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
    /// The image is in a condition in which this is not done to it.
    #[error("{file}: {condition}")]
    Condition {
        /// The file's name.
        file: Arc<str>,
        /// What is wrong with it.
        condition: Condition,
    },
    /// The file has a format that is not read here, by its content.
    #[error("{file} looks like {format}, which is not supported")]
    Foreign {
        /// The file's name.
        file: Arc<str>,
        /// QEMU's name of that format.
        format: &'static str,
    },
    /// The image names another file, but not by a path.
    #[error("{file} names the {role} {named:?}, which is not a plain path")]
    NotAPath {
        /// The file's name.
        file: Arc<str>,
        /// "backing file" or "external data file".
        role: &'static str,
        /// The name found in the image.
        named: String,
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
            Self::Condition { condition, .. } => condition.blame(),
            Self::Unsupported { .. } | Self::Foreign { .. } | Self::NotAPath { .. } => {
                Blame::PeerFeatures
            }
            Self::Refused { .. } | Self::NotAllowed { .. } => Blame::Caller,
            Self::NoBitmap { .. } | Self::Bitmap { .. } => Blame::Caller,
        }
    }
}

/// What is wrong with an image, as a phrase that follows its name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Condition {
    /// Whoever wrote to it last did not close it.
    #[error("was not closed properly, so its refcounts may be out of date")]
    NotClosed,
    /// Somebody marked it as corrupt.
    #[error("is marked corrupt and is not written to")]
    MarkedCorrupt,
    /// It was found to be corrupt, in the way that is said.
    #[error("is corrupt{0}")]
    Corrupt(String),
    /// It holds an in-place copy that was not finished (SPEC 3.3).
    #[error(
        "an in-place copy into this image was not finished, so its content is partly old and \
         partly new"
    )]
    UnfinishedCopy,
    /// The content of a bitmap was not saved.
    #[error("bitmap {0:?} was not saved (in use), so its content is not to be trusted")]
    InconsistentBitmap(String),
    /// Nothing in it is qcow2.
    #[error("holds no qcow2 image")]
    NoImage,
    /// One file stands in two places of one disk.
    #[error("occurs twice among the files of one disk")]
    Circle,
}

impl Condition {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::NotClosed
            | Self::UnfinishedCopy
            | Self::InconsistentBitmap(_)
            | Self::NoImage => Blame::Device,
            Self::MarkedCorrupt | Self::Corrupt(_) | Self::Circle => Blame::Bytes,
        }
    }

    /// What makes it right, as one sentence about `file`.
    pub fn remedy(&self, file: &str) -> String {
        match self {
            Self::NotClosed | Self::MarkedCorrupt | Self::Corrupt(_) => {
                format!("repair it with `qemu-img check -r all {file}`")
            }
            Self::UnfinishedCopy => format!(
                "give the command of that copy again, or take the content as it is: \
                 `bitferry bitmap repair --clear-unfinished {file}`"
            ),
            Self::InconsistentBitmap(_) => {
                format!("`bitferry bitmap repair --remove-inconsistent {file}` removes it")
            }
            Self::NoImage => {
                format!("`qemu-img create -f qcow2 {file} SIZE` makes one of the source's size")
            }
            Self::Circle => format!(
                "`qemu-img rebase -u -b BACKING -F FORMAT {file}` names another backing file"
            ),
        }
    }
}

impl Error {
    /// An image in a condition in which something is not done to it.
    pub(crate) fn condition(file: Arc<str>, condition: Condition) -> Self {
        Self::Condition { file, condition }
    }
}
