//! The shape of a qcow2 destination: what was asked for, else what the source has, else defaults.
//! Pure.

use block_mig::device::compression_type;
use qcow2_file::create::CreateOptions;
use qcow2_file::layout::geometry::Geometry;
use qcow2_file::layout::header::{CompressionType, Header, compatible};

use super::options::TargetOptions;
use crate::{Error, Result};

/// Extended L2 entries need clusters of 16 KiB, so that a subcluster has a sector at least.
const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;

/// What fixes a qcow2 image besides its content and the files it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_bits: u32,
    pub(crate) extended_l2: bool,
    pub(crate) compression_type: CompressionType,
    pub(crate) lazy_refcounts: bool,
}

impl Shape {
    /// The shape of an existing image.
    pub(crate) fn of(header: &Header) -> Self {
        Self {
            version: header.version,
            cluster_bits: header.cluster_bits,
            refcount_bits: 1 << header.refcount_order,
            extended_l2: header.geometry().has_subclusters(),
            compression_type: header.compression_type,
            lazy_refcounts: header.compatible_features & compatible::LAZY_REFCOUNTS != 0,
        }
    }

    /// The shape of a new image: that of the source, where it is qcow2 too, changed as the user
    /// asked.
    pub(crate) fn decide(source: Option<&Header>, wish: &TargetOptions) -> Result<Self> {
        let model = source.map_or(Self::usual(), Self::of);
        let cluster_bits = match wish.cluster_size {
            Some(size) => bits_of(size)?,
            None => model.cluster_bits,
        };
        let mut shape = Self {
            version: wish.version.unwrap_or(model.version),
            cluster_bits,
            refcount_bits: wish.refcount_bits.unwrap_or(model.refcount_bits),
            // What only the source had gives way where what was asked for has no room for it.
            extended_l2: wish
                .extended_l2
                .unwrap_or(model.extended_l2 && cluster_bits >= MIN_EXTENDED_CLUSTER_BITS),
            compression_type: wish
                .compression_type
                .map_or(model.compression_type, compression_type),
            lazy_refcounts: model.lazy_refcounts,
        };
        if wish.version.is_none() && shape.needs_version_3(wish) {
            shape.version = 3;
        }
        if wish.version == Some(2) {
            shape.forget_version_3(wish);
        }
        Ok(shape)
    }

    /// The defaults of `qemu-img create`.
    fn usual() -> Self {
        let usual = CreateOptions::new(0);
        Self {
            version: usual.version,
            cluster_bits: usual.cluster_bits,
            refcount_bits: usual.refcount_bits,
            extended_l2: usual.extended_l2,
            compression_type: usual.compression_type,
            lazy_refcounts: usual.lazy_refcounts,
        }
    }

    /// Whether something that version 2 has not was asked for.
    fn needs_version_3(&self, wish: &TargetOptions) -> bool {
        self.extended_l2
            || self.refcount_bits != 16
            || self.compression_type != CompressionType::Zlib
            || wish.data_file.is_some()
    }

    /// Drops what only the source had; what was asked for stays, and is refused where it does not
    /// fit.
    fn forget_version_3(&mut self, wish: &TargetOptions) {
        self.lazy_refcounts = false;
        if wish.extended_l2.is_none() {
            self.extended_l2 = false;
        }
        if wish.refcount_bits.is_none() {
            self.refcount_bits = 16;
        }
        if wish.compression_type.is_none() {
            self.compression_type = CompressionType::Zlib;
        }
    }

    /// Cluster arithmetic of this shape.
    pub(crate) fn geometry(&self) -> Geometry {
        Geometry::new(self.cluster_bits, self.refcount_bits.max(1).ilog2(), self.extended_l2)
    }

    /// Options to create an image of `size` bytes with; names of other files are still missing.
    pub(crate) fn create_options(&self, size: u64) -> CreateOptions {
        CreateOptions {
            cluster_bits: self.cluster_bits,
            refcount_bits: self.refcount_bits,
            version: self.version,
            extended_l2: self.extended_l2,
            compression_type: self.compression_type,
            lazy_refcounts: self.lazy_refcounts,
            ..CreateOptions::new(size)
        }
    }
}

fn bits_of(cluster_size: u64) -> Result<u32> {
    if !cluster_size.is_power_of_two() {
        let reason = format!("cluster_size={cluster_size} is not a power of two");
        return Err(Error::Usage { reason });
    }
    Ok(cluster_size.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mig_core::block::Compression;

    fn wish() -> TargetOptions {
        TargetOptions::default()
    }

    fn source() -> Header {
        let shape = Shape {
            cluster_bits: 12,
            refcount_bits: 64,
            compression_type: CompressionType::Zstd,
            lazy_refcounts: true,
            ..Shape::usual()
        };
        let file = std::sync::Arc::new(qcow2_file::Memory::new());
        let image = qcow2_file::create::NewImage::create(file.clone(), &shape.create_options(512));
        image.unwrap().finish(&[]).unwrap();
        qcow2_file::preflight::read_header(&*file).unwrap()
    }

    #[test]
    fn the_source_is_the_model_unless_asked_otherwise() {
        let source = source();
        let shape = Shape::decide(Some(&source), &wish()).unwrap();
        assert_eq!(shape, Shape::of(&source));
        let wish = TargetOptions { cluster_size: Some(65536), ..wish() };
        let shape = Shape::decide(Some(&source), &wish).unwrap();
        assert_eq!((shape.cluster_bits, shape.refcount_bits), (16, 64));
        assert_eq!(Shape::decide(None, &TargetOptions::default()).unwrap(), Shape::usual());
    }

    #[test]
    fn the_version_follows_what_is_asked() {
        let old = TargetOptions { version: Some(2), ..wish() };
        let shape = Shape::decide(Some(&source()), &old).unwrap();
        assert_eq!((shape.version, shape.refcount_bits), (2, 16));
        assert_eq!(shape.compression_type, CompressionType::Zlib);
        let mut v2 = source();
        (v2.version, v2.refcount_order) = (2, 4);
        v2.compression_type = CompressionType::Zlib;
        v2.incompatible_features = 0;
        assert_eq!(Shape::decide(Some(&v2), &wish()).unwrap().version, 2);
        let zstd = TargetOptions { compression_type: Some(Compression::Zstd), ..wish() };
        assert_eq!(Shape::decide(Some(&v2), &zstd).unwrap().version, 3);
        assert!(
            Shape::decide(None, &TargetOptions { cluster_size: Some(1000), ..wish() }).is_err()
        );
    }
}
