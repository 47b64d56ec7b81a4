//! Where incoming disks go: what the engine asks of whoever owns files, devices or a VMM's disks.
//!
//! ```text
//! begin        what is known of this session: nothing, a part, all of it, that it is finished
//! place        once for each disk, before its content
//! introduced   all disks have a place
//!   Landing    content arrives, durable barriers (block_mig::Landing)
//!   prepare    once for each disk, when all of it has arrived
//! commit       all disks together get their final names
//! abort        or none does
//! ```

use std::sync::Arc;

use bitmap_mig::Bitmap;
use block_mig::Landing;
use format_spec::content_hash::ContentHash;
use format_spec::native::answer::Published;
use format_spec::native::hello::SessionState;
use mig_core::section::Fate;
use mig_core::stream::Result;

use crate::proof::DiskProof;

/// A session: equal in every attempt of the same command.
pub type SessionId = [u8; 16];

/// A disk for which a place is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// Selects among what this side's user configured. Never a path.
    pub name: &'a str,
    /// Guest-visible size in bytes, a multiple of 512.
    pub size: u64,
    /// Whether what is not sent keeps the content that this side has.
    pub keeps_rest: bool,
}

/// A disk that has a place, before any of its content comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Introduced {
    /// Its name on the wire.
    pub name: String,
    /// Its bitmaps, as the source calls them, with their granularities in bytes.
    pub bitmaps: Vec<(String, u32)>,
    /// Bytes of content that come, as far as the source knows that from its maps; `None` where it
    /// does not say.
    pub content: Option<u64>,
}

/// What the source says of a disk that arrived whole.
#[derive(Debug, Clone)]
pub struct Sealed {
    /// The content hash; `None` where the source's user wanted no proof.
    pub content: Option<ContentHash>,
    /// Its bitmaps, equal to their seals, in the order of their numbers, under the names that they
    /// are stored by. Not stored anywhere yet.
    pub bitmaps: Vec<Bitmap>,
}

/// The place of one disk.
pub trait Place: Landing {
    /// The name under which a bitmap is stored here that the source calls `sent`. An error where
    /// this place can hold none: asked as soon as the source introduces it.
    fn bitmap_name(&self, sent: &str) -> Result<String> {
        Ok(sent.to_owned())
    }

    /// All has arrived and was sealed. Stores the bitmaps, makes everything durable under temporary
    /// names and, where the seal has a hash, reads it back as anybody would and answers with what
    /// was read; an error where that differs from the seal. Whoever keeps a journal writes durably
    /// that the disk is prepared.
    ///
    /// In a session whose state was READY nothing was sent: the place answers with what it prepared
    /// then, or fails where the seal does not agree with it.
    fn prepare(&self, sealed: &Sealed) -> Result<Option<DiskProof>>;
}

/// All places of one destination.
pub trait Destination: Send + Sync {
    /// What is known of this session. Called once, before the source is answered. With
    /// [`SessionState::Fresh`] nothing of an earlier attempt is left.
    fn begin(&self, session: SessionId) -> Result<SessionState>;

    /// The source hears no answers and sends everything again: what
    /// [`begin`](Destination::begin) found unfinished is not gone on with, as if it had answered
    /// [`SessionState::Fresh`]. Nothing to do for whoever keeps nothing.
    fn forget(&self) -> Result<()> {
        Ok(())
    }

    /// What was published of each disk, where [`begin`](Destination::begin) has answered
    /// [`SessionState::Committed`]: what the receipts say, for the source to hold against what it
    /// has. Nothing to do for whoever keeps no receipts.
    fn published(&self) -> Result<Vec<Published>> {
        Ok(Vec::new())
    }

    /// Finds or makes the place of a disk, at least as large as wanted.
    fn place(&self, wanted: &Wanted<'_>) -> Result<Arc<dyn Place>>;

    /// The source has introduced all its disks and the bitmaps that they have so far, and no
    /// content has come: an error where a disk is missing that this side's user named, and
    /// whatever else can be known to go wrong. Nothing to do for whoever takes what comes.
    fn introduced(&self, _disks: &[Introduced]) -> Result<()> {
        Ok(())
    }

    /// The source has let go: gives all places their final names, writes receipts. On return it is
    /// durable. After a crash in the middle it can be finished.
    fn commit(&self) -> Result<()>;

    /// The session ended before [`commit`](Destination::commit) was called.
    fn abort(&self, fate: Fate);
}
