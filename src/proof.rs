//! What both sides compare before anything is published.

use format_spec::content_hash::{BitmapDigest, ContentHash};

/// A disk as hashes. At the source: what was sent. At the destination: what the storage reads back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskProof {
    /// What a guest reads; `None` where no content was sent, and nobody has looked.
    pub content: Option<ContentHash>,
    /// The bits of each bitmap, in the order in which they were sent.
    pub bitmaps: Vec<BitmapDigest>,
}
