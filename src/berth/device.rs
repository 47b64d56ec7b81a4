//! A block device as what a journal belongs to.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{major, minor};

/// A block device. Its number goes to another one when the machine starts anew, or when it is taken
/// down and another is made: what is noted of it is read again before it is believed.
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
}

/// Whether what these files hold can change without a word in their own attributes: one of them is
/// a device, to which there are other ways, or cannot be looked at.
pub(crate) fn change_unseen<P: AsRef<Path>>(files: impl IntoIterator<Item = P>) -> bool {
    let is_file = |path: P| std::fs::metadata(path).is_ok_and(|found| found.is_file());
    !files.into_iter().all(is_file)
}
