//! What to send, and how.

use std::sync::Arc;
use std::time::Duration;

use mig_core::meter::Meter;
use mig_core::stream::Compression;

use crate::copy::{BitmapSelection, Rename};
use crate::options::DiskOption;

/// What to send, and how.
#[derive(Debug, Clone)]
pub struct SendOptions {
    /// The disks, each with the name that the destination knows it by.
    pub disks: Vec<DiskOption>,
    /// Send contents. Without them bitmaps alone travel, to a destination that has the same disks
    /// by another way.
    pub blocks: bool,
    /// Send of disks with a backing file what their own image holds alone: the destination makes
    /// images on a backing file of its own, which reads as ours.
    pub shared_base: bool,
    /// Open backing and data files that the images name, and read through them.
    pub allow_backing: bool,
    /// Which bitmaps to carry. A name must be on one of the disks at least.
    pub bitmaps: BitmapSelection,
    /// New names for bitmaps; without a node for all disks that have one of that name.
    pub renames: Vec<Rename>,
    /// Why the destination can hold no bitmaps, where that is known.
    pub cannot_hold: Option<String>,
    /// Go on without inconsistent bitmaps.
    pub skip_broken_bitmaps: bool,
    /// Leave out the proof.
    pub no_verify: bool,
    /// Where they go, as the user says it: with it a later run finds its session again. Empty for a
    /// session that nobody finds again.
    pub destination: String,
    /// Begin anew, whatever an earlier run left at the destination.
    pub fresh: bool,
    /// Data connections.
    pub channels: u16,
    /// Compression on the wire.
    pub compression: Option<Compression>,
    /// What limits all connections together.
    pub meter: Arc<Meter>,
    /// How long a cut is waited for before giving up; connected again, it goes on where it was.
    pub reconnect: Duration,
}

impl SendOptions {
    /// What tells this command from one that sends something else of the same disks.
    pub(super) fn verb(&self) -> String {
        let verb = match (self.blocks, self.shared_base) {
            (false, _) => "send bitmaps alone",
            (true, true) => "send above the base",
            (true, false) => "send",
        };
        verb.to_owned()
    }
}

impl Default for SendOptions {
    fn default() -> Self {
        Self {
            disks: Vec::new(),
            blocks: true,
            shared_base: false,
            allow_backing: false,
            bitmaps: BitmapSelection::All,
            renames: Vec::new(),
            cannot_hold: None,
            skip_broken_bitmaps: false,
            no_verify: false,
            destination: String::new(),
            fresh: false,
            channels: 1,
            compression: None,
            meter: Arc::default(),
            reconnect: Duration::ZERO,
        }
    }
}
