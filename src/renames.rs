//! Bitmaps under the names that this side's user wants.

use std::collections::BTreeMap;

use crate::copy::Rename;
use crate::incoming::Introduced;
use crate::{Error, Result};

/// New names for the bitmaps of one disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Renames(Vec<Rename>);

impl Renames {
    /// Those that are meant for this disk. What is said of it alone goes before what is said of
    /// all.
    pub fn of(renames: &[Rename], disk: &str) -> Self {
        let is_for = |rename: &&Rename| rename.node.as_ref().is_none_or(|node| node == disk);
        let mut meant: Vec<_> = renames.iter().filter(is_for).cloned().collect();
        meant.sort_by_key(|rename| rename.node.is_none());
        Self(meant)
    }

    /// Refuses two names for one bitmap of the only disk, whatever that is called.
    pub fn check_of_one_disk(renames: &[Rename]) -> Result<()> {
        let any = |rename: &Rename| Rename { node: None, ..rename.clone() };
        Self::check(&renames.iter().map(any).collect::<Vec<_>>())
    }

    /// Refuses two names for one bitmap.
    pub(crate) fn check(renames: &[Rename]) -> Result<()> {
        let mut seen = BTreeMap::new();
        for rename in renames {
            let Rename { node, old, new } = rename;
            if let Some(first) = seen.insert((node, old), new) {
                let of = node.as_ref().map(|node| format!(" of disk {node:?}")).unwrap_or_default();
                let reason =
                    format!("bitmap {old:?}{of} is to be called both {first:?} and {new:?}");
                return Err(Error::Usage { reason });
            }
        }
        Ok(())
    }

    /// Holds the names that are wished for against the bitmaps that come: each of `disks` with what
    /// is wished of its bitmaps. Refuses a new name for what does not come, and one name for two.
    pub(crate) fn check_introduced<'a>(
        disks: impl Iterator<Item = (&'a Self, &'a Introduced)> + Clone,
    ) -> Result<()> {
        for (renames, disk) in disks.clone() {
            let mut stored = BTreeMap::new();
            for (sent, _) in &disk.bitmaps {
                let name = renames.stored(sent);
                if let Some(other) = stored.insert(name.clone(), sent) {
                    let reason = format!(
                        "two bitmaps of disk {:?}, {other:?} and {sent:?}, are both to be called \
                         {name:?}",
                        disk.name
                    );
                    return Err(Error::Usage { reason });
                }
            }
        }
        let wished = disks.clone().flat_map(|(renames, _)| &renames.0);
        let comes = |rename: &Rename| {
            let mut meant = disks.clone().filter(|(renames, _)| renames.0.contains(rename));
            meant.any(|(_, disk)| disk.bitmaps.iter().any(|(name, _)| *name == rename.old))
        };
        match wished.clone().find(|rename| !comes(rename)) {
            None => Ok(()),
            Some(Rename { old, node, .. }) => {
                let of = node.as_ref().map(|node| format!(" of disk {node:?}")).unwrap_or_default();
                let reason = format!("no bitmap {old:?}{of} comes that could be renamed");
                Err(Error::Usage { reason })
            }
        }
    }

    /// Those of bitmaps that are there.
    pub(crate) fn only(self, is_there: impl Fn(&String) -> bool) -> Vec<Rename> {
        self.0.into_iter().filter(|rename| is_there(&rename.old)).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn rename(node: Option<&str>, old: &str, new: &str) -> Rename {
        Rename { node: node.map(str::to_owned), old: old.to_owned(), new: new.to_owned() }
    }

    fn disk(name: &str, bitmaps: &[&str]) -> Introduced {
        let bitmaps = bitmaps.iter().map(|name| ((*name).to_owned(), 65536)).collect();
        Introduced { name: name.to_owned(), bitmaps, content: None }
    }

    fn said(renames: &[Rename], disks: &[Introduced]) -> Option<String> {
        let wished: Vec<_> = disks.iter().map(|disk| Renames::of(renames, &disk.name)).collect();
        let checked = Renames::check_introduced(wished.iter().zip(disks));
        checked.err().map(|error| error.to_string())
    }

    #[test]
    fn one_bitmap_has_one_name() {
        let check = |renames: &[Rename]| Renames::check(renames).err().map(|e| e.exit_status());
        assert_eq!(check(&[rename(None, "a", "b"), rename(None, "b", "a")]), None);
        assert_eq!(check(&[rename(None, "a", "b"), rename(None, "a", "c")]), Some(2));
        assert_eq!(check(&[rename(Some("d"), "a", "b"), rename(Some("d"), "a", "b")]), Some(2));
        // What is said of one disk is an exception to what is said of all.
        let renames = [rename(None, "a", "b"), rename(Some("d"), "a", "c")];
        assert_eq!(check(&renames), None);
        assert_eq!(Renames::of(&renames, "d").stored("a"), "c");
        assert_eq!(Renames::of(&renames, "e").stored("a"), "b");
    }

    #[test]
    fn names_are_held_against_what_comes() {
        let (a, b) = (disk("a", &["x", "y"]), disk("b", &["z"]));
        let disks = [a, b];
        assert_eq!(said(&[rename(None, "x", "y"), rename(None, "y", "x")], &disks), None);
        assert_eq!(said(&[rename(Some("b"), "z", "x")], &disks), None);
        for wrong in [
            vec![rename(None, "x", "y")],
            vec![rename(None, "x", "n"), rename(Some("a"), "y", "n")],
            vec![rename(None, "q", "n")],
            vec![rename(Some("b"), "x", "n")],
        ] {
            assert!(said(&wrong, &disks).is_some(), "{wrong:?}");
        }
    }
}
