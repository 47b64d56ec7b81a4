//! What a user can ask of a migration to QEMU.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use mig_core::meter::Meter;

use crate::copy::{BitmapSelection, Format, Rename};
use crate::qemu::Version;

/// A disk that is sent (`--disk ID=PATH`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceDisk {
    /// Its name on the wire, 1 to 255 bytes: with contents, the name of the block backend (`-drive
    /// id=`) that has it at the destination; for bitmaps alone a node name, or an alias of the
    /// destination's `block-bitmap-mapping`, will do.
    pub id: String,
    /// The image. Nobody may write to it meanwhile.
    pub path: PathBuf,
    /// Its format; probed where `None`.
    pub format: Option<Format>,
}

/// What to send to a QEMU, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The disks.
    pub disks: Vec<SourceDisk>,
    /// Open backing and data files that images name.
    pub allow_backing: bool,
    /// What the peer takes; see [`Version::decide`].
    pub version: Version,
    /// Machine type for the configuration section; an empty one fits every destination.
    pub machine: String,
    /// The machine's UUID.
    pub uuid: Option<[u8; 16]>,
    /// Carry disk contents. Only for peers up to QEMU 9.0.
    pub blocks: bool,
    /// Of a disk with a backing file, carry only what stands above it.
    pub shared_base: bool,
    /// Which bitmaps to carry. A name means the bitmaps of that name on all disks.
    pub bitmaps: BitmapSelection,
    /// New names for bitmaps.
    pub renames: Vec<Rename>,
    /// Go on without inconsistent bitmaps.
    pub skip_broken_bitmaps: bool,
    /// The destination's monitor, to ask what became of what was sent.
    pub peer_qmp: Option<PathBuf>,
    /// Whether nothing comes back on the connection.
    pub is_one_way: bool,
    /// Leave out hashes of what is sent.
    pub no_verify: bool,
    /// What limits the bytes of content that are sent.
    pub meter: Arc<Meter>,
    /// Worker threads; by the number of cores where `None`.
    pub workers: Option<NonZeroUsize>,
}

impl Default for Options {
    /// No disks yet; what there is of them is carried to the newest known QEMU but for contents,
    /// which it does not take.
    fn default() -> Self {
        Self {
            disks: Vec::new(),
            allow_backing: false,
            version: Version::NEWEST,
            machine: String::new(),
            uuid: None,
            blocks: false,
            shared_base: false,
            bitmaps: BitmapSelection::All,
            renames: Vec::new(),
            skip_broken_bitmaps: false,
            peer_qmp: None,
            is_one_way: false,
            no_verify: false,
            meter: Arc::default(),
            workers: None,
        }
    }
}
