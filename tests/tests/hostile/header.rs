//! The header and its extensions.

use crate::bases::{Base, places};
use crate::recipes::{Recipe, Verdict, recipe};
use Base::{Old, Plain, Snapshot, Zstd};
use Verdict::{Any, Header, Sound, Unsupported};

const FEATURE_NAMES: u32 = 0x6803_f857;

pub(crate) fn recipes() -> Vec<Recipe> {
    let mut all = fields();
    all.extend(tables());
    all.extend(features());
    all.extend(extensions());
    all.extend(backing());
    all
}

/// Every value of `values` in the 32-bit field at `at`.
fn each(base: Base, at: u64, field: &'static str, values: &[u32]) -> Vec<Recipe> {
    let one = |value: u32| {
        recipe(base, format!("{field} {value:#x}"), Header(field), move |image| {
            image.put32(at, value);
        })
    };
    values.iter().map(|v| one(*v)).collect()
}

/// The same for 64 bits.
fn each64(base: Base, at: u64, field: &'static str, values: &[u64]) -> Vec<Recipe> {
    let one = |value: u64| {
        recipe(base, format!("{field} {value:#x}"), Header(field), move |image| {
            image.put64(at, value);
        })
    };
    values.iter().map(|v| one(*v)).collect()
}

fn fields() -> Vec<Recipe> {
    let mut all = Vec::new();
    all.extend(each(Plain, 4, "version", &[4, u32::MAX]));
    for version in [0, 1] {
        // Not qcow2, or of before it: without a word from the user something else.
        all.push(recipe(Plain, format!("version {version}"), Any, move |image| {
            image.put32(4, version);
        }));
    }
    all.extend(each(Plain, 20, "cluster_bits", &[0, 8, 22, 31, 63, 64, 255, 256, u32::MAX]));
    all.extend(each64(Plain, 24, "size", &[u64::MAX, 1 << 63, (1 << 61) + 512]));
    all.extend(each(Plain, 32, "crypt_method", &[3, u32::MAX]));
    all.extend(each(Plain, 96, "refcount_order", &[7, 64, 255, 256, u32::MAX]));
    all.extend(each(Plain, 100, "header", &[0, 72, 96, 105, 108, 65537, 1 << 31, u32::MAX]));
    all.extend(each(Plain, 60, "nb_snapshots", &[65537, u32::MAX]));
    for method in [1, 2] {
        let name = format!("encrypted with method {method}");
        all.push(recipe(Plain, name, Unsupported("ncrypt"), move |image| {
            image.put32(32, method);
        }));
    }
    all.push(recipe(Plain, "size needs more L1 than there is", Header("l1_size"), |image| {
        image.put64(24, 1 << 60);
    }));
    all.push(recipe(Plain, "size is not a multiple of 512", Sound, |image| {
        image.put64(24, (8 << 20) - 1);
    }));
    all.push(recipe(Old, "version 2 with a huge size", Header("l1_size"), |image| {
        image.put64(24, 1 << 55);
    }));
    all
}

fn tables() -> Vec<Recipe> {
    let mut all = Vec::new();
    all.extend(each(Plain, 36, "l1_size", &[0, 0x40_0001, u32::MAX]));
    all.extend(each64(Plain, 40, "l1_table_offset", &[0, 512, 0x30200, 1 << 62, u64::MAX]));
    let offsets = [0, 512, 0x10200, 1 << 62, u64::MAX];
    all.extend(each64(Plain, 48, "refcount_table_offset", &offsets));
    let clusters = [0, 0x81, 0x0010_0000, u32::MAX];
    all.extend(each(Plain, 56, "refcount_table_clusters", &clusters));
    all.extend(each64(Snapshot, 64, "snapshots_offset", &[0, 0x30200, 1 << 62]));
    all.push(recipe(Plain, "L1 table of 32 MiB in a small file", Any, |image| {
        image.put32(36, 0x40_0000);
    }));
    all.push(recipe(Plain, "L1 table beyond the end", Header("l1"), |image| {
        image.put64(40, (image.len() + (1 << 20)).next_multiple_of(65536));
    }));
    let no_refcounts = recipe(Plain, "refcount table beyond the end", Any, |image| {
        image.put64(48, (image.len() + (1 << 20)).next_multiple_of(65536));
    });
    all.push(no_refcounts.untouchable());
    all.push(recipe(Snapshot, "snapshot table beyond the end", Any, |image| {
        image.put64(64, (image.len() + (1 << 20)).next_multiple_of(65536));
    }));
    all.push(recipe(Snapshot, "65536 snapshots in a small file", Any, |image| {
        image.put32(60, 65536);
    }));
    all.push(recipe(Snapshot, "snapshot with a name of 64 KiB", Any, |image| {
        let table = image.be64(64);
        image.put16(table + 14, u16::MAX).put32(table + 36, u32::MAX);
    }));
    let snapshot_l1 = |value: u64| {
        move |image: &bitferry_tests::image::Bytes| {
            image.put64(image.be64(64), value);
        }
    };
    all.push(
        recipe(Snapshot, "snapshot's L1 beyond the end", Any, snapshot_l1(1 << 40)).untouchable(),
    );
    all.push(recipe(Snapshot, "snapshot's L1 misaligned", Any, snapshot_l1(0x30200)).untouchable());
    all.push(recipe(Snapshot, "snapshot's L1 is the header", Any, snapshot_l1(0)).untouchable());
    all
}

fn features() -> Vec<Recipe> {
    let mut all = Vec::new();
    for bit in [5u64, 6, 31, 61, 63] {
        let name = format!("unknown incompatible bit {bit}");
        all.push(recipe(Plain, name, Unsupported("feature"), move |image| {
            image.put64(72, 1 << bit);
        }));
    }
    all.push(recipe(Plain, "unfinished in-place copy", Any, |image| {
        image.put64(72, 1 << 62);
    }));
    all.push(recipe(Plain, "dirty bit", Any, |image| {
        image.put64(72, 1);
    }));
    all.push(
        recipe(Plain, "corrupt bit", Any, |image| {
            image.put64(72, 2);
        })
        .untouchable(),
    );
    all.push(
        recipe(Plain, "data file bit without a data file", Any, |image| {
            image.put64(72, 4);
        })
        .untouchable(),
    );
    all.push(recipe(
        Plain,
        "compression bit without a type",
        Header("compression_type"),
        |image| {
            image.put64(72, 8);
        },
    ));
    all.push(recipe(Zstd, "compression type 2", Header("compression_type"), |image| {
        image.put(104, &[2]);
    }));
    all.push(recipe(
        Zstd,
        "compression type without its bit",
        Header("compression_type"),
        |image| {
            image.put64(72, 0);
        },
    ));
    all.push(recipe(Plain, "extended L2 bit on standard tables", Any, |image| {
        image.put64(72, 16);
    }));
    all.push(recipe(Plain, "unknown compatible bits", Sound, |image| {
        image.put64(80, !1);
    }));
    all.push(recipe(Plain, "unknown autoclear bits", Sound, |image| {
        image.put64(88, !2);
    }));
    all
}

fn extensions() -> Vec<Recipe> {
    let mut all = Vec::new();
    for len in [0x1_0000, 0x7fff_fff8, 0xffff_fff0, u32::MAX] {
        let name = format!("extension of {len:#x} bytes");
        all.push(recipe(Plain, name, Header("extension"), move |image| {
            image.put32(u64::from(image.be32(100)) + 4, len);
        }));
    }
    for tail in 0..3u8 {
        let name = format!("feature table of 49 bytes that ends in {tail}");
        all.push(recipe(Plain, name, Sound, move |image| {
            let at = u64::from(image.be32(100));
            image.put64(88, 0).put32(at, FEATURE_NAMES).put32(at + 4, 49);
            image.put(at + 8 + 48, &[tail, 0, 0, 0, 0, 0, 0, 0]).put64(at + 64, 0);
        }));
    }
    all.push(recipe(Plain, "the same extension twice", Header("extension"), |image| {
        let at = u64::from(image.be32(100));
        image.put32(at, FEATURE_NAMES).put32(at + 4, 48);
        image.put32(at + 56, FEATURE_NAMES).put32(at + 60, 48).put64(at + 112, 0);
    }));
    all.push(recipe(Plain, "an unknown extension", Sound, |image| {
        let at = u64::from(image.be32(100));
        image.put64(88, 0).put32(at, 0x1234_5678).put32(at + 4, 5).put(at + 8, b"hello\0\0\0");
        image.put64(at + 16, 0);
    }));
    all.push(recipe(Plain, "extensions without an end", Any, |image| {
        let cluster = places(image).cluster;
        let mut at = u64::from(image.be32(100));
        while at + 8 <= cluster {
            image.put32(at, 0x1234_5678).put32(at + 4, 0);
            at += 8;
        }
    }));
    all
}

fn backing() -> Vec<Recipe> {
    let mut all = Vec::new();
    let name_at = |offset: u64, len: u32, field: &'static str| {
        let name = format!("backing name of {len} bytes at {offset:#x}");
        recipe(Plain, name, Header(field), move |image| {
            image.put64(8, offset).put32(16, len);
        })
    };
    all.push(name_at(8, 5, "backing_file"));
    all.push(name_at(0xfff8, 64, "backing_file"));
    all.push(name_at(0x10000, 5, "backing_file"));
    all.push(name_at(u64::MAX, 5, "backing_file"));
    all.push(name_at(0x200, 1024, "backing_file_size"));
    all.push(name_at(0x200, u32::MAX, "backing_file_size"));
    // A name is bytes: that one is odd, and leads nowhere.
    let names = [
        ("not UTF-8", b"\xff\xfebad", Any),
        ("with a NUL", b"ab\0cd", Header("backing file name")),
    ];
    for (what, bytes, verdict) in names {
        let name = format!("backing name {what}");
        all.push(recipe(Plain, name, verdict, move |image| {
            image.put64(8, 0xff00).put32(16, 5).put(0xff00, bytes);
        }));
    }
    all
}
