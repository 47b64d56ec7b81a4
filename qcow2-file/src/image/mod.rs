//! One open qcow2 layer: its map, its content, its compressed clusters. Reads only; the layers
//! below are the business of [`crate::chain`].
//!
//! One bad table entry makes the range that it maps unreadable, and nothing else.

mod cache;
pub(crate) mod decode;
mod map;
mod read;
mod recent;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

pub use map::{LayerExtent, LayerKind};
pub use read::CompressedCluster;

use crate::error::{Error, Result};
use crate::layout::geometry::Geometry;
use crate::layout::header::Header;
use crate::preflight::{self, Warning};
use crate::storage::{Storage, StorageExt};
use cache::TableCache;
use decode::Decoders;
pub(crate) use map::piece_at;
use recent::{KnownLengths, RecentCluster};

/// How an image is opened.
#[derive(Debug, Default, Clone)]
pub struct ImageOptions {
    /// The external data file. An image that has one opens without it, too, and then answers
    /// everything but reads of guest data.
    pub data: Option<Arc<dyn Storage>>,
    /// Open an image whose in-place copy was not finished (SPEC 3.3).
    pub accept_unfinished: bool,
    /// What the other layers of the same disk share; by default the layer has one for itself.
    pub shared: Option<Arc<Shared>>,
}

/// Memory that all layers of a disk share, so that it does not grow with their number: L2 tables,
/// decoders, and what was decoded last.
#[derive(Debug, Default)]
pub struct Shared {
    layers: AtomicU32,
    tables: TableCache,
    decoders: Decoders,
    recent: RecentCluster,
    lengths: KnownLengths,
}

/// One open qcow2 layer. May be read from any thread at any time, as long as nobody writes to the
/// file.
#[derive(Debug)]
pub struct Image {
    file: Arc<dyn Storage>,
    data: DataFile,
    header: Header,
    geometry: Geometry,
    warnings: Vec<Warning>,
    /// Raw entries of the active L1 table, as many as the disk needs.
    l1: Vec<u64>,
    shared: Arc<Shared>,
    /// This layer's number in `shared`.
    layer: u32,
    file_end: KnownEnd,
    data_end: KnownEnd,
}

/// Where guest data is.
#[derive(Debug)]
enum DataFile {
    /// In the image.
    Inside,
    /// In a file of its own; `None` when it was not opened.
    Outside(Option<Arc<dyn Storage>>),
}

impl Image {
    /// Opens a layer. `data` is the external data file, where the image has one.
    pub fn open(file: Arc<dyn Storage>, data: Option<Arc<dyn Storage>>) -> Result<Self> {
        Self::open_with(file, ImageOptions { data, ..ImageOptions::default() })
    }

    /// Opens a layer. The header and its tables are checked; entries of the tables are checked when
    /// they are used.
    pub fn open_with(file: Arc<dyn Storage>, options: ImageOptions) -> Result<Self> {
        let header = preflight::read_header(&*file)?;
        Self::with_header(file, header, options)
    }

    /// [`open_with`](Self::open_with) for a caller who has read the header.
    pub(crate) fn with_header(
        file: Arc<dyn Storage>,
        header: Header,
        options: ImageOptions,
    ) -> Result<Self> {
        let warnings = preflight::check_readable(&*file, &header, options.accept_unfinished)?;
        let l1 = preflight::read_l1(&*file, &header)?;
        let has_data_file = header.has_data_file();
        let data = if has_data_file { DataFile::Outside(options.data) } else { DataFile::Inside };
        let shared = options.shared.unwrap_or_default();
        Ok(Self {
            data,
            geometry: header.geometry(),
            warnings,
            l1,
            layer: shared.layers.fetch_add(1, Ordering::Relaxed),
            shared,
            file_end: KnownEnd::default(),
            data_end: KnownEnd::default(),
            header,
            file,
        })
    }

    /// The decoded header.
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

    /// What a user should know about the image.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Internal snapshots. Only the active state is read.
    pub fn snapshot_count(&self) -> u32 {
        self.header.nb_snapshots
    }

    /// The image file.
    pub fn file(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    /// The file that holds guest data: the external data file, or the image itself. `None` when the
    /// external data file was not opened.
    pub fn data(&self) -> Option<&Arc<dyn Storage>> {
        match &self.data {
            DataFile::Inside => Some(&self.file),
            DataFile::Outside(data) => data.as_ref(),
        }
    }

    /// Forgets every L2 table that was read. For a caller who changed them; the L1 table is not
    /// read again.
    pub fn forget_tables(&self) {
        self.shared.tables.forget(self.layer);
        self.shared.recent.forget();
        self.shared.lengths.forget();
    }

    fn has_data_file(&self) -> bool {
        matches!(self.data, DataFile::Outside(_))
    }

    fn data_file(&self) -> Result<&Arc<dyn Storage>> {
        self.data().ok_or_else(|| Error::Refused {
            file: self.file.name(),
            reason: "guest data is in an external data file that was not opened".to_owned(),
        })
    }
}

/// How far a file is known to reach. Files are only expected to grow; asking the system at every
/// cluster would cost more than the map does.
#[derive(Debug, Default)]
struct KnownEnd(AtomicU64);

impl KnownEnd {
    /// Whether `offset` lies inside `file`.
    fn holds(&self, file: &dyn Storage, offset: u64) -> Result<bool> {
        if offset < self.0.load(Ordering::Relaxed) {
            return Ok(true);
        }
        Ok(offset < self.refresh(file)?)
    }

    fn refresh(&self, file: &dyn Storage) -> Result<u64> {
        let len = file.length()?;
        self.0.store(len, Ordering::Relaxed);
        Ok(len)
    }
}
