//! Whether what was proved is still as it was then. Between the proof and the new names somebody
//! may write to a file who asks no lock. SPEC 10.

use std::path::{Path, PathBuf};

use crate::facts::{Stamp, stamp};
use crate::publish::temporary;
use crate::{Error, Result};

/// Files of a destination under their temporary names, in the order of their renames, and then
/// those that it stands on.
pub(super) fn parts(targets: &[&Path], below: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let parts = targets.iter().map(|target| temporary(target));
    parts.chain(below.iter().cloned().map(Ok)).collect()
}

/// What these files are like now.
pub(super) fn stamps<P: AsRef<Path>>(files: &[P]) -> Result<Vec<Stamp>> {
    files.iter().map(|file| look(file.as_ref())).collect()
}

/// Fails where one of these files is not what it was proved as.
pub(super) fn hold<P: AsRef<Path>>(files: &[P], proved: &[Stamp]) -> Result<()> {
    let mut proved = proved.iter();
    for file in files.iter().map(AsRef::as_ref) {
        if proved.next() != Some(&look(file)?) {
            return Err(Error::Changed { path: file.to_owned() });
        }
    }
    Ok(())
}

fn look(file: &Path) -> Result<Stamp> {
    let failed = |source| Error::File { action: "look at", path: file.to_owned(), source };
    stamp(file).map_err(failed)
}
