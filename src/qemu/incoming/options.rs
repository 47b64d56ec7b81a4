//! What a destination is told.

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::copy::{BitmapSelection, Rename};
use crate::options::DiskOption;
use crate::renames::Renames;
use crate::{Error, Result};

/// What arrives where.
#[derive(Debug, Clone, Default)]
pub struct IncomingOptions {
    /// The images that exist and take disks, their bitmaps, or both. The name on the wire is that
    /// of the block backend where there is one, else of the node, or the alias. QEMU's stream says
    /// no sizes: each image must be as large as the source's disk.
    pub disks: Vec<DiskOption>,
    /// Which bitmaps are stored, by their names on the wire. Others are received and dropped.
    pub bitmaps: BitmapSelection,
    /// New names for bitmaps.
    pub renames: Vec<Rename>,
    /// Open backing and data files that images name.
    pub allow_backing: bool,
    /// What is not sent is there already: the source migrates with `inc` (`migrate -i`), which the
    /// stream does not say. Without this each disk must come whole.
    pub shared_base: bool,
    /// Where a bitferry keeps the journals of block devices. What it noted of a disk that is
    /// written here is removed.
    pub device_journals: Option<PathBuf>,
    /// Nothing can be answered: the stream comes from a file or a pipe.
    pub is_one_way: bool,
    /// Where the sections of devices go, which are not understood here. Without it they are
    /// dropped.
    pub devices: Option<DeviceStates>,
}

/// Takes the sections of devices as they came: head, body and footer of each, one after another,
/// byte for byte. [`Decoder`](format_spec::qemu::stream::Decoder) reads them behind the start of a
/// stream.
#[derive(Clone)]
pub struct DeviceStates(Arc<Mutex<dyn Write + Send>>);

impl DeviceStates {
    /// They go to `out`, which may be a file or a buffer that others hold too.
    pub fn new(out: Arc<Mutex<dyn Write + Send>>) -> Self {
        Self(out)
    }

    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes)
    }
}

impl fmt::Debug for DeviceStates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceStates")
    }
}

impl IncomingOptions {
    /// Refuses what contradicts itself.
    pub(super) fn check(&self) -> Result<()> {
        Renames::check(&self.renames)?;
        let usage = |reason| Err(Error::Usage { reason });
        for (index, disk) in self.disks.iter().enumerate() {
            let len = disk.id.len();
            if !(1..=255).contains(&len) {
                return usage(format!("disk name {:?} has {len} bytes, not 1 to 255", disk.id));
            }
            if self.disks.iter().take(index).any(|other| other.id == disk.id) {
                return usage(format!("disk {:?} is named twice", disk.id));
            }
        }
        let nodes = self.renames.iter().filter_map(|rename| rename.node.as_ref());
        let mut unknown = nodes.filter(|node| self.disks.iter().all(|disk| disk.id != **node));
        match unknown.next() {
            Some(node) => {
                usage(format!("a bitmap of disk {node:?} is renamed, which is not named"))
            }
            None => Ok(()),
        }
    }

    /// The name under which a bitmap is stored.
    pub(super) fn new_name<'a>(&'a self, disk: &str, bitmap: &'a str) -> &'a str {
        let fits = |rename: &&Rename| {
            rename.old == bitmap && rename.node.as_deref().is_none_or(|node| node == disk)
        };
        // What is said of this disk alone goes before what is said of all.
        let found = self.renames.iter().filter(fits).min_by_key(|rename| rename.node.is_none());
        found.map_or(bitmap, |rename| &rename.new)
    }

    /// Whether a bitmap is to be stored.
    pub(super) fn wants(&self, bitmap: &str) -> bool {
        match &self.bitmaps {
            BitmapSelection::All => true,
            BitmapSelection::None => false,
            BitmapSelection::Named(names) => names.iter().any(|name| name == bitmap),
        }
    }
}
