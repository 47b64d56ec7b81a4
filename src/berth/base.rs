//! What a new image stands on: a file that this side's user names, and no stream does. Whether that
//! is what it was is nothing that a journal has to say: what it claims is read again through it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block_mig::device::ChainBacking;
use block_mig::ledger::{Ledger, Stretch, UNIT_BYTES};
use qcow2_file::chain;
use qcow2_file::create::{Backing, NewImage};
use qcow2_file::{Access, GuestOffset, HostFile, Opener};

use crate::copy::{Format, recorded_name};
use crate::disk::check_probe;
use crate::{Error, Observer, Result};

/// A backing file for a new image.
#[derive(Debug, Clone)]
pub struct Base {
    path: PathBuf,
    format: Format,
    /// Whether what it names itself may be opened.
    allow_named: bool,
    backing: Backing,
    /// All of its files.
    files: Vec<PathBuf>,
}

impl Base {
    /// Opens the file at `path`, with everything below it if `allow_named`, for an image at
    /// `destination`, and locks it against writers as long as this lives. Without a format it is
    /// probed, and refused where that is no safe guess.
    pub fn open(
        path: &Path,
        format: Option<Format>,
        (destination, allow_named): (&Path, bool),
        observer: &dyn Observer,
    ) -> Result<Self> {
        let file = HostFile::open(path, Access::Read)?;
        if HostFile::open(destination, Access::Read).is_ok_and(|found| found.id() == file.id()) {
            let path = path.display();
            let reason = format!("{path} cannot be replaced by an image that stands on it");
            return Err(Error::Usage { reason });
        }
        let opener = Opener::new().format(format.map(Into::into)).allow_named_files(allow_named);
        let chain = opener.lock(true).open(path)?;
        check_probe((path, "format="), &chain, observer)?;
        let format: Format = chain.top().format().into();
        let files = chain.paths().map(Path::to_owned).collect();
        let backing = Backing {
            name: recorded_name(path, destination)?,
            format: Some(format.to_string()),
            reader: Some(Arc::new(ChainBacking(chain))),
        };
        Ok(Self { path: path.to_owned(), format, allow_named, backing, files })
    }

    /// How a new image names and reads it.
    pub(super) fn backing(&self) -> Backing {
        self.backing.clone()
    }

    /// Its file, and those below.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(PathBuf::as_path)
    }

    /// How an image that stands on it is read, and whether what the base names may be opened.
    pub(super) fn below(&self) -> (chain::Backing, bool) {
        let file = chain::Backing::File(self.path.clone(), Some(self.format.into()));
        (file, self.allow_named)
    }
}

/// Lets the base be seen wherever `known` knows nothing: whatever a crash left half written there,
/// what the source does not send is to read as what is below. A cluster of which a part is not
/// known is not known.
pub(super) fn uncover_unknown(image: &NewImage, known: &mut Ledger) -> Result<()> {
    let (size, all) = (image.virtual_size(), known.units());
    let per_cluster = image.geometry().cluster_size().div_ceil(UNIT_BYTES);
    let mut at = 0;
    while let Some(stretch) = known.stretch(at)? {
        let units = stretch.units();
        at = units.end;
        if !matches!(stretch, Stretch::Unknown(_)) {
            continue;
        }
        let first = units.start / per_cluster * per_cluster;
        at = units.end.next_multiple_of(per_cluster).min(all);
        known.forget(first..at)?;
        let (start, end) = (first * UNIT_BYTES, at.saturating_mul(UNIT_BYTES).min(size));
        image.uncover(GuestOffset(start), end - start)?;
    }
    Ok(())
}
