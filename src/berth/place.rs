//! The place of one new disk.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bitmap_mig::Bitmap;
use block_mig::Landing;
use block_mig::journal::Keeper;
use block_mig::limits::workers;
use format_spec::content_hash::{BitmapDigest, ContentHash, Node};
use format_spec::native::journal::UNPROVED;
use mig_core::block::BlockSink;
use mig_core::section::{Fate, Have};
use mig_core::stream;
use qcow2_file::bitmaps::Bitmaps;
use qcow2_file::chain::Backing;
use qcow2_file::lock::Lock;

use super::base::Base;
use super::files::{DiskPlace, FileOptions, failed};
use super::prover::Prover;
use super::receipt::{Receipt, ReceiptBitmap};
use super::sink::Sink;
use super::unfinished::{NewDisk, Unfinished};
use crate::copy::Format;
use crate::disk::{Disk, Request};
use crate::hash::content_of;
use crate::incoming::{Place, Sealed};
use crate::observe::Progress;
use crate::proof::DiskProof;
use crate::renames::no_place;
use crate::{Error, Observer, Phase, Renames, Result, Silent};

/// A disk that was proved by an earlier attempt and has its temporary names.
pub(super) struct Known {
    content: ContentHash,
    bitmaps: Vec<ReceiptBitmap>,
    unfinished: Unfinished,
}

impl Known {
    /// Finds it.
    pub(super) fn prepared(disk: &NewDisk<'_>, format: Format) -> Result<Option<Self>> {
        let Some((unfinished, content)) = Unfinished::prepared(disk)? else { return Ok(None) };
        let (path, data) = unfinished.paths();
        let bitmaps = bitmaps_of(path, format, data)?;
        Ok(Some(Self { content, bitmaps, unfinished }))
    }

    /// Holds what the source says against it. Where it says something else, what was proved can be
    /// gone on with, and is not complete any more.
    fn proof(&self, path: &Path, renames: &Renames, sealed: &Sealed) -> Result<DiskProof> {
        if sealed.content.is_none() {
            self.unfinished.keeper().map_or(Ok(()), Keeper::unprepare)?;
            let reason = format!(
                "{} was proved, and the source does not say any more what it has: give the same \
                 command again",
                path.display()
            );
            return Err(Error::Usage { reason });
        }
        let held = self.hold(renames, sealed);
        held.map_err(|reason| match self.unfinished.keeper().map_or(Ok(()), Keeper::unprepare) {
            Ok(()) => Error::ProofMismatch { path: path.to_owned(), reason },
            Err(error) => error.into(),
        })
    }

    fn hold(&self, renames: &Renames, sealed: &Sealed) -> Result<DiskProof, String> {
        let proved = self.content;
        match sealed.content {
            Some(said) if said == proved => {}
            said => {
                let said = said.map_or_else(|| "nothing".to_owned(), |said| said.to_string());
                return Err(format!("{proved} was proved, the source now has {said}"));
            }
        }
        if self.bitmaps.len() != sealed.bitmaps.len() {
            let (here, said) = (self.bitmaps.len(), sealed.bitmaps.len());
            return Err(format!("{here} bitmaps were proved, the source now has {said}"));
        }
        let mut bitmaps = Vec::new();
        for Bitmap { name, is_enabled, .. } in &sealed.bitmaps {
            let stored = renames.stored(name);
            let found = self.bitmaps.iter().find(|found| found.name == stored);
            let found = found.ok_or_else(|| format!("bitmap {name:?} is not here"))?;
            if found.is_enabled != *is_enabled {
                return Err(format!("bitmap {name:?} was enabled or disabled since it was proved"));
            }
            bitmaps.push(found.digest);
        }
        Ok(DiskProof { content: Some(proved), bitmaps })
    }
}

/// The place of one new disk.
pub(super) struct FilePlace {
    name: String,
    path: PathBuf,
    format: Format,
    base: Option<Base>,
    renames: Renames,
    /// Why it can hold no bitmaps, if so.
    cannot_hold: Option<&'static str>,
    session: Option<[u8; 16]>,
    target: String,
    size: u64,
    options: FileOptions,
    observer: Arc<dyn Observer>,
    known: Option<Known>,
    /// Ends before the files go.
    prover: Option<Prover>,
    unfinished: Option<Arc<Unfinished>>,
    /// Where content goes when nothing is expected.
    closed: Sink,
    /// Hold everybody else off what will be replaced.
    _held: Vec<Lock>,
    receipt: Mutex<Option<Receipt>>,
}

impl FilePlace {
    /// Opens or makes the files of a disk, unless it is complete. What it will replace is held.
    pub(super) fn open(
        (place, disk): (&DiskPlace, &NewDisk<'_>),
        (known, held): (Option<Known>, Vec<Lock>),
        options: FileOptions,
        observer: &Arc<dyn Observer>,
    ) -> Result<Self> {
        let unfinished = match known {
            Some(_) => None,
            None => Some(Arc::new(Unfinished::open(disk)?)),
        };
        // Where content stands tells nothing of it where it may be in another file.
        let is_proved = !options.no_verify && place.base.is_none();
        let proved = unfinished.as_ref().filter(|_| is_proved);
        let prover = proved.map(Unfinished::prover).transpose()?;
        Ok(Self {
            name: place.name.clone(),
            path: place.path.clone(),
            format: place.format,
            base: place.base.clone(),
            renames: place.renames.clone(),
            cannot_hold: disk.cannot_hold(),
            session: disk.session,
            target: disk.target(),
            size: disk.size,
            options,
            observer: Arc::clone(observer),
            known,
            prover,
            unfinished,
            closed: Sink::Closed(disk.size),
            _held: held,
            receipt: Mutex::new(None),
        })
    }

    /// Its name on the wire.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn keeper(&self) -> Option<&Keeper> {
        self.unfinished.as_ref().and_then(|unfinished| unfinished.keeper())
    }

    /// Its files, while they have temporary names.
    pub(super) fn unfinished(&self) -> Option<&Unfinished> {
        self.unfinished.as_deref().or(self.known.as_ref().map(|known| &known.unfinished))
    }

    /// Writes the receipt, once it is published.
    pub(super) fn write_receipt(&self) -> Result<()> {
        let mut receipt = self.receipt.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *receipt, self.unfinished()) {
            (Some(receipt), Some(unfinished)) => {
                receipt.stamp = unfinished.stamp();
                receipt.write(unfinished.log())
            }
            _ => Ok(()),
        }
    }

    /// The attempt has failed.
    pub(super) fn leave(&self, fate: Fate) -> Result<()> {
        let Some(unfinished) = self.unfinished() else { return Ok(()) };
        let Some(keeper) = unfinished.keeper().filter(|_| fate != Fate::Dropped) else {
            return unfinished.forsake();
        };
        // READY stands until the source says otherwise.
        if fate == Fate::Revoked && keeper.is_prepared() {
            keeper.unprepare()?;
        }
        self.prover.iter().for_each(Prover::catch_up);
        if self.known.is_some() { Ok(()) } else { unfinished.checkpoint() }
    }

    fn prove(&self, unfinished: &Unfinished, sealed: &Sealed) -> Result<Option<DiskProof>> {
        let stored = sealed.bitmaps.iter();
        let stored: Vec<_> =
            stored.map(|b| b.clone().into_stored_as(&self.renames.stored(&b.name))).collect();
        self.observer.phase(Phase::Seal);
        let begun = Instant::now();
        // Until storage is done with what is written, more is read.
        unfinished.seal(&stored)?;
        let sealed_after = begun.elapsed();
        self.prover.iter().for_each(Prover::stop);
        let Some(said) = sealed.content else {
            return unfinished.prepare(UNPROVED).map(|()| None);
        };
        self.observer.phase(Phase::Prove);
        let (path, data) = unfinished.paths();
        let disk = self.open_made(path, data)?;
        let opened_after = begun.elapsed();
        let content = match &self.prover {
            Some(prover) => {
                prover.finish(&disk.chain, self.options.workers, &*self.observer)?.content
            }
            None => {
                let workers = workers(self.options.workers);
                content_of(&disk, workers, None, (Phase::Prove, &*self.observer))?
            }
        };
        let mismatch = |reason| Error::ProofMismatch { path: self.path.clone(), reason };
        if content != said {
            return Err(mismatch(format!("{said} was sent, {content} was read")));
        }
        let read_after = begun.elapsed();
        let gone = || mismatch("the bitmaps are gone".to_owned());
        let bitmaps = match (disk.bitmaps.directory(), sealed.bitmaps.as_slice()) {
            (_, []) => Vec::new(),
            (directory, bitmaps) => self.digests(directory.ok_or_else(gone)?, bitmaps)?,
        };
        let proved_after = begun.elapsed();
        unfinished.prepare(content)?;
        let took = begun.elapsed();
        let times = [sealed_after, opened_after, read_after, proved_after, took];
        tracing::debug!(?times, "sealed, opened, rest read, bitmaps read, noted");
        Ok(Some(DiskProof { content: Some(content), bitmaps }))
    }

    /// What was made, with what it stands on.
    fn open_made(&self, path: &Path, data: Option<&Path>) -> Result<Disk> {
        let (backing, allow_named) = self.base.as_ref().map(Base::below).unwrap_or_default();
        let request = Request { backing, allow_named, ..request(path, self.format, data) };
        Disk::open(&request, &Silent)
    }

    /// What these bitmaps hash to as they are stored. Some are read by each worker.
    fn digests(&self, stored: &Bitmaps, bitmaps: &[Bitmap]) -> Result<Vec<BitmapDigest>> {
        let digest = |Bitmap { name, .. }: &Bitmap| {
            Ok(bitmap_mig::load(stored, &self.renames.stored(name))?.digest()?)
        };
        let each = |some: &[Bitmap]| some.iter().map(digest).collect::<Result<Vec<_>>>();
        let share = bitmaps.len().div_ceil(workers(self.options.workers).max(1)).max(1);
        let (first, rest) = bitmaps.split_at(share.min(bitmaps.len()));
        std::thread::scope(|scope| {
            let others: Vec<_> =
                rest.chunks(share).map(|some| scope.spawn(|| each(some))).collect();
            let mut digests = each(first)?;
            for other in others {
                let joined = other.join();
                digests.extend(joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
            }
            Ok(digests)
        })
    }

    /// What the receipt will say.
    fn note_receipt(&self, sealed: &Sealed, proof: Option<&DiskProof>) -> Result<()> {
        let Some(session) = self.session else { return Ok(()) };
        let names = sealed.bitmaps.iter().map(|b| (self.renames.stored(&b.name), b));
        let receipt = Receipt::of((session, self.size, self.target.clone()), proof, names)?;
        *self.receipt.lock().unwrap_or_else(PoisonError::into_inner) = Some(receipt);
        Ok(())
    }

    /// Reads again what an earlier attempt left, and tells what of it is believed.
    fn tell(
        &self,
        unfinished: &Unfinished,
        tell: &mut dyn FnMut(Have) -> stream::Result<()>,
    ) -> stream::Result<()> {
        let workers = workers(self.options.workers);
        let Some(keeper) = unfinished.keeper().filter(|_| unfinished.is_resumed) else {
            return Ok(());
        };
        let progress = Progress::begin(&*self.observer, Phase::Recheck, keeper.claimed_bytes());
        unfinished.recheck(None, workers, &progress).map_err(failed)?;
        progress.end();
        self.observer.phase(Phase::Transfer);
        keeper.tell(&mut |have| {
            self.prover.iter().for_each(|prover| prover.told(&have));
            tell(have)
        })
    }
}

impl Landing for FilePlace {
    fn sink(&self) -> &dyn BlockSink {
        self.unfinished().map_or(&self.closed as &dyn BlockSink, |u| u.sink())
    }

    fn have(&self, tell: &mut dyn FnMut(Have) -> stream::Result<()>) -> stream::Result<()> {
        self.unfinished.as_ref().map_or(Ok(()), |unfinished| self.tell(unfinished, tell))
    }

    fn wants_nodes(&self) -> bool {
        self.keeper().is_some() && self.prover.is_none()
    }

    fn begin(&self, range: Range<u64>) -> stream::Result<()> {
        self.prover.iter().for_each(|prover| prover.begin(range.clone()));
        let keeper = self.keeper();
        Ok(keeper.map_or(Ok(()), |keeper| keeper.begin(range))?)
    }

    fn arrived(&self, range: Range<u64>, first: u64, nodes: &[Node]) -> stream::Result<()> {
        self.prover.iter().for_each(|prover| prover.arrived(range.clone()));
        let (Some(unfinished), Some(keeper)) = (&self.unfinished, self.keeper()) else {
            return Ok(());
        };
        let is_due = match &self.prover {
            // Noted when it is read, and on a slow link nothing comes that would let it be read.
            Some(prover) if keeper.is_late() => {
                prover.catch_up();
                true
            }
            Some(_) => keeper.is_due(),
            None => keeper.units_landed(first, nodes)?,
        };
        match is_due {
            true => unfinished.checkpoint().map_err(failed),
            false => Ok(()),
        }
    }

    fn arrived_zeroes(&self, range: Range<u64>) -> stream::Result<()> {
        self.prover.iter().for_each(|prover| prover.arrived_zeroes(range.clone()));
        let Some(keeper) = self.keeper() else { return Ok(()) };
        Ok(keeper.zeroes_landed(range)?)
    }

    fn settled(&self) {
        self.prover.iter().for_each(Prover::settled);
    }

    fn durable(&self) -> stream::Result<()> {
        match &self.unfinished {
            Some(unfinished) if self.keeper().is_some() => {
                // What is read meanwhile is claimed below, and nothing of it is left to be synced.
                unfinished.sink().sync()?;
                self.prover.iter().for_each(Prover::wait);
                unfinished.checkpoint().map_err(failed)
            }
            // A guest may be paused next: what it would have to wait for is done before.
            _ => {
                self.sink().sync()?;
                self.prover.iter().for_each(Prover::wait);
                Ok(())
            }
        }
    }
}

impl Place for FilePlace {
    /// Renamed when they are stored.
    fn bitmap_name(&self, sent: &str) -> stream::Result<String> {
        match self.cannot_hold {
            None => Ok(sent.to_owned()),
            Some(why) => Err(failed(no_place(&self.name, sent, why))),
        }
    }

    fn prepare(&self, sealed: &Sealed) -> stream::Result<Option<DiskProof>> {
        let proof = match (&self.known, &self.unfinished) {
            (Some(known), _) => {
                Some(known.proof(&self.path, &self.renames, sealed).map_err(failed)?)
            }
            (None, Some(unfinished)) => self.prove(unfinished, sealed).map_err(failed)?,
            (None, None) => None,
        };
        self.note_receipt(sealed, proof.as_ref()).map_err(failed)?;
        Ok(proof)
    }
}

/// A disk that we made: with the data file that we made, and no other.
fn request<'a>(path: &'a Path, format: Format, data: Option<&Path>) -> Request<'a> {
    let data_file = data.map(Path::to_owned);
    Request { data_file, ..Request::new(path, Some(format)) }
}

/// The bitmaps of a disk that we made.
pub(super) fn bitmaps_of(
    path: &Path,
    format: Format,
    data: Option<&Path>,
) -> Result<Vec<ReceiptBitmap>> {
    if format == Format::Raw {
        return Ok(Vec::new());
    }
    // Whatever it stands on has no say in them.
    let request = Request { backing: Backing::Ignored, ..request(path, format, data) };
    let disk = Disk::open(&request, &Silent)?;
    let Some(directory) = disk.bitmaps.directory() else { return Ok(Vec::new()) };
    let digest = |entry: &qcow2_file::bitmaps::Entry| {
        let bitmap = bitmap_mig::load(directory, entry.name())?;
        let digest = bitmap.digest()?;
        Ok(ReceiptBitmap::of(bitmap.name.clone(), &bitmap, digest))
    };
    directory.list().iter().map(digest).collect()
}
