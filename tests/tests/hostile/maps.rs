//! L1 and L2 tables, compressed clusters, refcounts, truncation.

use bitferry_tests::image::Bytes;
use bitferry_tests::random::{Random, seed};

use crate::bases::{ALL, Base, MIB, places};
use crate::recipes::{Recipe, Verdict, recipe};
use Base::{Extended, Old, Plain, Small, Snapshot, Zlib, Zstd};
use Verdict::{Any, Content, Header};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

pub(crate) fn recipes() -> Vec<Recipe> {
    let mut all = l1_entries();
    all.extend(l2_entries());
    all.extend(compressed_clusters());
    all.extend(subclusters());
    all.extend(refcounts());
    all.extend(truncated());
    all.extend(shapes());
    all
}

/// The first L1 entry becomes `value`.
fn l1(base: Base, name: &str, verdict: Verdict, value: fn(&Bytes) -> u64) -> Recipe {
    recipe(base, format!("L1 entry {name}"), verdict, move |image| {
        image.put64(places(image).l1, value(image));
    })
}

/// The first L2 entry becomes `value`.
fn l2(base: Base, name: &str, verdict: Verdict, value: fn(&Bytes) -> u64) -> Recipe {
    recipe(base, format!("{base:?}: L2 entry {name}"), verdict, move |image| {
        image.put64(places(image).l2, value(image));
    })
}

fn beyond(image: &Bytes) -> u64 {
    (image.len() + MIB).next_multiple_of(2 * MIB)
}

fn l1_entries() -> Vec<Recipe> {
    vec![
        l1(Plain, "misaligned", Content("l1_entry"), |i| (places(i).l2 + 512) | COPIED),
        l1(Plain, "with reserved low bits", Content("l1_entry"), |i| places(i).l2 | 1),
        l1(Plain, "with reserved high bits", Content("l1_entry"), |i| places(i).l2 | 1 << 56),
        l1(Plain, "beyond the end", Content(""), |i| beyond(i) | COPIED),
        l1(Plain, "at the end of what an offset can say", Content(""), |_| 0x00ff_ffff_ffff_0000),
        l1(Plain, "that is nothing but the copied bit", Any, |_| COPIED),
        l1(Plain, "that points at the L1 table", Any, |i| places(i).l1 | COPIED).untouchable(),
        l1(Plain, "that points at the refcounts", Any, |i| places(i).refcount_block | COPIED)
            .untouchable(),
        l1(Plain, "of all ones", Content("l1_entry"), |_| u64::MAX),
        l1(Old, "misaligned", Content("l1_entry"), |i| (places(i).l2 + 512) | COPIED),
    ]
}

fn l2_entries() -> Vec<Recipe> {
    vec![
        l2(Plain, "misaligned", Content("l2_entry"), |i| i.be64(places(i).l2) + 512),
        l2(Plain, "with reserved low bits", Content("l2_entry"), |i| i.be64(places(i).l2) | 2),
        l2(Plain, "with reserved high bits", Content("l2_entry"), |i| {
            i.be64(places(i).l2) | 1 << 57
        }),
        l2(Plain, "beyond the end", Content(""), |i| beyond(i) | COPIED),
        l2(Plain, "that points at the L1 table", Any, |i| places(i).l1 | COPIED).untouchable(),
        l2(Plain, "that points at its own table", Any, |i| places(i).l2 | COPIED).untouchable(),
        l2(Plain, "that points at the refcount table", Any, |i| places(i).refcount_table | COPIED)
            .untouchable(),
        l2(Plain, "that points at another's cluster", Any, |i| i.be64(places(i).l2 + 8))
            .untouchable(),
        l2(Plain, "of all ones", Content(""), |_| u64::MAX),
        l2(Old, "with the zero bit of version 3", Any, |i| i.be64(places(i).l2) | 1),
        l2(Old, "with reserved low bits", Content("l2_entry"), |i| i.be64(places(i).l2) | 4),
        l2(Small, "beyond the end", Content(""), |i| beyond(i) | COPIED),
        l2(Snapshot, "beyond the end", Content(""), |i| beyond(i) | COPIED),
    ]
}

/// Bits of the offset field of a compressed entry.
fn offset_bits(image: &Bytes) -> u32 {
    62 - (image.be32(20) - 8)
}

fn compressed_clusters() -> Vec<Recipe> {
    let mut all = Vec::new();
    for base in [Zlib, Zstd] {
        all.push(l2(base, "compressed, beyond the end", Content(""), |i| COMPRESSED | beyond(i)));
        all.push(l2(base, "compressed, with the copied bit", Content("l2_entry"), |i| {
            i.be64(places(i).l2) | COPIED
        }));
        all.push(
            l2(base, "compressed, one sector of many", Content("compressed"), |i| {
                COMPRESSED | i.be64(places(i).l2) & ((1 << offset_bits(i)) - 1)
            })
            .touchable(),
        );
        all.push(l2(base, "compressed, as many sectors as fit", Any, |i| {
            i.be64(places(i).l2) | 0xff << offset_bits(i)
        }));
        all.push(l2(base, "compressed, in the header", Content("l2_entry"), |_| COMPRESSED));
        for (what, junk) in [("zeroes", [0u8; 64]), ("ones", [0xff; 64]), ("text", [b'a'; 64])] {
            let name = format!("{base:?}: compressed data replaced by {what}");
            let verdict = Content("compressed");
            all.push(
                recipe(base, name, verdict, move |image| {
                    image.put(first_compressed(image), &junk);
                })
                .touchable(),
            );
        }
    }
    // A stored block of 16 bytes, and the end: far less than a cluster.
    let short = [1, 16, 0, 0xef, 0xff, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
    all.push(
        recipe(Zlib, "compressed data that ends early", Content("compressed"), move |image| {
            image.put(first_compressed(image), &short);
        })
        .touchable(),
    );
    // Frame header: single segment, 8-byte content size of 1 EiB. Then: a window of 2 GiB.
    let huge = [0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0x10, 1, 0, 0];
    let window = [0x28, 0xb5, 0x2f, 0xfd, 0, 0xa8, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (what, bytes) in [("a content of an exbibyte", huge), ("a window of 2 GiB", window)] {
        let name = format!("zstd frame that claims {what}");
        all.push(
            recipe(Zstd, name, Content("compressed"), move |image| {
                image.put(first_compressed(image), &bytes);
            })
            .touchable(),
        );
    }
    all
}

fn first_compressed(image: &Bytes) -> u64 {
    let entry = image.be64(places(image).l2);
    assert!(entry & COMPRESSED != 0, "the base is not compressed");
    entry & ((1 << offset_bits(image)) - 1)
}

fn subclusters() -> Vec<Recipe> {
    let bitmap = |name: &str, value: u64| {
        recipe(Extended, format!("subclusters {name}"), Content("subcluster"), move |image| {
            image.put64(places(image).l2 + 8, value);
        })
    };
    vec![
        bitmap("both allocated and zero", 1 << 32 | 1),
        bitmap("all both", u64::MAX),
        recipe(Extended, "subclusters without a cluster", Content("subcluster"), |image| {
            image.put64(places(image).l2, 0).put64(places(image).l2 + 8, 7);
        }),
        recipe(Extended, "the zero bit in an extended entry", Content("l2_entry"), |image| {
            let at = places(image).l2;
            image.put64(at, image.be64(at) | 1);
        }),
    ]
}

fn refcounts() -> Vec<Recipe> {
    let first = |name: &str, value: fn(&Bytes) -> u64| {
        recipe(Plain, format!("first refcount block {name}"), Any, move |image| {
            image.put64(places(image).refcount_table, value(image));
        })
        .untouchable()
    };
    let mut all = vec![
        first("missing", |_| 0),
        first("misaligned", |i| places(i).refcount_block + 512),
        first("with reserved bits", |i| places(i).refcount_block | 1),
        first("beyond the end", beyond),
        first("is the header's cluster", |_| 1 << 63),
        first("is the L1 table", |i| places(i).l1),
        first("is the refcount table", |i| places(i).refcount_table),
    ];
    for base in [Plain, Snapshot, Zlib] {
        all.push(
            recipe(base, format!("{base:?}: all refcounts zero"), Any, |image| {
                let places = places(image);
                image.put(places.refcount_block, &vec![0; places.cluster as usize]);
            })
            .untouchable(),
        );
    }
    all.push(
        recipe(Plain, "refcount of a data cluster is zero", Any, |image| {
            let places = places(image);
            let cluster = (image.be64(places.l2) & 0x00ff_ffff_ffff_fe00) / places.cluster;
            image.put16(places.refcount_block + 2 * cluster, 0);
        })
        .untouchable(),
    );
    all
}

/// A file that ends early: what it maps is not there. QEMU reads zeroes; nobody's backup should.
fn truncated() -> Vec<Recipe> {
    let mut all = Vec::new();
    let mut random = Random::new(seed(), "truncated");
    for base in ALL {
        for _ in 0..4 {
            let per_mille = random.below(1000);
            let name = format!("{base:?}: cut at {per_mille}/1000");
            all.push(recipe(*base, name, Any, move |image| {
                image.set_len(image.len() * per_mille / 1000);
            }));
        }
    }
    for len in [0u64, 3, 4, 71, 103, 104, 111, 512, 4096, 65535] {
        all.push(recipe(Plain, format!("cut to {len} bytes"), Any, move |image| {
            image.set_len(len);
        }));
    }
    all.push(recipe(Plain, "cut behind the header", Header(""), |image| {
        image.set_len(65536);
    }));
    all.push(recipe(Plain, "half of the last cluster missing", Any, |image| {
        image.set_len(image.len() - 100);
    }));
    all
}

/// Sound headers that make a careless reader work for ever or ask for the moon.
fn shapes() -> Vec<Recipe> {
    vec![
        recipe(Plain, "an exbibyte of nothing", Any, |image| {
            // The largest size that the L1 table of 32 MiB covers, with a table that is not there.
            image.put64(24, 1 << 51).put32(36, 1 << 22);
        }),
        recipe(Small, "every L1 entry names the same table", Any, |image| {
            let places = places(image);
            let entry = image.be64(places.l1);
            for n in 0..u64::from(image.be32(36)) {
                image.put64(places.l1 + 8 * n, entry);
            }
        })
        .untouchable(),
        recipe(Plain, "every L2 entry names the same cluster", Any, |image| {
            let places = places(image);
            let entry = image.be64(places.l2);
            for n in 0..128 {
                image.put64(places.l2 + places.entry_bytes * n, entry);
            }
        })
        .untouchable(),
    ]
}
