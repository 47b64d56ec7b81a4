//! Writing into an existing image: refcounts, allocator, ordered flush.
//!
//! [`Editor`] is the whole; [`Allocator`] serves those who change metadata without touching guest
//! data. What a kill at any moment leaves is an image with leaked clusters at worst, whose every
//! guest sector reads as it was or as somebody wrote it.
//!
//! # The order of things
//!
//! 1. Data and refcount increments are durable before a mapping points at them; L2 tables before
//!    the L1 entry; mappings before the decrements that free what they dropped.
//! 2. A cluster is not reused before its decrement is durable. Pending frees are capped; the cap
//!    forces a flush.
//! 3. A new refcount block is durable, with its own count, before the refcount table points at it;
//!    a new refcount table before the header's one-sector update.
//! 4. Dirty tables leave memory by a flush of all of them only, which obeys rule 1.
//! 5. A failed metadata write or sync poisons the editor for good.
//!
//! # Locks
//!
//! In this order: guest range, gate, L2 table, L1 table, allocator. A guest range is held over
//! data I/O: shared by reads and by writes in place, so that nothing under them is freed;
//! exclusively by whatever changes the mapping. The gate is held shared for each short change of
//! the mapping together with the allocations and frees that belong to it, exclusively by a flush,
//! so that a flush sees whole changes only. It and what follows it are never held over data I/O.

mod allocator;
mod cow;
mod entries;
mod flush;
#[cfg(test)]
mod full;
mod mark;
mod ranges;
mod read;
pub(crate) mod refcounts;
mod tables;
mod write;
mod zero;

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock};

pub use allocator::Allocator;
pub(crate) use refcounts::Refcounts;
pub use zero::ZeroMode;

use crate::bitmaps::header::{KNOWN_AUTOCLEAR, clear_autoclear, read_writable};
use crate::chain::Chain;
use crate::check::reclaim;
use crate::error::{Condition, Error, Result};
use crate::first_failure::FirstFailure;
use crate::guard::Guard;
use crate::image::decode::Decoders;
use crate::layout::geometry::Geometry;
use crate::layout::header::{Header, autoclear, incompatible};
use crate::layout::units::GuestOffset;
use crate::storage::Storage;
use mark::Mark;
use ranges::Ranges;
use tables::Tables;

/// What an image shows where it has nothing of its own. Called from any thread.
pub trait Backing: Send + Sync + std::fmt::Debug {
    /// Fills `buf` with what a guest reads at `at` from the backing disk. Never short; zeroes
    /// beyond its end.
    fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<()>;
}

impl Backing for Chain {
    fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<()> {
        Chain::read_at(self, buf, at)
    }
}

/// Is told of every change of guest data: a write, a write of zeroes, a discard. Called from any
/// thread after the change and before it is reported as complete, also when it failed, since a
/// part of it may have happened.
pub trait WriteObserver: Send + Sync + std::fmt::Debug {
    /// The range may read differently from now on.
    fn wrote(&self, at: GuestOffset, len: u64);
}

/// What becomes of the image's persistent bitmaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BitmapPolicy {
    /// Enabled ones record what is written and are valid again after [`Editor::close`]. An image
    /// whose bitmap directory is broken is refused.
    #[default]
    Keep,
    /// All are durably marked as not to be trusted, without being read.
    Invalidate,
}

/// How an image is opened for writing.
#[derive(Debug, Clone, Default)]
pub struct EditorOptions {
    /// The external data file, where the image has one.
    pub data: Option<Arc<dyn Storage>>,
    /// What the image's backing file reads as, where it has one.
    pub backing: Option<Arc<dyn Backing>>,
    /// Is told of every change, besides the bitmaps of the image itself.
    pub observer: Option<Arc<dyn WriteObserver>>,
    /// What becomes of persistent bitmaps.
    pub bitmaps: BitmapPolicy,
    /// Mark the image as holding an unfinished in-place copy (SPEC 3.3) from before the first
    /// write until [`Editor::close`]; accept one that is marked, and give back what the copy that
    /// was interrupted there has leaked. Version 2 has no such mark: [`Editor::is_marked`].
    pub is_in_place_copy: bool,
}

/// An existing image, open for reading and writing its guest data from any number of threads. Two
/// writes of overlapping ranges at the same time leave one or the other in each sector.
///
/// Dropping an editor is like a power cut: nothing is flushed, bitmaps stay marked as in use. See
/// [`close`](Editor::close).
#[derive(Debug)]
pub struct Editor {
    file: Arc<dyn Storage>,
    /// Where guest data is: the external data file, or the image itself.
    data: Arc<dyn Storage>,
    backing: Option<Arc<dyn Backing>>,
    observer: Option<Arc<dyn WriteObserver>>,
    guard: Option<Guard>,
    header: Header,
    geometry: Geometry,
    decoders: Decoders,
    ranges: Ranges,
    gate: RwLock<()>,
    tables: Tables,
    allocator: Mutex<Allocator>,
    mark: Mark,
    /// Enough was freed to make the next caller flush.
    is_release_due: AtomicBool,
    first_failure: FirstFailure,
}

impl Editor {
    /// Opens an image for writing.
    ///
    /// All metadata is walked first, and nothing is written to an image that is corrupt, was not
    /// closed, needs what is not known here, or lacks a file it needs ([`check`](crate::check)).
    /// Then, durably: autoclear bits not known here are cleared, and enabled bitmaps are marked as
    /// in use by a [`Guard`]. Guest data can be written only afterwards.
    ///
    /// Whoever calls holds the image's lock ([`crate::lock`]) for as long as the editor lives.
    pub fn open(file: Arc<dyn Storage>, options: EditorOptions) -> Result<Self> {
        let header = read_writable(&*file)?;
        refuse_unusable(&*file, &header, &options)?;
        if options.is_in_place_copy && may_be_left(&header) {
            reclaim(&file, &header)?;
        }
        let allocator = Allocator::open(file.clone(), &header)?;
        let tables = Tables::open(file.clone(), &header)?;
        let guard = match options.bitmaps {
            BitmapPolicy::Keep => Some(Guard::take(file.clone())?),
            BitmapPolicy::Invalidate => {
                clear_autoclear(&*file, &header, !KNOWN_AUTOCLEAR | autoclear::BITMAPS)?;
                None
            }
        };
        Ok(Self {
            data: options.data.unwrap_or_else(|| file.clone()),
            backing: options.backing,
            observer: options.observer,
            guard,
            geometry: header.geometry(),
            decoders: Decoders::default(),
            ranges: Ranges::default(),
            gate: RwLock::default(),
            tables,
            allocator: Mutex::new(allocator),
            mark: Mark::new(&header, options.is_in_place_copy),
            is_release_due: AtomicBool::new(false),
            first_failure: FirstFailure::default(),
            header,
            file,
        })
    }

    /// The header as it was when the image was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Cluster arithmetic.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Guest-visible size in bytes: the header's size, rounded down to 512.
    pub fn virtual_size(&self) -> u64 {
        self.header.size & !511
    }

    /// The image file.
    pub fn file(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    /// The bitmaps that follow the writes, to look at, add and remove; stored at
    /// [`close`](Self::close). `None` with [`BitmapPolicy::Invalidate`].
    pub fn guard(&self) -> Option<&Guard> {
        self.guard.as_ref()
    }

    fn has_data_file(&self) -> bool {
        self.header.has_data_file()
    }

    fn has_backing(&self) -> bool {
        self.backing.is_some()
    }

    /// The range as numbers, if it lies inside the disk.
    fn inside(&self, at: GuestOffset, len: u64) -> Result<Range<u64>> {
        match at.0.checked_add(len) {
            Some(end) if end <= self.virtual_size() => Ok(at.0..end),
            _ => Err(self.refused(format!("{len} bytes at {at} lie beyond the end of the disk"))),
        }
    }

    /// The range, widened to whole clusters: what is locked.
    fn clusters_around(&self, range: &Range<u64>) -> Range<u64> {
        let end = range.end.saturating_add(self.geometry.cluster_size() - 1);
        self.geometry.cluster_start(range.start)..self.geometry.cluster_start(end)
    }

    /// Tells whoever wants to know that a range may have changed.
    fn observe(&self, at: GuestOffset, len: u64) {
        if let Some(guard) = &self.guard {
            guard.record_write(at.0, len);
        }
        if let Some(observer) = &self.observer {
            observer.wrote(at, len);
        }
    }

    fn refused(&self, reason: String) -> Error {
        Error::Refused { file: self.file.name(), reason }
    }
}

/// Whether an in-place copy may have been interrupted here, which leaks what it had allocated and
/// not mapped yet. Version 2 cannot tell.
fn may_be_left(header: &Header) -> bool {
    header.version < 3 || header.incompatible_features & incompatible::UNFINISHED_COPY != 0
}

/// Refuses what an editor cannot serve, before anything is written.
fn refuse_unusable(file: &dyn Storage, header: &Header, options: &EditorOptions) -> Result<()> {
    let refused = |reason: &str| Err(Error::Refused { file: file.name(), reason: reason.into() });
    let is_unfinished = header.incompatible_features & incompatible::UNFINISHED_COPY != 0;
    if is_unfinished && !options.is_in_place_copy {
        return Err(Error::condition(file.name(), Condition::UnfinishedCopy));
    }
    if header.has_data_file() && options.data.is_none() {
        return refused("has an external data file, which was not opened");
    }
    if header.has_data_file() && header.nb_snapshots > 0 {
        return refused("has internal snapshots beside an external data file");
    }
    if !header.has_data_file() && options.data.is_some() {
        return refused("has no external data file, but one was given");
    }
    if header.backing_file.is_some() && options.backing.is_none() {
        return refused("has a backing file, which was not opened");
    }
    if header.backing_file.is_none() && options.backing.is_some() {
        return refused("has no backing file, but one was given");
    }
    if header.backing_file.is_some() && header.autoclear_features & autoclear::DATA_FILE_RAW != 0 {
        return refused("has a backing file, but its external data file claims to hold everything");
    }
    Ok(())
}

/// Why every call is refused once a metadata write or sync has failed: what the file holds is not
/// known any more, so nothing is written on top of it.
const POISONED: &str = "an earlier write or sync of its metadata failed; close it, check it and \
                        open it again";
