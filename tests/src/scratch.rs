//! A directory for one test's files, gone when the test ends.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A directory for one test's files. On a tmpfs where there is one: images are written and thrown
/// away, and syncing them to a disk would be most of the time. `BITFERRY_SCRATCH` names another
/// place, `BITFERRY_KEEP` keeps the directory for a look.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
}

impl Scratch {
    /// A new, empty directory.
    pub fn new() -> Self {
        let place = std::env::var_os("BITFERRY_SCRATCH").map_or_else(default_place, PathBuf::from);
        let mut builder = tempfile::Builder::new();
        // Short: socket addresses have room for some hundred bytes.
        builder.prefix("bft-").disable_cleanup(std::env::var_os("BITFERRY_KEEP").is_some());
        let made = builder.tempdir_in(&place);
        Self { dir: made.unwrap_or_else(|e| panic!("scratch in {}: {e}", place.display())) }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path inside.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Names of everything inside, sorted, hidden ones too.
    pub fn names(&self) -> Vec<String> {
        names_in(self.dir())
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Names of everything in a directory, sorted, hidden ones too.
pub fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let name = |e: std::io::Result<std::fs::DirEntry>| e.expect("entry").file_name();
    let mut names: Vec<_> = entries.map(|e| name(e).to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn default_place() -> PathBuf {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() && tempfile::tempfile_in(shared).is_ok() {
        shared.to_owned()
    } else {
        std::env::temp_dir()
    }
}
