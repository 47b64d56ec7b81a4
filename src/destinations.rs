//! Where a command may put disks: none of its destinations has a name that is ours to give, and no
//! two are one. All of it is looked at before anything is made or anybody is waited for.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use format_spec::files::{is_reserved, journal_name, receipt_name};
use qcow2_file::layout::header;

use crate::publish::directory;
use crate::{Error, Result};

/// Checks the places of all disks and data files of one command.
pub(crate) fn check(places: &[&Path]) -> Result<()> {
    let usage = |reason: String| Err(Error::Usage { reason });
    let mut seen: Vec<(PathBuf, &Path)> = Vec::new();
    for path in places {
        let place = resolved(path);
        if [path, place.as_path()].iter().any(|named| is_reserved(name(named))) {
            return usage(format!(
                "{} is the name of what is kept beside a destination: choose another",
                path.display()
            ));
        }
        if let Some((_, other)) = seen.iter().find(|(seen, _)| *seen == place) {
            let (path, other) = (path.display(), other.display());
            return usage(format!("{other} and {path} are the same place"));
        }
        if let Some(image) = image_beside(&place) {
            return usage(format!(
                "{} is an image, and stands where a note about {} is to be kept: move it away",
                image.display(),
                path.display()
            ));
        }
        seen.push((place, path));
    }
    Ok(())
}

/// Where a path leads, as far as that is there.
fn resolved(path: &Path) -> PathBuf {
    if let Ok(found) = fs::canonicalize(path) {
        return found;
    }
    let directory = directory(path);
    let place = fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
    path.file_name().map_or_else(|| path.to_owned(), |name| place.join(name))
}

fn name(path: &Path) -> &[u8] {
    path.file_name().map(OsStr::as_bytes).unwrap_or_default()
}

/// A user's image that would be overwritten by what is kept beside `place`.
fn image_beside(place: &Path) -> Option<PathBuf> {
    let is_image = |path: &PathBuf| {
        let mut magic = [0; 4];
        let is_file = fs::symlink_metadata(path).is_ok_and(|found| found.is_file());
        let read = is_file.then(|| File::open(path).and_then(|mut f| f.read_exact(&mut magic)));
        read.is_some_and(|read| read.is_ok()) && u32::from_be_bytes(magic) == header::MAGIC
    };
    let beside = [receipt_name, journal_name].map(|named| named(name(place)));
    let mut beside = beside.iter().map(|name| directory(place).join(OsStr::from_bytes(name)));
    beside.find(is_image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_destination_is_anothers() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("sub")).unwrap();
        fs::write(path("a"), b"").unwrap();
        std::os::unix::fs::symlink("a", path("link")).unwrap();
        std::os::unix::fs::symlink(".", path("here")).unwrap();
        let says = |names: [&str; 2]| {
            let places = names.map(path);
            check(&[&places[0], &places[1]]).map_err(|error| {
                assert_eq!(error.exit_status(), 2);
                error.to_string()
            })
        };
        assert_eq!(says(["a", "b"]), Ok(()));
        assert_eq!(says(["b", "sub/b"]), Ok(()));
        assert_eq!(says(["new/b", "b"]), Ok(()));
        for other in ["a", "./a", "sub/../a", "here/a", "link"] {
            assert!(says(["a", other]).unwrap_err().contains("same place"), "{other}");
        }
        assert!(says(["b", "here/b"]).unwrap_err().contains("same place"));
        let endings = ["part", "journal", "journal.new", "receipt", "receipt.new"];
        for ending in endings.map(|ending| format!(".a.bitferry-{ending}")) {
            assert!(says(["b", &ending]).unwrap_err().contains("kept beside"), "{ending}");
        }
        for name in [".a", "a.bitferry-part", ".bitferry-parts"] {
            assert_eq!(says(["b", name]), Ok(()), "{name}");
        }
        std::os::unix::fs::symlink(".x.bitferry-part", path("to")).unwrap();
        fs::write(path(".x.bitferry-part"), b"").unwrap();
        assert!(says(["b", "to"]).is_err());
    }

    #[test]
    fn an_image_is_not_taken_for_a_note() {
        let dir = tempfile::tempdir().unwrap();
        let (place, note) = (dir.path().join("a"), dir.path().join(".a.bitferry-receipt"));
        fs::write(&note, b"BFRC\0\0\0\x01").unwrap();
        check(&[&place]).unwrap();
        fs::write(&note, b"QFI\xfb\0\0\0\x03").unwrap();
        assert!(check(&[&place]).unwrap_err().to_string().contains("is an image"));
    }
}
