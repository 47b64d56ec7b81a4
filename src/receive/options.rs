//! What to receive, and where.

use format_spec::native::hello::MAX_CHANNELS;

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
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        Self { disks: Vec::new(), max_channels: MAX_CHANNELS }
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
            if disk.path.symlink_metadata().is_ok() {
                return Err(Error::Exists { path: disk.path.clone() });
            }
        }
        Ok(())
    }
}
