//! A block device as what a journal and a receipt belong to.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use rustix::fs::{major, minor};

/// A block device. Its number goes to another one when the machine starts anew, or when it is taken
/// down and another is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device {
    major: u32,
    minor: u32,
}

impl Device {
    /// The one that was found, if it is one.
    pub(crate) fn of(found: &Metadata) -> Option<Self> {
        let number = found.rdev();
        let is_one = found.file_type().is_block_device();
        is_one.then(|| Self { major: major(number), minor: minor(number) })
    }

    /// What its journal is named after: one device has one, by whatever path it is opened.
    pub(crate) fn file_name(&self) -> String {
        format!("block-{}:{}", self.major, self.minor)
    }

    /// What no other device was or will be called, of this machine or another: which start of the
    /// machine, and which of its disks since. `None` where the kernel does not say. See
    /// `Documentation/ABI/stable/sysfs-block`, `diskseq`.
    pub(crate) fn incarnation(&self) -> Option<String> {
        let directory = PathBuf::from(format!("/sys/dev/block/{}:{}", self.major, self.minor));
        let read = |path: PathBuf| fs::read_to_string(path).ok();
        // A partition lies in the directory of its disk, which is another path once links are
        // followed.
        let own = read(directory.join("diskseq"));
        let number =
            own.or_else(|| read(fs::canonicalize(&directory).ok()?.parent()?.join("diskseq")));
        let start = read("/proc/sys/kernel/random/boot_id".into());
        Some(format!("device {} of {}", number?.trim(), start?.trim()))
    }
}
