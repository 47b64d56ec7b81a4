//! The journal of a destination, by name.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block_mig::journal::{Found, Identity, Journal, Replayed, peek, replay};
use format_spec::files::{journal_anew_name, journal_name, receipt_half_name, receipt_name};
use format_spec::native::journal::MAX_TARGET;
use qcow2_file::{Access, HostFile};

use super::device::Device;
use crate::publish::{directory, sync_directory};
use crate::{Error, Result};

/// Names of a destination's journal and receipt. Whoever uses them holds the lock of what they
/// belong to.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    journal: PathBuf,
    /// A journal that is written anew, until it takes the old one's place.
    anew: PathBuf,
    receipt: PathBuf,
    /// A receipt until it is whole.
    half_receipt: PathBuf,
    /// Whether they belong to a device, and stand where there may be no room for them.
    is_of_device: bool,
}

impl Log {
    /// Beside `target`.
    pub(crate) fn beside(target: &Path) -> Result<Self> {
        let name = target.file_name().ok_or_else(|| Error::Usage {
            reason: format!("{} is no file name", target.display()),
        })?;
        Ok(Self::named(directory(target), OsStr::as_bytes(name), false))
    }

    /// Of a block device, in a directory for the purpose, which need not exist.
    pub(crate) fn of_device(device: &Device, directory: &Path) -> Self {
        Self::named(directory, device.file_name().as_bytes(), true)
    }

    fn named(directory: &Path, name: &[u8], is_of_device: bool) -> Self {
        let at = |name: Vec<u8>| directory.join(OsString::from_vec(name));
        Self {
            journal: at(journal_name(name)),
            anew: at(journal_anew_name(name)),
            receipt: at(receipt_name(name)),
            half_receipt: at(receipt_half_name(name)),
            is_of_device,
        }
    }

    /// Whether they belong to a device.
    pub(crate) fn is_of_device(&self) -> bool {
        self.is_of_device
    }

    /// Where the receipt stands.
    pub(crate) fn receipt(&self) -> &Path {
        &self.receipt
    }

    /// Where the receipt is written.
    pub(crate) fn half_receipt(&self) -> &Path {
        &self.half_receipt
    }

    /// Starts a journal anew. `None` where `identity` cannot be told apart from others in one.
    pub(crate) fn start(&self, identity: Identity) -> Result<Option<Journal>> {
        self.remove()?;
        if identity.target.len() > MAX_TARGET {
            return Ok(None);
        }
        self.make_place()?;
        let file = Arc::new(HostFile::create_new(&self.journal)?);
        Ok(Some(Journal::start(file, identity)?))
    }

    /// Makes the directory where the journals of devices are.
    fn make_place(&self) -> Result<()> {
        let Some(place) = self.journal.parent().filter(|_| self.is_of_device) else {
            return Ok(());
        };
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(place);
        made.map_err(failed("make the directory", place))
    }

    /// The journal of `identity`, if it is there.
    pub(crate) fn find(&self, identity: &Identity) -> Result<Option<Replayed>> {
        let Some(file) = self.open()? else { return Ok(None) };
        match replay(&*file, identity)? {
            Found::Journal(found) => Ok(Some(*found)),
            Found::Nothing | Found::Other(_) => Ok(None),
        }
    }

    /// Whatever journal is there.
    pub(crate) fn peek(&self) -> Result<Option<Replayed>> {
        let Some(file) = self.open()? else { return Ok(None) };
        match peek(&*file)? {
            Found::Journal(found) => Ok(Some(*found)),
            Found::Nothing | Found::Other(_) => Ok(None),
        }
    }

    /// Makes a journal that differs from `identity` in its session alone that one's. Whoever goes
    /// on with it holds all that it claims against the source.
    pub(crate) fn adopt(&self, identity: &Identity) -> Result<()> {
        let of = |found: &Identity| (found.size, found.target.clone());
        let is_other = |found: &Replayed| {
            found.identity != *identity
                && of(&found.identity) == of(identity)
                && !found.is_committing
        };
        let Some(found) = self.peek()?.filter(is_other) else { return Ok(()) };
        let found = Replayed { identity: identity.clone(), prepared: None, ..found };
        let Some(mut journal) = self.resume(found)? else { return Ok(()) };
        journal.rewrite(self.anew()?)?;
        self.replace()
    }

    /// Goes on with a journal that was found.
    pub(crate) fn resume(&self, replayed: Replayed) -> Result<Option<Journal>> {
        let Some(file) = self.open()? else { return Ok(None) };
        Ok(Some(Journal::resume(file, replayed)?))
    }

    /// Makes the name of a journal durable.
    pub(crate) fn sync_name(&self) -> Result<()> {
        sync_directory(&self.journal)
    }

    /// The file that a journal is written to anew.
    pub(crate) fn anew(&self) -> Result<Arc<HostFile>> {
        remove(&self.anew)?;
        Ok(Arc::new(HostFile::create_new(&self.anew)?))
    }

    /// Gives that file the journal's name.
    pub(crate) fn replace(&self) -> Result<()> {
        fs::rename(&self.anew, &self.journal).map_err(failed("rename to", &self.journal))
    }

    /// Removes the journal.
    pub(crate) fn remove(&self) -> Result<()> {
        remove(&self.anew)?;
        remove(&self.journal)
    }

    /// Removes the receipt of an earlier transfer.
    pub(crate) fn remove_receipt(&self) -> Result<()> {
        remove(&self.receipt)
    }

    /// Opens the journal, unless it is something that we would not have made.
    fn open(&self) -> Result<Option<Arc<HostFile>>> {
        if !fs::symlink_metadata(&self.journal).is_ok_and(|m| m.is_file()) {
            return Ok(None);
        }
        match HostFile::open(&self.journal, Access::ReadWrite) {
            Ok(file) => Ok(Some(Arc::new(file))),
            Err(qcow2_file::Error::Open { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether a journal or a receipt lies beside `target`.
pub(crate) fn has_traces(target: &Path) -> Result<bool> {
    let log = Log::beside(target)?;
    Ok([&log.journal, &log.receipt].iter().any(|path| path.symlink_metadata().is_ok()))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(e)),
        _ => Ok(()),
    }
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::File { action, path: path.to_owned(), source }
}
