//! Files as disks: what the qcow2 crate opens and writes, behind the contracts of `mig-core`.

mod chain;
mod editor;
mod held;
mod new_image;
mod raw;
mod start;

use format_spec::Blame;
use mig_core::Error;
use mig_core::block::{Compression, Extent, ExtentKind};
use qcow2_file::layout::header::CompressionType;
use qcow2_file::{LayerExtent, LayerKind};

pub use chain::{AboveSource, ChainBacking, ChainSource};
pub use editor::{EditorDisk, EditorSink};
pub use held::HeldSource;
pub use new_image::NewImageSink;
pub use raw::RawSink;
pub use start::StartOf;

/// Names the guest range at which an image failed.
fn failed(operation: &'static str, offset: u64) -> impl Fn(qcow2_file::Error) -> Error {
    move |e| Error::Device { operation, offset, blame: e.blame(), source: Box::new(e) }
}

/// Names the guest range at which plain storage failed.
fn storage_failed(operation: &'static str, offset: u64) -> impl Fn(std::io::Error) -> Error {
    move |e| Error::Device { operation, offset, blame: Blame::Device, source: Box::new(e) }
}

/// A stretch of the only layer of a disk.
fn layer_extent(found: LayerExtent) -> Extent {
    let kind = match found.kind {
        LayerKind::Data => ExtentKind::Data,
        LayerKind::Compressed => ExtentKind::Compressed,
        LayerKind::Zero => ExtentKind::Zero,
        LayerKind::Unallocated => ExtentKind::Hole,
    };
    Extent { len: found.len, kind, host: found.host.map(|host| host.0) }
}

/// QEMU's word for a kind of compression.
pub fn compression_type(compression: Compression) -> CompressionType {
    match compression {
        Compression::Deflate => CompressionType::Zlib,
        Compression::Zstd => CompressionType::Zstd,
    }
}

/// A kind of compression, by QEMU's word.
pub fn compression(kind: CompressionType) -> Compression {
    match kind {
        CompressionType::Zlib => Compression::Deflate,
        CompressionType::Zstd => Compression::Zstd,
    }
}
