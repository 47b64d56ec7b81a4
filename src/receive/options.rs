//! What to receive, and where.

use format_spec::native::hello::MAX_CHANNELS;

use crate::berth::has_traces;
use crate::copy::{BitmapSelection, Rename};
use crate::options::DiskOption;
use crate::send::check_ids;
use crate::{Error, Result};

/// What to receive, and where.
#[derive(Debug, Clone)]
pub struct ReceiveOptions {
    /// A place for each disk, by its name on the wire.
    pub disks: Vec<DiskOption>,
    /// Data connections that are granted, at most.
    pub max_channels: u16,
    /// Write into images that exist, which is the only way for what QEMU sends.
    pub in_place: bool,
    /// Replace images that exist, at the end, by rename.
    pub replaces: bool,
    /// Begin anew, whatever an earlier run left.
    pub fresh: bool,
    /// Open backing and data files that images name.
    pub allow_backing: bool,
    /// What QEMU does not send is there already: it migrates with `inc` (`migrate -i`).
    pub shared_base: bool,
    /// Which bitmaps of a QEMU are stored.
    pub bitmaps: BitmapSelection,
    /// New names for bitmaps of a QEMU.
    pub renames: Vec<Rename>,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        Self {
            disks: Vec::new(),
            max_channels: MAX_CHANNELS,
            in_place: false,
            replaces: false,
            fresh: false,
            allow_backing: false,
            shared_base: false,
            bitmaps: BitmapSelection::All,
            renames: Vec::new(),
        }
    }
}

impl ReceiveOptions {
    /// What makes no sense is refused before anybody connects.
    pub fn check(&self) -> Result<()> {
        check_ids(&self.disks)?;
        for disk in &self.disks {
            if disk.is_readonly {
                let reason = format!("disk {:?} is read-only: nothing can arrive in it", disk.id);
                return Err(Error::Usage { reason });
            }
            // One that this very migration published may be asked for again.
            let is_free = self.in_place || self.replaces || has_traces(&disk.path)?;
            if !is_free && disk.path.symlink_metadata().is_ok() {
                return Err(Error::Exists { path: disk.path.clone() });
            }
        }
        Ok(())
    }
}
