//! An existing image, before its disk has come.

use std::path::{Path, PathBuf};

use block_mig::journal::Replayed;
use format_spec::native::answer::Published;
use mig_core::block::SECTOR_BYTES;
use qcow2_file::bitmaps::PersistentBitmap;
use qcow2_file::layout::header::incompatible;
use qcow2_file::{Access, Chain, HostFile, Opener, Storage as _};

use super::super::ReceiveOptions;
use crate::berth::{Log, Receipt, Trace, change_unseen, gone, log_of, short_words};
use crate::copy::{Format, difference, invalidated};
use crate::disk::{Disk, Request, check_probe};
use crate::incoming::{Sealed, SessionId};
use crate::options::DiskOption;
use crate::renames::{NO_PLACE_IN_RAW, NO_PLACE_IN_VERSION_2, Renames, no_place};
use crate::report::BitmapReport;
use crate::{DiskProof, Error, Observer, Result, Silent};

/// An existing image, before its disk has come.
pub(super) struct Target {
    pub(super) id: String,
    pub(super) path: PathBuf,
    pub(super) format: Format,
    pub(super) allow_backing: bool,
    pub(super) device_journals: Option<PathBuf>,
    pub(super) renames: Renames,
    /// Holds the locks.
    pub(super) chain: Chain,
}

impl Target {
    pub(super) fn open(
        disk: &DiskOption,
        options: &ReceiveOptions,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let path = disk.path.as_path();
        let is_device = HostFile::open(path, Access::Read)?.is_device();
        let format = disk.format.or(is_device.then_some(Format::Raw));
        let chain = Opener::new()
            .format(format.map(Into::into))
            .access(Access::ReadWrite)
            .allow_named_files(options.allow_backing)
            .accept_unfinished(true)
            .lock(true)
            .open(path)?;
        check_probe((path, "format="), &chain, observer)?;
        let header = chain.top().as_qcow2().map(qcow2_file::Image::header);
        if header.is_none_or(|header| header.version < 3) {
            observer.warning(&format!(
                "{} is written in place: until the migration is complete it holds neither the old \
                 nor the new content, and nothing in it says so",
                path.display()
            ));
        }
        Ok(Self {
            id: disk.id.clone(),
            path: path.to_owned(),
            format: chain.top().format().into(),
            allow_backing: options.allow_backing,
            device_journals: options.device_journals.clone(),
            renames: Renames::of(&options.renames, &disk.id),
            chain,
        })
    }

    /// Whether a raw file is as long as the disk, but for a last sector that is not whole. A device
    /// that is longer will do.
    pub(super) fn fit(&self, file: &HostFile, size: u64) -> Result<()> {
        let failed = |action| move |source| Error::File { action, path: self.path.clone(), source };
        let len = file.len().map_err(failed("find the size of"))?;
        match file.is_device() {
            true if len < size => Err(self.other_size(len, size)),
            false if len.checked_next_multiple_of(SECTOR_BYTES).unwrap_or(len) != size => {
                Err(self.other_size(len, size))
            }
            false if len < size => file.set_len(size).map_err(failed("set the length of")),
            _ => Ok(()),
        }
    }

    pub(super) fn other_size(&self, found: u64, wanted: u64) -> Error {
        let path = self.path.display();
        let reason = format!("{path} has {found} bytes and the source's disk {wanted}");
        Error::Unfit { reason }
    }

    /// How it is opened to be read back: as it is, without locks, since we hold them.
    pub(super) fn reopen(&self) -> Result<Disk> {
        let request = Request {
            allow_named: self.allow_backing,
            accepts_unfinished: true,
            is_locked_already: true,
            ..Request::new(&self.path, Some(self.format))
        };
        Disk::open(&request, &Silent)
    }

    /// Why it can hold no bitmaps, if so.
    pub(super) fn cannot_hold(&self) -> Option<&'static str> {
        match self.chain.top().as_qcow2() {
            None => Some(NO_PLACE_IN_RAW),
            Some(image) => (image.header().version < 3).then_some(NO_PLACE_IN_VERSION_2),
        }
    }

    /// Whether all that it reads stands in its own file.
    pub(super) fn stands_alone(&self) -> bool {
        let has_data_file =
            self.chain.top().as_qcow2().is_some_and(|image| image.header().has_data_file());
        self.chain.layers().len() == 1 && !has_data_file
    }

    /// log2 of what is written together.
    pub(super) fn cluster_bits(&self) -> u32 {
        let image = self.chain.top().as_qcow2();
        image.map_or(u32::MAX, |image| image.header().cluster_bits)
    }

    /// What it is to be, as a journal and a receipt say it.
    pub(super) fn words(&self) -> String {
        let words = format!("in place {} {}", self.format, self.renames.text());
        short_words(words.trim_end())
    }

    /// Where its journal and its receipt are.
    pub(super) fn log_place(&self) -> (&Path, Option<&Path>) {
        (&self.path, self.device_journals.as_deref())
    }

    /// What an earlier attempt of this session left.
    pub(super) fn trace(&self, session: SessionId) -> Result<Trace> {
        let (path, devices) = self.log_place();
        let Some(log) = log_of(path, devices)? else { return Ok(Trace::Nothing) };
        if self.is_published(session, &log)? {
            // A kill may have come between the receipt and the end of the journal.
            log.remove()?;
            return Ok(Trace::Published);
        }
        let words = self.words();
        let is_ours =
            |found: &Replayed| found.identity.session == session && found.identity.target == words;
        Ok(if log.peek()?.is_some_and(|found| is_ours(&found)) {
            Trace::Begun
        } else {
            Trace::Nothing
        })
    }

    /// What its receipt says.
    pub(super) fn published(&self) -> Result<Published> {
        let (path, devices) = self.log_place();
        let receipt = log_of(path, devices)?.map(|log| Receipt::read(&log)).transpose()?.flatten();
        let receipt = receipt.ok_or_else(|| gone(path))?;
        Ok(receipt.published(self.files(), (&self.id, &self.renames)))
    }

    /// The name under which a bitmap is stored here that the source calls `sent`.
    pub(super) fn bitmap_name(&self, sent: &str) -> Result<String> {
        match self.cannot_hold() {
            None => Ok(self.renames.stored(sent)),
            Some(why) => Err(no_place(&self.id, sent, why)),
        }
    }

    /// What the receipt of a disk of so many bytes will say.
    pub(super) fn receipt(
        &self,
        (session, size): (SessionId, u64),
        sealed: &Sealed,
        proof: Option<&DiskProof>,
    ) -> Result<Receipt> {
        let names = sealed.bitmaps.iter().map(|bitmap| (bitmap.name.clone(), bitmap));
        Receipt::of((session, size, self.words()), proof, names)
    }

    /// Looks whether it holds these bitmaps, now that it is complete. Answers which of its own
    /// cannot be trusted.
    pub(super) fn holds(&self, stored: &[PersistentBitmap]) -> Result<Vec<BitmapReport>> {
        let found = self.reopen()?;
        match difference(stored, &found.bitmaps)? {
            None => Ok(invalidated(&found)),
            Some(reason) => Err(Error::ProofMismatch { path: self.path.clone(), reason }),
        }
    }

    /// The file that takes the guest's data.
    pub(super) fn data_path(&self) -> &Path {
        let own = self.chain.files().first();
        let data = own.and_then(|files| files.data.as_deref());
        data.map_or(&self.path, |data| data.path())
    }

    /// Its files, from top to bottom.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.chain.paths()
    }

    /// Whether a receipt can speak for it: not where nobody can tell what it holds later without
    /// reading it.
    pub(super) fn can_have_receipt(&self) -> bool {
        !change_unseen(self.files())
    }

    /// Whether it says of itself that an earlier attempt has not completed it.
    pub(super) fn is_unfinished(&self) -> bool {
        let header = self.chain.top().as_qcow2().map(qcow2_file::Image::header);
        header.is_some_and(|h| h.incompatible_features & incompatible::UNFINISHED_COPY != 0)
    }

    /// Whether a receipt speaks for it, and it does not say of itself that it is unfinished.
    fn is_published(&self, session: SessionId, log: &Log) -> Result<bool> {
        let is_it = |receipt: Receipt| {
            let size = self.chain.virtual_size();
            receipt.session == session && receipt.size == size && receipt.target == self.words()
        };
        let may_be = self.can_have_receipt() && !self.is_unfinished();
        Ok(may_be && Receipt::read(log)?.is_some_and(is_it))
    }
}
