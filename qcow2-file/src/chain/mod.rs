//! A disk: one layer, or several of which each shows what the one above does not hold.

mod format;
mod open;
mod raw;

use std::path::Path;
use std::sync::Arc;

pub use format::{Format, PROBE_BYTES, UnknownFormat, foreign_format, probe};
pub use open::{Backing, Opener, has_protocol, named_path};
pub use raw::RawLayer;

use crate::error::Result;
use crate::image::{CompressedCluster, Image, LayerExtent, LayerKind};
use crate::layout::units::{GuestOffset, HostOffset};
use crate::limits;
use crate::lock::Lock;
use crate::preflight::Warning;
use crate::storage::{HostFile, Storage};

/// One layer of a chain.
#[derive(Debug)]
pub enum Layer {
    /// A qcow2 image.
    Qcow2(Box<Image>),
    /// A raw file or device: always the lowest layer.
    Raw(RawLayer),
}

impl Layer {
    /// Guest-visible size in bytes, a multiple of 512.
    pub fn virtual_size(&self) -> u64 {
        match self {
            Self::Qcow2(image) => image.virtual_size(),
            Self::Raw(raw) => raw.virtual_size(),
        }
    }

    /// The format it was opened as.
    pub fn format(&self) -> Format {
        match self {
            Self::Qcow2(_) => Format::Qcow2,
            Self::Raw(_) => Format::Raw,
        }
    }

    /// The qcow2 image, where it is one.
    pub fn as_qcow2(&self) -> Option<&Image> {
        match self {
            Self::Qcow2(image) => Some(image),
            Self::Raw(_) => None,
        }
    }

    /// The layer's own file.
    pub fn file(&self) -> &Arc<dyn Storage> {
        match self {
            Self::Qcow2(image) => image.file(),
            Self::Raw(raw) => raw.file(),
        }
    }

    /// The file that holds guest data; see [`Image::data`].
    pub fn data(&self) -> Option<&Arc<dyn Storage>> {
        match self {
            Self::Qcow2(image) => image.data(),
            Self::Raw(raw) => Some(raw.file()),
        }
    }

    fn extent(&self, at: GuestOffset, max_len: u64) -> Result<LayerExtent> {
        match self {
            Self::Qcow2(image) => image.extent(at, max_len),
            Self::Raw(raw) => raw.extent(at, max_len),
        }
    }

    fn mapped(&self, at: GuestOffset, max_len: u64) -> Result<LayerExtent> {
        match self {
            Self::Qcow2(image) => image.mapped(at, max_len),
            // Reading a hole costs no more than finding it.
            Self::Raw(raw) => Ok(raw.whole(at, max_len)),
        }
    }

    fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.read_at(buf, at),
            Self::Raw(raw) => raw.read_at(buf, at),
        }
    }
}

/// How a stretch of a disk reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChainKind {
    /// Stored content.
    Data,
    /// Stored compressed.
    Compressed,
    /// Reads as zero because a layer says so; allocated or not.
    Zero,
    /// In no layer, or a hole of a raw file: reads as zero.
    Hole,
}

/// A stretch of a disk of one kind, from one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainExtent {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// How it reads.
    pub kind: ChainKind,
    /// Where it stands in the file that holds the layer's guest data, contiguously.
    pub host: Option<HostOffset>,
    /// The layer that decides: 0 is the top. For what is in no layer, the lowest one that was
    /// asked.
    pub depth: usize,
}

impl ChainExtent {
    fn joins(&self, next: &Self) -> bool {
        let follows = self.host.map(|h| h.0.saturating_add(self.len)) == next.host.map(|h| h.0);
        self.kind == next.kind && self.depth == next.depth && follows
    }
}

/// Files of a layer that an [`Opener`] opened.
#[derive(Debug, Clone)]
pub struct LayerFiles {
    /// The layer's own file.
    pub file: Arc<HostFile>,
    /// Its external data file.
    pub data: Option<Arc<HostFile>>,
}

/// A disk of one or more layers, open for reading. May be read from any thread at any time, as long
/// as nobody writes to its files.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Layer>,
    files: Vec<LayerFiles>,
    warnings: Vec<(Arc<str>, Warning)>,
    is_probed: bool,
    /// Given back when the chain is dropped.
    locks: Vec<Lock>,
}

impl Chain {
    /// A disk of layers that the caller opened, the top first. `None` without any.
    pub fn from_layers(layers: Vec<Layer>) -> Option<Self> {
        layers.first()?;
        let (files, warnings, locks) = (Vec::new(), Vec::new(), Vec::new());
        Some(Self { layers, files, warnings, is_probed: false, locks })
    }

    /// Guest-visible size in bytes: the top layer's.
    pub fn virtual_size(&self) -> u64 {
        self.layers.first().map_or(0, Layer::virtual_size)
    }

    /// All layers, the top first; never empty.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The top layer.
    #[allow(clippy::indexing_slicing, reason = "no constructor makes a chain without layers")]
    pub fn top(&self) -> &Layer {
        &self.layers[0]
    }

    /// The files of all layers, the top first; empty when no [`Opener`] opened them.
    pub fn files(&self) -> &[LayerFiles] {
        &self.files
    }

    /// Where they are: each layer's own file, then its data file.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let layers = self.files.iter();
        layers.flat_map(|l| [Some(&l.file), l.data.as_ref()]).flatten().map(|file| file.path())
    }

    /// What a user should know, with the file it is about.
    pub fn warnings(&self) -> &[(Arc<str>, Warning)] {
        &self.warnings
    }

    /// Whether its files are locked.
    pub fn is_locked(&self) -> bool {
        !self.locks.is_empty()
    }

    /// Whether the top's format was found by looking at its content.
    pub fn is_probed(&self) -> bool {
        self.is_probed
    }

    /// The extent that starts at `at`, at most `max_len` bytes (neither zero nor beyond the end),
    /// merged as far as that is cheap: the next one may be of the same kind.
    pub fn extent(&self, at: GuestOffset, max_len: u64) -> Result<ChainExtent> {
        let max_len = max_len.min(self.virtual_size().saturating_sub(at.0)).max(1);
        if self.layers.len() == 1 {
            return self.look(at, max_len, Layer::extent);
        }
        // An upper layer that is empty would be walked to its end for every extent of a lower one.
        let mut window = limits::FIRST_EXTENT_WINDOW;
        let mut found = self.look(at, max_len.min(window), Layer::extent)?;
        while found.len >= window && found.len < max_len {
            window = window.saturating_mul(2);
            let next_at = GuestOffset(at.0.saturating_add(found.len));
            let left = max_len.saturating_sub(found.len);
            match self.look(next_at, left.min(window), Layer::extent) {
                Ok(next) if found.joins(&next) => found.len = found.len.saturating_add(next.len),
                _ => break,
            }
        }
        Ok(found)
    }

    /// [`extent`](Self::extent) by the tables alone: holes of files count as content.
    pub fn placed(&self, at: GuestOffset, max_len: u64) -> Result<ChainExtent> {
        self.look(at, max_len, Layer::mapped)
    }

    /// Asks the layers from the top down until one holds `at`.
    fn look(
        &self,
        at: GuestOffset,
        max_len: u64,
        ask: impl Fn(&Layer, GuestOffset, u64) -> Result<LayerExtent>,
    ) -> Result<ChainExtent> {
        let (mut len, mut depth) = (max_len, 0);
        for (index, layer) in self.layers.iter().enumerate() {
            let left = layer.virtual_size().saturating_sub(at.0);
            if left == 0 {
                // Beyond the end of a layer its overlay shows zeroes, whatever lies deeper.
                break;
            }
            depth = index;
            let found = ask(layer, at, len.min(left))?;
            len = found.len;
            let kind = match (found.kind, layer) {
                (LayerKind::Unallocated, _) => continue,
                (LayerKind::Zero, Layer::Raw(_)) => ChainKind::Hole,
                (LayerKind::Zero, Layer::Qcow2(_)) => ChainKind::Zero,
                (LayerKind::Data, _) => ChainKind::Data,
                (LayerKind::Compressed, _) => ChainKind::Compressed,
            };
            return Ok(ChainExtent { len, kind, host: found.host, depth });
        }
        Ok(ChainExtent { len, kind: ChainKind::Hole, host: None, depth })
    }

    /// Fills `buf` with what the guest reads at `at`. Never short; beyond the end of the disk there
    /// are zeroes.
    pub fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<()> {
        if let [only] = self.layers.as_slice() {
            return only.read_at(buf, at);
        }
        let (mut rest, mut at) = (buf, at);
        while !rest.is_empty() {
            let found = self.look(at, rest.len() as u64, Layer::mapped)?;
            let len = usize::try_from(found.len).unwrap_or(usize::MAX).clamp(1, rest.len());
            let (piece, tail) = rest.split_at_mut(len);
            match (found.kind, self.layers.get(found.depth)) {
                (ChainKind::Data | ChainKind::Compressed, Some(layer)) => {
                    layer.read_at(piece, at)?
                }
                _ => piece.fill(0),
            }
            rest = tail;
            at = GuestOffset(at.0.saturating_add(len as u64));
        }
        Ok(())
    }

    /// Where a compressed cluster starts at `at` and nothing above hides a part of it: appends its
    /// stored bytes to `stored`, as [`Image::read_compressed`] does.
    pub fn read_compressed(
        &self,
        at: GuestOffset,
        stored: &mut Vec<u8>,
    ) -> Result<Option<CompressedCluster>> {
        match self.compressed_layer(at)? {
            Some(image) => image.read_compressed(at, stored),
            None => Ok(None),
        }
    }

    fn compressed_layer(&self, at: GuestOffset) -> Result<Option<&Image>> {
        let left = self.virtual_size().saturating_sub(at.0);
        if left == 0 {
            return Ok(None);
        }
        // The largest cluster there is; what is longer than the layer's own is cut off below.
        let found = self.look(at, left.min(1 << limits::CLUSTER_BITS.end()), Layer::mapped)?;
        let image = self.layers.get(found.depth).and_then(Layer::as_qcow2);
        let Some(image) = image.filter(|_| found.kind == ChainKind::Compressed) else {
            return Ok(None);
        };
        let cluster_size = image.geometry().cluster_size();
        // A lower layer may be longer than the disk: what the disk cuts off must not be passed on.
        let is_end_of_top = found.depth == 0 && found.len == left;
        Ok((found.len >= cluster_size || is_end_of_top).then_some(image))
    }

    /// The path of the top layer, where an [`Opener`] opened it.
    pub fn path(&self) -> Option<&Path> {
        self.files.first().map(|f| f.file.path())
    }
}
