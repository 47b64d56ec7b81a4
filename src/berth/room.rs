//! Whether what is to come has room, as far as its source says how much it is.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::copy::space::free_bytes;
use crate::publish::{self, directory};
use crate::{Error, Result};

/// What goes into one file.
#[derive(Debug, Clone)]
pub(crate) struct Need {
    /// The file.
    path: PathBuf,
    /// Bytes that it takes.
    bytes: u64,
    /// Bytes that are taken for it already, and free again where others take their place.
    held: u64,
}

impl Need {
    /// Into a new file that will have this name.
    pub(super) fn of_new(target: &Path, bytes: u64) -> Self {
        let path = publish::followed(target).unwrap_or_else(|_| target.to_owned());
        Self { path, bytes, held: publish::left_bytes(target) }
    }

    /// Into a file that exists. Devices have all that they need.
    pub(crate) fn of_existing(path: &Path, bytes: u64) -> Self {
        let file = fs::metadata(path).ok().filter(fs::Metadata::is_file);
        let held = file.map_or(bytes, |file| file.blocks().saturating_mul(512));
        Self { path: path.to_owned(), bytes: bytes.saturating_sub(held), held: 0 }
    }
}

/// Refuses what has no room: on each file system all of it together.
pub(crate) fn check(needs: impl Iterator<Item = Need>) -> Result<()> {
    let mut by_system: BTreeMap<u64, (PathBuf, u64, u64)> = BTreeMap::new();
    for Need { path, bytes, held } in needs {
        let place = directory(&path);
        // What cannot be looked at is refused by whoever makes something there.
        let Ok(found) = fs::metadata(place) else { continue };
        let (_, needed, left) =
            by_system.entry(found.dev()).or_insert_with(|| (place.to_owned(), 0, 0));
        *needed = needed.saturating_add(bytes);
        *left = left.saturating_add(held);
    }
    for (path, needed, left) in by_system.into_values() {
        let free = free_bytes(&path)?.saturating_add(left);
        if needed > free {
            return Err(Error::NoSpace { path, needed, free });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_shares_a_file_system_shares_its_room() {
        let dir = tempfile::tempdir().unwrap();
        let need = |name: &str, bytes| Need::of_new(&dir.path().join(name), bytes);
        let free = free_bytes(dir.path()).unwrap();
        let check = |needs: &[Need]| check(needs.iter().cloned()).map_err(|e| e.exit_status());
        assert_eq!(check(&[need("a", 1), need("b", free / 4)]), Ok(()));
        assert_eq!(check(&[need("a", free / 4 * 3), need("b", free / 4 * 3)]), Err(3));
        assert_eq!(check(&[need("nowhere/a", u64::MAX)]), Ok(()));
        // What an existing file holds it need not be given.
        let file = dir.path().join("c");
        fs::write(&file, vec![1; 1 << 20]).unwrap();
        assert_eq!(Need::of_existing(&file, 1 << 20).bytes, 0);
        assert_eq!(Need::of_existing(Path::new("/dev/null"), u64::MAX).bytes, 0);
    }
}
