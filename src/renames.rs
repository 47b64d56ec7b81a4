//! Bitmaps under the names that this side's user wants.

use crate::Error;
use crate::copy::Rename;

/// New names for the bitmaps of one disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Renames(Vec<Rename>);

impl Renames {
    /// Those that are meant for this disk.
    pub fn of(renames: &[Rename], disk: &str) -> Self {
        let is_for = |rename: &&Rename| rename.node.as_ref().is_none_or(|node| node == disk);
        Self(renames.iter().filter(is_for).cloned().collect())
    }

    /// All of them in words.
    pub(crate) fn text(&self) -> String {
        let one = |rename: &Rename| format!("{:?} as {:?}", rename.old, rename.new);
        self.0.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// What a bitmap is called here that the source calls `sent`.
    pub(crate) fn stored(&self, sent: &str) -> String {
        let found = self.0.iter().find(|rename| rename.old == sent);
        found.map_or(sent, |rename| &rename.new).to_owned()
    }

    /// What the source may have called a bitmap that is stored as `stored`.
    pub(crate) fn sent(&self, stored: &str) -> String {
        let found = self.0.iter().find(|rename| rename.new == stored);
        found.map_or(stored, |rename| &rename.old).to_owned()
    }
}

/// Why a raw image can hold no bitmaps.
pub(crate) const NO_PLACE_IN_RAW: &str = "a raw image has no place for bitmaps";
/// Why an old image can hold none.
pub(crate) const NO_PLACE_IN_VERSION_2: &str =
    "a qcow2 image of version 2 has no place for bitmaps";

/// A bitmap comes for an image that can hold none.
pub(crate) fn no_place(disk: &str, bitmap: &str, why: &str) -> Error {
    Error::WouldLose {
        reason: format!("bitmap {bitmap:?} comes for disk {disk:?}: {why}"),
        hint: "at the source use --bitmaps none, or receive it as qcow2: for a raw disk with \
               bitmaps with -o data_file=FILE,data_file_raw=on"
            .to_owned(),
    }
}
