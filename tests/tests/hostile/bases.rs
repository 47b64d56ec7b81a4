//! Sound images that the recipes start from, made once by `qemu-img`, and where things are in them.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bitferry_tests::image::{Bytes, make};
use bitferry_tests::qemu::{qemu_img, qemu_io};
use bitferry_tests::{Run, Scratch};

pub(crate) const MIB: u64 = 1 << 20;

/// What a recipe starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Base {
    /// 64 KiB clusters, 8 MiB, data in three places, one bitmap with one bit.
    Plain,
    /// 4 KiB clusters, 64 MiB: several L2 tables.
    Small,
    /// Version 2.
    Old,
    /// zlib clusters.
    Zlib,
    /// zstd clusters.
    Zstd,
    /// Extended L2 entries, one cluster written in part.
    Extended,
    /// An internal snapshot.
    Snapshot,
    /// Two bitmaps of 64 KiB and 4 KiB granularity with bits in both; the disk ends inside a
    /// granule.
    Bitmaps,
}

pub(crate) const ALL: &[Base] = &[
    Base::Plain,
    Base::Small,
    Base::Old,
    Base::Zlib,
    Base::Zstd,
    Base::Extended,
    Base::Snapshot,
    Base::Bitmaps,
];

impl Base {
    /// The sound image. Made on the first call.
    pub(crate) fn path(self) -> &'static Path {
        static MADE: OnceLock<(Scratch, Vec<PathBuf>)> = OnceLock::new();
        let (_, paths) = MADE.get_or_init(|| {
            let scratch = Scratch::new();
            let paths = ALL.iter().map(|base| base.make(&scratch)).collect();
            (scratch, paths)
        });
        let at = ALL.iter().position(|b| *b == self).expect("listed");
        &paths[at]
    }

    fn make(self, scratch: &Scratch) -> PathBuf {
        let name = format!("{self:?}.qcow2");
        let image = make(scratch, &name, 8 * MIB);
        match self {
            Self::Plain => {
                let image = image.write(1, 0, MIB).bitmap("b0", 65536).write(2, 4 * MIB, 65536);
                image.write(3, 8 * MIB - 512, 512).done()
            }
            Self::Small => {
                let image = make(scratch, &name, 64 * MIB).option("cluster_size=4k");
                image.write(1, 0, 65536).write(2, 32 * MIB, 65536).bitmap("b0", 65536).done()
            }
            Self::Old => image.option("compat=0.10").write(1, 0, MIB).write(2, 4 * MIB, 512).done(),
            Self::Zlib => compressed(scratch, &name, "zlib"),
            Self::Zstd => compressed(scratch, &name, "zstd"),
            Self::Extended => {
                let image = image.option("extended_l2=on").option("cluster_size=128k");
                image.write(1, 0, MIB).write(2, 4 * MIB + 8192, 4096).done()
            }
            Self::Snapshot => image.write(1, 0, MIB).snapshot("s1").write(2, 65536, 65536).done(),
            Self::Bitmaps => {
                let image = make(scratch, &name, 8 * MIB - 512 - 4096).write(1, 0, MIB);
                let image = image.bitmap("b0", 65536).bitmap("b1", 4096).write(2, 2 * MIB, 65536);
                image.write(3, 8 * MIB - 512 - 8192, 512).done()
            }
        }
    }
}

/// Text compresses: every cluster of the first MiB is stored compressed.
fn compressed(scratch: &Scratch, name: &str, method: &str) -> PathBuf {
    let raw = scratch.path("text.raw");
    let text: Vec<u8> = (0u32..262_144).flat_map(|n| (n / 3).to_le_bytes()).collect();
    std::fs::write(&raw, text).expect("write");
    let path = scratch.path(name);
    let options = format!("compression_type={method}");
    let run = qemu_img("convert").words("-c -f raw -O qcow2 -o").arg(options);
    run.arg(&raw).arg(&path).ok();
    qemu_io(&path, "qcow2", ["write -P 9 65536 65536"]);
    path
}

/// Where the structures of an image are, as far as a recipe needs them.
pub(crate) struct Places {
    pub(crate) cluster: u64,
    pub(crate) l1: u64,
    pub(crate) refcount_table: u64,
    pub(crate) refcount_block: u64,
    pub(crate) l2: u64,
    pub(crate) entry_bytes: u64,
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

pub(crate) fn places(image: &Bytes) -> Places {
    let l1 = image.be64(40);
    let refcount_table = image.be64(48);
    let is_extended = image.be32(4) == 3 && image.be64(72) & 16 != 0;
    Places {
        cluster: 1 << image.be32(20),
        l1,
        refcount_table,
        refcount_block: image.be64(refcount_table) & OFFSET,
        l2: image.be64(l1) & OFFSET,
        entry_bytes: if is_extended { 16 } else { 8 },
    }
}

/// Offset of the bitmap directory entry `index`.
pub(crate) fn bitmap_entry(image: &Bytes, index: usize) -> u64 {
    let (extension, _) = image.extension(0x2385_2875).expect("bitmaps");
    let mut at = image.be64(extension + 16);
    for _ in 0..index {
        let name = u64::from(u16::from_be_bytes(image.get(at + 18)));
        let extra = u64::from(image.be32(at + 20));
        at += (24 + name + extra).next_multiple_of(8);
    }
    at
}

/// Offset of the data of the bitmaps header extension.
pub(crate) fn bitmaps_extension(image: &Bytes) -> u64 {
    image.extension(0x2385_2875).expect("bitmaps").0
}

/// Offset of the first entry of a bitmap's table.
pub(crate) fn bitmap_table(image: &Bytes, index: usize) -> u64 {
    image.be64(bitmap_entry(image, index))
}

/// Offset of a bitmap's first data cluster.
pub(crate) fn bitmap_data(image: &Bytes, index: usize) -> u64 {
    image.be64(bitmap_table(image, index)) & OFFSET
}

/// A copy with holes, as fast as the file system can.
pub(crate) fn duplicate(from: &Path, to: &Path) {
    Run::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to).ok();
}
