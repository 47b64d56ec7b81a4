//! Writing a new image, append-only: data first, metadata last, the header made valid last of all.
//!
//! Nothing here can corrupt an image, since until [`NewImage::finish`] the file has none: its first
//! cluster stays zero. What this module does not do: write into an image that exists (see `edit`),
//! create or rename files.
//!
//! ```text
//! header | L1 table | L2 tables, data, compressed clusters as they come | bitmaps | refcounts
//! ```

mod compressed;
mod convert;
mod map;
mod options;
mod read;
mod refcounts;
mod reopen;
mod seal;
mod space;
mod step;
mod write;
mod zero;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::bitmaps::PersistentBitmap;
use crate::error::{Error, Result};
use crate::first_failure::FirstFailure;
use crate::image::LayerExtent;
use crate::image::decode::Decoders;
use crate::in_memory;
use crate::layout::geometry::Geometry;
use crate::layout::header::{CompressionType, Header};
use crate::layout::units::GuestOffset;
use crate::storage::{Storage, StorageExt};
use map::Map;
use space::Space;
use step::Rules;

pub use options::{Backing, BackingReader, CreateOptions, DataFile};

/// Locks under which clusters are converted; see `convert`. A cluster uses the one of its number
/// modulo this.
const STRIPES: usize = 64;

/// A qcow2 image that is being made. All methods may be called from any thread at any time.
///
/// Two writes of overlapping ranges at the same time leave one or the other in each sector. A range
/// that reaches beyond the disk is refused and changes nothing; after any other error the image
/// cannot be finished.
#[derive(Debug)]
pub struct NewImage {
    file: Arc<dyn Storage>,
    /// Where guest data goes, if not into `file`.
    data: Option<Arc<dyn Storage>>,
    backing: Option<Arc<dyn BackingReader>>,
    header: Header,
    geometry: Geometry,
    rules: Rules,
    /// Raw data file: everything is mapped to its own offset from the start.
    is_one_to_one: bool,
    map: Map,
    space: Space,
    decoders: Decoders,
    stripes: [Mutex<()>; STRIPES],
    /// Whether the image is finished. Held shared by every call but the one that finishes.
    is_finished: RwLock<bool>,
    first_failure: FirstFailure,
}

impl NewImage {
    /// Starts an image in `file`, which must be empty unless it is to be overwritten: that what is
    /// not written reads as zero is what makes this writer fast. Nothing is written yet, but that a
    /// raw data file is made as long as the disk, and that a header that is to be overwritten is
    /// cleared, durably.
    pub fn create(file: Arc<dyn Storage>, options: &CreateOptions) -> Result<Self> {
        let is_fresh = file.length()? == 0;
        if !is_fresh && !options.overwrite {
            let reason = "a new image needs an empty file".to_owned();
            return Err(Error::Refused { file: file.name(), reason });
        }
        let data = options.data_file.as_ref();
        let is_virgin = data.map_or(Ok(is_fresh), |d| d.storage.length().map(|len| len == 0))?;
        let image =
            Self::assemble(file, options, Start { is_fresh, is_virgin, is_reopened: false })?;
        if !is_fresh {
            zero_out(image.file.as_ref(), 0, image.geometry.cluster_size())?;
            image.file.make_durable()?;
        }
        Ok(image)
    }

    /// Goes on with an image that [`create`](Self::create) started in `file` with the same options
    /// and that was never published, whether it was [synced](Self::sync), cut off by a crash, or
    /// finished. What was written before the last sync is there; what was written after it, may be.
    /// A header is cleared, durably.
    ///
    /// An error that is not [`Error::Io`] means that the file holds something else: start anew. An
    /// image in a file that held something before cannot be gone on with. Over a backing file, what
    /// is not known to be there is [uncovered](Self::uncover) before anything is written.
    pub fn reopen(file: Arc<dyn Storage>, options: &CreateOptions) -> Result<Self> {
        if options.overwrite {
            let reason = "an image that was not finished cannot be gone on with where it stands in \
                          a file that held something before";
            return Err(Error::Refused { file: file.name(), reason: reason.to_owned() });
        }
        let is_virgin = options.data_file.is_none();
        let start = Start { is_fresh: true, is_virgin, is_reopened: true };
        let image = Self::assemble(file, options, start)?;
        image.recover()?;
        Ok(image)
    }

    fn assemble(file: Arc<dyn Storage>, options: &CreateOptions, start: Start) -> Result<Self> {
        let name = file.name();
        options.check(&name)?;
        let header = options.header(&name)?;
        let geometry = header.geometry();
        let data = options.data_file.as_ref();
        let is_one_to_one = data.is_some_and(|d| d.is_raw);
        if let Some(data) = data.filter(|d| d.is_raw) {
            lengthen(data.storage.as_ref(), header.size)?;
        }
        let rules = Rules {
            has_backing: options.backing.is_some(),
            is_virgin: start.is_virgin,
            has_zero_flag: options.version >= 3,
            is_reopened: start.is_reopened,
        };
        let shape = (geometry, start.is_fresh);
        let map = Map::new(Arc::clone(&file), shape, header.size, data.is_some());
        let l1_clusters = geometry.clusters_for(map.l1_len() * 8);
        let mut first = 1 + l1_clusters;
        if is_one_to_one {
            map.place_tables(first << geometry.cluster_bits());
            first += map.l1_len();
        }
        Ok(Self {
            data: data.map(|d| Arc::clone(&d.storage)),
            backing: options.backing.as_ref().and_then(|b| b.reader.clone()),
            space: Space::new(name, geometry, first),
            decoders: Decoders::default(),
            stripes: std::array::from_fn(|_| Mutex::new(())),
            is_finished: RwLock::new(false),
            first_failure: FirstFailure::default(),
            file,
            header,
            geometry,
            rules,
            is_one_to_one,
            map,
        })
    }

    /// Virtual size in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.header.size
    }

    /// Cluster arithmetic.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Writes all of `buf` at any alignment. Units (clusters or subclusters) that are all zero are
    /// stored as zeroes are, not as data, and so are pieces of 4 KiB in a new cluster. With a
    /// backing file and no reader for it, a unit that was not written yet must be covered whole
    /// (the end of the disk completes the last one).
    pub fn write_at(&self, buf: &[u8], at: GuestOffset) -> Result<()> {
        self.check_range(at, buf.len() as u64)?;
        self.while_open(|| self.write(buf, at.0))
    }

    /// Makes the range read as zero. The rule of [`write_at`](Self::write_at) for units covered in
    /// part holds here too.
    pub fn write_zeroes(&self, at: GuestOffset, len: u64) -> Result<()> {
        self.check_range(at, len)?;
        self.while_open(|| self.zero(at.0, len, self.rules))
    }

    /// Gives up the content of the units that lie in the range whole; it reads as anything
    /// afterwards.
    pub fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        self.check_range(at, len)?;
        self.while_open(|| self.forget(at.0, len))
    }

    /// Lets the clusters that lie in the range whole (the end of the disk completes the last one)
    /// read as if nothing had been written to them: as what is below, or zero.
    pub fn uncover(&self, at: GuestOffset, len: u64) -> Result<()> {
        self.check_range(at, len)?;
        self.while_open(|| self.unmap(at.0, len))
    }

    /// Whether the range is known to read as zero now. `false` means "not known".
    pub fn reads_as_zero(&self, at: GuestOffset, len: u64) -> bool {
        self.check_range(at, len).is_ok()
            && (len == 0 || self.is_known_zero(at.0, len).unwrap_or(false))
    }

    /// Stores a compressed cluster as it is: `bytes` are exactly what its decoder consumes and
    /// decode to `cluster_size` bytes. `false`, and nothing is changed, where this image cannot
    /// hold it in that form (other cluster size or compression type, an external data file, a
    /// cluster that has been stored as data already): the caller then writes the content.
    ///
    /// Storing the same cluster again leaves the earlier bytes in the file, unused.
    pub fn write_compressed(
        &self,
        at: GuestOffset,
        compression: CompressionType,
        cluster_size: u64,
        bytes: &[u8],
    ) -> Result<bool> {
        let left = self.header.size.saturating_sub(at.0);
        self.check_range(at, cluster_size.min(left.max(1)))?;
        if !self.holds(compression, cluster_size, bytes.len())
            || self.geometry.in_cluster(at.0) != 0
        {
            return Ok(false);
        }
        self.while_open(|| self.store_compressed(at.0 >> self.geometry.cluster_bits(), bytes))
    }

    /// Reads what was written. Fails where the backing file would have to be read and no reader was
    /// given.
    pub fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<()> {
        self.check_range(at, buf.len() as u64)?;
        self.read(buf, at.0)
    }

    /// Where the content at `at` stands, by the tables alone: a stretch of at most `max_len` bytes
    /// (which must not be zero) of one kind. Of what others write meanwhile it may tell or not.
    pub fn placed(&self, at: GuestOffset, max_len: u64) -> Result<LayerExtent> {
        self.check_range(at, max_len)?;
        self.place_of(at.0, max_len)
    }

    /// Hands buffered tables to the system. Not durable, and the image is not valid before
    /// [`finish`](Self::finish).
    pub fn flush(&self) -> Result<()> {
        self.while_open(|| self.map.flush())
    }

    /// Makes everything written before durable. The image is still not valid, but
    /// [`reopen`](Self::reopen) finds all of it. Works after an error too, for what was written
    /// without one.
    pub fn sync(&self) -> Result<()> {
        let is_finished = self.is_finished.read().unwrap_or_else(PoisonError::into_inner);
        if *is_finished {
            return self.check_open(true);
        }
        self.save().inspect_err(|error| self.first_failure.note(error))
    }

    fn save(&self) -> Result<()> {
        self.map.flush()?;
        self.data().make_durable()?;
        if self.data.is_some() { self.file.make_durable() } else { Ok(()) }
    }

    /// Writes what is missing and `bitmaps`, makes it durable, and then makes the header valid,
    /// durably. Waits for calls under way; afterwards the image can only be read.
    ///
    /// An error means that there is no valid image, as far as the file still obeyed. After
    /// [`Error::Bitmap`], which says that a bitmap cannot be stored, one may try again without it.
    pub fn finish(&self, bitmaps: &[PersistentBitmap]) -> Result<()> {
        let mut is_finished = self.is_finished.write().unwrap_or_else(PoisonError::into_inner);
        self.check_open(*is_finished)?;
        if let Some(bitmap) = bitmaps.first().filter(|_| self.header.version < 3) {
            let reason = "cannot be stored in a version 2 image".to_owned();
            return Err(Error::Bitmap {
                file: self.file.name(),
                name: bitmap.name.clone(),
                reason,
            });
        }
        let sealed = self.seal(bitmaps);
        *is_finished = sealed.is_ok();
        sealed.inspect_err(|error| {
            if !matches!(error, Error::Bitmap { .. }) {
                self.first_failure.note(error);
            }
        })
    }

    /// Runs one call, unless the image is finished or beyond repair.
    fn while_open<T>(&self, call: impl FnOnce() -> Result<T>) -> Result<T> {
        let is_finished = self.is_finished.read().unwrap_or_else(PoisonError::into_inner);
        self.check_open(*is_finished)?;
        call().inspect_err(|error| self.first_failure.note(error))
    }

    fn check_open(&self, is_finished: bool) -> Result<()> {
        if is_finished {
            let reason = "the new image is finished".to_owned();
            return Err(Error::Refused { file: self.file.name(), reason });
        }
        self.first_failure.check(|| self.file.name(), "an earlier write to the new image failed")
    }

    fn check_range(&self, at: GuestOffset, len: u64) -> Result<()> {
        let size = self.header.size;
        if at.0.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        let reason =
            format!("{len} bytes at guest offset {at} reach beyond the disk of {size} bytes");
        Err(Error::Refused { file: self.file.name(), reason })
    }

    /// Where guest data goes.
    fn data(&self) -> &dyn Storage {
        self.data.as_ref().unwrap_or(&self.file).as_ref()
    }

    /// Clusters of the header and the L1 table.
    fn first_cluster(&self) -> u64 {
        1 + self.geometry.clusters_for(self.map.l1_len() * 8)
    }

    #[expect(clippy::indexing_slicing, reason = "taken modulo the length of the array")]
    fn stripe(&self, cluster: u64) -> MutexGuard<'_, ()> {
        let stripe = &self.stripes[in_memory(cluster % STRIPES as u64)];
        stripe.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the file is at first.
#[derive(Debug, Clone, Copy)]
struct Start {
    /// Nothing was in it, or nothing behind what the map points to.
    is_fresh: bool,
    /// New guest clusters read as zero.
    is_virgin: bool,
    /// It was being written before.
    is_reopened: bool,
}

/// Makes a range of a file read as zero.
fn zero_out(storage: &dyn Storage, at: u64, len: u64) -> Result<()> {
    storage.write_zeroes(at, len).map_err(|e| storage.io_error("write zeroes", at, e))
}

/// Makes a file at least `len` bytes long.
fn lengthen(storage: &dyn Storage, len: u64) -> Result<()> {
    if storage.length()? >= len {
        return Ok(());
    }
    storage.set_len(len).map_err(|e| storage.io_error("set the length to", len, e))
}
