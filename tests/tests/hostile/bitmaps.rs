//! Persistent bitmaps: extension, directory, tables, data.

use bitferry_tests::image::Bytes;

use crate::bases::{Base, bitmap_data, bitmap_entry, bitmap_table, bitmaps_extension, places};
use crate::recipes::{Recipe, Verdict, recipe};
use Verdict::{Any, Bitmaps, Sound};

pub(crate) fn recipes() -> Vec<Recipe> {
    let mut all = extension();
    all.extend(directory());
    all.extend(names());
    all.extend(tables());
    all.extend(states());
    all
}

fn bad(
    name: impl Into<String>,
    field: &'static str,
    patch: impl Fn(&Bytes) + Send + 'static,
) -> Recipe {
    // A repair, and a writer that replaces the whole directory, may go on where a reader may not.
    recipe(Base::Bitmaps, name, Bitmaps(field), patch).touchable()
}

fn extension() -> Vec<Recipe> {
    let mut all = Vec::new();
    for count in [0, 65536, u32::MAX] {
        all.push(bad(format!("{count} bitmaps"), "nb_bitmaps", move |image| {
            image.put32(bitmaps_extension(image), count);
        }));
    }
    all.push(bad("one bitmap fewer than the directory has", "directory", |image| {
        image.put32(bitmaps_extension(image), 1);
    }));
    all.push(bad("one bitmap more than the directory has", "", |image| {
        image.put32(bitmaps_extension(image), 3);
    }));
    all.push(bad("reserved bytes of the extension", "reserved", |image| {
        image.put32(bitmaps_extension(image) + 4, 1);
    }));
    for (name, size) in
        [("of no bytes", 0), ("of an exbibyte", 1 << 60), ("of 64 MiB", 1024 * 65535 + 8)]
    {
        all.push(bad(format!("directory {name}"), "director", move |image| {
            image.put64(bitmaps_extension(image) + 8, size);
        }));
    }
    for delta in [8u64, 8u64.wrapping_neg(), 1] {
        let name = format!("directory size off by {}", delta.cast_signed());
        all.push(bad(name, "", move |image| {
            let at = bitmaps_extension(image) + 8;
            image.put64(at, image.be64(at).wrapping_add(delta));
        }));
    }
    for offset in [0u64, 512, 1 << 62, u64::MAX] {
        all.push(bad(format!("directory at {offset:#x}"), "director", move |image| {
            image.put64(bitmaps_extension(image) + 16, offset);
        }));
    }
    all.push(bad("directory beyond the end", "", |image| {
        image.put64(bitmaps_extension(image) + 16, image.len().next_multiple_of(65536) + 65536);
    }));
    all.push(bad("extension of 16 bytes", "bitmaps extension", |image| {
        image.put32(bitmaps_extension(image) - 4, 16);
    }));
    all
}

fn directory() -> Vec<Recipe> {
    let mut all = Vec::new();
    for granularity in [0u8, 8, 32, 63, 64, 255] {
        all.push(bad(format!("granularity 2^{granularity}"), "granularity", move |image| {
            image.put(bitmap_entry(image, 0) + 17, &[granularity]);
        }));
    }
    for kind in [0u8, 2, 255] {
        // The spec: an unknown type is kept, and is nothing that can be loaded.
        let name = format!("bitmap of type {kind}");
        all.push(recipe(Base::Bitmaps, name, Any, move |image| {
            image.put(bitmap_entry(image, 0) + 16, &[kind]);
        }));
    }
    for flags in [8u32, 1 << 31, u32::MAX] {
        all.push(bad(format!("bitmap flags {flags:#x}"), "flags", move |image| {
            image.put32(bitmap_entry(image, 0) + 12, flags);
        }));
    }
    for size in [8u32, 0x1000, u32::MAX] {
        all.push(bad(format!("{size:#x} bytes of extra data"), "", move |image| {
            image.put32(bitmap_entry(image, 0) + 20, size);
        }));
    }
    all
}

fn names() -> Vec<Recipe> {
    let mut all = Vec::new();
    for len in [0u16, 1024, u16::MAX] {
        all.push(bad(format!("bitmap name of {len} bytes"), "name", move |image| {
            image.put16(bitmap_entry(image, 1) + 18, len);
        }));
    }
    all.push(bad("two bitmaps of one name", "name", |image| {
        image.put(bitmap_entry(image, 1) + 24, b"b0");
    }));
    all.push(bad("bitmap name that is not UTF-8", "name", |image| {
        image.put(bitmap_entry(image, 1) + 24, b"\xff\xfe");
    }));
    all.push(bad("bitmap name with a NUL", "name", |image| {
        image.put(bitmap_entry(image, 1) + 24, b"a\0");
    }));
    all.push(recipe(Base::Bitmaps, "bitmap name that drives a terminal", Any, |image| {
        image.put(bitmap_entry(image, 1) + 24, b"\x1bc");
    }));
    all.push(recipe(Base::Bitmaps, "bitmap name with a line break", Any, |image| {
        image.put(bitmap_entry(image, 1) + 24, b"\r\n");
    }));
    all
}

fn tables() -> Vec<Recipe> {
    let mut all = Vec::new();
    for size in [0u32, 2, 0x0100_0000, u32::MAX] {
        all.push(bad(format!("bitmap table of {size:#x} entries"), "table", move |image| {
            image.put32(bitmap_entry(image, 0) + 8, size);
        }));
    }
    for offset in [0u64, 512, 1 << 62, u64::MAX] {
        all.push(bad(format!("bitmap table at {offset:#x}"), "table", move |image| {
            image.put64(bitmap_entry(image, 0), offset);
        }));
    }
    all.push(bad("bitmap table beyond the end", "", |image| {
        image.put64(bitmap_entry(image, 0), image.len().next_multiple_of(65536) + 65536);
    }));
    let entry = |name: &str, value: fn(&Bytes) -> u64| {
        bad(format!("bitmap table entry {name}"), "", move |image| {
            image.put64(bitmap_table(image, 0), value(image));
        })
    };
    all.push(entry("with reserved low bits", |i| bitmap_data(i, 0) | 2));
    all.push(entry("with reserved high bits", |i| bitmap_data(i, 0) | 1 << 56));
    all.push(entry("with an offset and the all-ones flag", |i| bitmap_data(i, 0) | 1));
    all.push(entry("misaligned", |i| bitmap_data(i, 0) + 512));
    all.push(entry("beyond the end", |i| i.len().next_multiple_of(65536) + 65536));
    all.push(recipe(Base::Bitmaps, "bitmap of all ones", Sound, |image| {
        image.put64(bitmap_table(image, 0), 1);
    }));
    all.push(recipe(Base::Bitmaps, "bitmap of all zeroes", Sound, |image| {
        image.put64(bitmap_table(image, 0), 0);
    }));
    all
}

fn states() -> Vec<Recipe> {
    let shared = |name: &str, patch: fn(&Bytes)| recipe(Base::Bitmaps, name, Any, patch);
    vec![
        recipe(Base::Bitmaps, "bits beyond the end of the disk", Sound, |image| {
            let data = bitmap_data(image, 0);
            image.put(data + 16, &[0xff; 4096]);
        }),
        bad("bitmap in use", "b0", |image| {
            image.put32(bitmap_entry(image, 0) + 12, 3);
        }),
        bad("bitmaps without the autoclear bit", "", |image| {
            image.put64(88, 0);
        }),
        recipe(Base::Bitmaps, "broken extension without the autoclear bit", Bitmaps(""), |image| {
            image.put64(88, 0).put32(bitmaps_extension(image), 0);
        })
        .touchable(),
        shared("two bitmaps in the same table", |image| {
            image.put64(bitmap_entry(image, 1), bitmap_table(image, 0));
        }),
        shared("two bitmaps in the same cluster", |image| {
            image.put64(bitmap_table(image, 1), bitmap_data(image, 0));
        })
        .untouchable(),
        shared("bitmap data is the L1 table", |image| {
            image.put64(bitmap_table(image, 0), places(image).l1);
        })
        .untouchable(),
        shared("bitmap table is the header", |image| {
            image.put64(bitmap_table(image, 0), 0);
        }),
        shared("bitmap data without a refcount", |image| {
            let places = places(image);
            let cluster = bitmap_data(image, 0) / places.cluster;
            image.put16(places.refcount_block + 2 * cluster, 0);
        })
        .untouchable(),
    ]
}
