//! Every kind of image, made by random work and judged by QEMU.

use std::path::Path;
use std::sync::Arc;

use qcow2_file::bitmaps::{Bitmaps, Bits, PersistentBitmap};
use qcow2_file::create::{Backing, BackingReader, CreateOptions, DataFile, NewImage};
use qcow2_file::layout::header::CompressionType;
use qcow2_file::{Access, GuestOffset, HostFile, Opener, Result};

use crate::peer::{run, run_args, scratch, tool};
use crate::workload::{Load, Random, work};

/// What lies below an overlay in these tests.
#[derive(Debug)]
pub(crate) struct Below(pub(crate) Vec<u8>);

impl BackingReader for Below {
    fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<()> {
        let from = (at.0 as usize).min(self.0.len());
        let len = buf.len().min(self.0.len() - from);
        buf[..len].copy_from_slice(&self.0[from..from + len]);
        buf[len..].fill(0);
        Ok(())
    }
}

/// Makes an image by random work and lets QEMU check, compare and then write it.
fn judge(name: &str, size: u64, change: impl FnOnce(&mut CreateOptions, &Path)) {
    if tool("qemu-img").is_none() || tool("qemu-io").is_none() {
        return;
    }
    let dir = scratch();
    let mut options = CreateOptions::new(size);
    change(&mut options, dir.path());
    let is_raw = options.data_file.as_ref().is_some_and(|d| d.is_raw);
    let seed = Random::new(name.bytes().fold(7, |h, b| (h << 5) ^ (h >> 3) ^ u64::from(b))).next();
    let mut shadow = backing_content(&mut options, dir.path(), seed);
    let has_reader = options.backing.as_ref().is_none_or(|b| b.reader.is_some());
    let path = dir.path().join("new.qcow2");
    if options.overwrite {
        std::fs::write(&path, Random::new(seed ^ 4).bytes(options.size + (2 << 20))).unwrap();
    } else {
        std::fs::write(&path, []).unwrap();
    }
    let file = HostFile::open(&path, Access::ReadWrite).unwrap();
    let image = NewImage::create(Arc::new(file), &options).unwrap();
    let load = Load {
        seed,
        threads: 3,
        rounds: 6,
        compression: options.data_file.is_none().then_some(options.compression_type),
        align: if has_reader { 512 } else { options.geometry().subcluster_size() },
        reads: has_reader,
    };
    work(&image, &mut shadow, load);
    let mut read = vec![1; shadow.len()];
    if has_reader {
        image.read_at(&mut read, GuestOffset(0)).unwrap();
        assert!(read == shadow, "{name}: read back");
    }
    let bitmaps = bitmaps(&options, seed);
    image.finish(&bitmaps).unwrap();
    drop(image);
    reads_back(&path, &shadow, &bitmaps);
    std::fs::write(dir.path().join("shadow.raw"), &shadow).unwrap();
    if is_raw {
        run(dir.path(), "qemu-img compare -f raw -F raw data.raw shadow.raw");
    }
    qemu_agrees(dir.path(), &options);
}

/// Our own reader finds the same disk, bitmaps and refcounts.
fn reads_back(path: &Path, shadow: &[u8], bitmaps: &[PersistentBitmap]) {
    let chain = Opener::new().allow_named_files(true).open(path).unwrap();
    let mut read = vec![1; shadow.len()];
    chain.read_at(&mut read, GuestOffset(0)).unwrap();
    assert!(read == shadow, "{}: opened again", path.display());
    let image = chain.top().as_qcow2().unwrap();
    assert_eq!(image.warnings(), []);
    let stored = Bitmaps::open(Arc::clone(image.file()), image.header()).unwrap();
    for bitmap in bitmaps {
        let bits = stored.as_ref().unwrap().load(&bitmap.name).unwrap();
        assert!(bits == bitmap.bits, "{}: {}", path.display(), bitmap.name);
    }
}

/// Writes the backing file, if there is one, and answers with what the new disk reads at first.
fn backing_content(options: &mut CreateOptions, dir: &Path, seed: u64) -> Vec<u8> {
    let mut shadow = vec![0; options.size as usize];
    if let Some(backing) = &mut options.backing {
        let content = Random::new(seed ^ 5).bytes(options.size / 2 / 512 * 512);
        std::fs::write(dir.join("below.raw"), &content).unwrap();
        shadow[..content.len()].copy_from_slice(&content);
        if backing.reader.is_some() {
            backing.reader = Some(Arc::new(Below(content)));
        }
    }
    shadow
}

fn bitmaps(options: &CreateOptions, seed: u64) -> Vec<PersistentBitmap> {
    if options.version < 3 {
        return Vec::new();
    }
    let mut random = Random::new(seed ^ 9);
    let one = |granularity_bits: u8, random: &mut Random| {
        let mut bits = Bits::for_disk(options.size, granularity_bits);
        for _ in 0..20 {
            let start = random.below(bits.len());
            bits.set_range(start..start + 1 + random.below(50));
        }
        PersistentBitmap {
            name: format!("b{granularity_bits}"),
            granularity_bits,
            is_enabled: granularity_bits != 16,
            bits,
        }
    };
    vec![one(9, &mut random), one(16, &mut random), one(20, &mut random)]
}

fn qemu_agrees(dir: &Path, options: &CreateOptions) {
    let check = run(dir, "qemu-img check -f qcow2 new.qcow2");
    assert!(check.contains("No errors were found"), "{check}");
    run(dir, "qemu-img compare -f qcow2 -F raw new.qcow2 shadow.raw");
    let info = run(dir, "qemu-img info -f qcow2 --output=json new.qcow2");
    let compact: String = info.split_whitespace().collect();
    let expected = [
        format!("\"virtual-size\":{}", options.size),
        format!("\"cluster-size\":{}", 1 << options.cluster_bits),
        format!("\"refcount-bits\":{}", options.refcount_bits),
        format!("\"compat\":\"{}\"", if options.version == 3 { "1.1" } else { "0.10" }),
    ];
    for text in expected {
        assert!(compact.contains(&text), "{text} in {info}");
    }
    if options.version == 3 {
        assert!(compact.contains(&format!("\"extended-l2\":{}", options.extended_l2)));
        assert!(compact.contains(&format!("\"lazy-refcounts\":{}", options.lazy_refcounts)));
        assert_eq!(compact.matches("\"granularity\":").count(), 3, "{info}");
        assert!(!compact.contains("in-use"), "{info}");
    }
    let at = options.size / 2 / 512 * 512;
    let write = format!("write -P 0x5a {at} {}", (options.size - at).min(100 << 10));
    let zero = format!("write -z 0 {}", options.size.min(64 << 10));
    run_args(dir, &["qemu-io", "-f", "qcow2", "-c", &write, "-c", &zero, "new.qcow2"]);
    let check = run(dir, "qemu-img check -f qcow2 new.qcow2");
    assert!(check.contains("No errors were found"), "after a write by QEMU: {check}");
}

const SIZE: u64 = (5 << 20) + 512 * 3;

#[test]
fn defaults() {
    judge("defaults", SIZE, |_, _| {});
}

#[test]
fn every_cluster_size() {
    for bits in 9..=21 {
        judge(&format!("cluster {bits}"), SIZE, |o, _| o.cluster_bits = bits);
    }
}

#[test]
fn every_refcount_width() {
    for order in 0..=6 {
        for cluster_bits in [9, 12, 16] {
            let name = format!("refcount {order} {cluster_bits}");
            judge(&name, SIZE, |o, _| {
                (o.refcount_bits, o.cluster_bits) = (1 << order, cluster_bits);
            });
        }
    }
}

#[test]
fn subclusters() {
    for bits in [14, 16, 18, 21] {
        judge(&format!("extended {bits}"), SIZE, |o, _| {
            (o.extended_l2, o.cluster_bits) = (true, bits);
        });
    }
}

#[test]
fn zstd_and_lazy_refcounts() {
    judge("zstd", SIZE, |o, _| {
        (o.compression_type, o.lazy_refcounts) = (CompressionType::Zstd, true);
    });
    judge("zstd extended", SIZE, |o, _| {
        (o.compression_type, o.extended_l2) = (CompressionType::Zstd, true);
    });
}

#[test]
fn version_2() {
    for bits in [9, 12, 16, 21] {
        judge(&format!("version 2 {bits}"), SIZE, |o, _| (o.version, o.cluster_bits) = (2, bits));
    }
}

fn over_backing(options: &mut CreateOptions, has_reader: bool) {
    options.backing = Some(Backing {
        name: "below.raw".into(),
        format: Some("raw".into()),
        reader: has_reader.then(|| Arc::new(Below(Vec::new())) as Arc<dyn BackingReader>),
    });
}

#[test]
fn overlays() {
    for has_reader in [false, true] {
        for (version, extended, bits) in
            [(3, false, 9), (3, false, 16), (3, true, 16), (2, false, 12), (2, false, 16)]
        {
            let name = format!("overlay {has_reader} {version} {extended} {bits}");
            judge(&name, SIZE, |o, _| {
                over_backing(o, has_reader);
                (o.version, o.extended_l2, o.cluster_bits) = (version, extended, bits);
            });
        }
    }
}

fn with_data_file(options: &mut CreateOptions, dir: &Path, is_raw: bool) {
    let storage = HostFile::create_new(&dir.join("data.raw")).unwrap();
    let name = "data.raw".into();
    options.data_file = Some(DataFile { name, is_raw, storage: Arc::new(storage) });
}

#[test]
fn data_files() {
    for is_raw in [false, true] {
        for (extended, bits) in [(false, 9), (false, 16), (true, 16), (true, 21)] {
            judge(&format!("data file {is_raw} {extended} {bits}"), SIZE, |o, dir| {
                with_data_file(o, dir, is_raw);
                (o.extended_l2, o.cluster_bits) = (extended, bits);
            });
        }
    }
}

#[test]
fn a_data_file_that_held_something_before() {
    for extended in [false, true] {
        judge(&format!("stale data file {extended}"), SIZE, |o, dir| {
            std::fs::write(dir.join("stale"), Random::new(3).bytes(SIZE + 70000)).unwrap();
            let storage = HostFile::open(&dir.join("stale"), qcow2_file::Access::ReadWrite);
            let storage = Arc::new(storage.unwrap());
            o.data_file = Some(DataFile { name: "stale".into(), is_raw: false, storage });
            o.extended_l2 = extended;
        });
    }
}

#[test]
fn over_what_was_there() {
    for (version, extended, bits, order) in [
        (3, false, 9, 4),
        (3, false, 16, 4),
        (3, true, 16, 6),
        (2, false, 16, 4),
        (3, false, 12, 0),
    ] {
        for has_backing in [false, true] {
            let name = format!("overwrite {version} {extended} {bits} {order} {has_backing}");
            judge(&name, SIZE, |o, _| {
                if has_backing {
                    over_backing(o, true);
                }
                (o.version, o.extended_l2, o.cluster_bits) = (version, extended, bits);
                (o.refcount_bits, o.overwrite) = (1 << order, true);
            });
        }
    }
    for is_raw in [false, true] {
        judge(&format!("overwrite with data file {is_raw}"), SIZE, |o, dir| {
            with_data_file(o, dir, is_raw);
            o.overwrite = true;
        });
    }
}

#[test]
fn odd_sizes() {
    for size in [512, 1024, 65536, 65536 + 512, (512 << 20) + 512] {
        for bits in [9, 16] {
            let size = if bits == 9 { size.min(1 << 20) } else { size };
            if size < 4 << 20 {
                judge(&format!("size {size} {bits}"), size, |o, _| o.cluster_bits = bits);
            }
        }
    }
}

#[test]
fn nothing_at_all() {
    if tool("qemu-img").is_none() {
        return;
    }
    for size in [0, 512, 1 << 30, 16 << 40] {
        for version in [2, 3] {
            let dir = scratch();
            let file = HostFile::create_new(&dir.path().join("new.qcow2")).unwrap();
            let options = CreateOptions { version, ..CreateOptions::new(size) };
            let image = NewImage::create(Arc::new(file), &options).unwrap();
            if size > 0 {
                image.write_zeroes(GuestOffset(0), size).unwrap();
            }
            image.finish(&[]).unwrap();
            let check = run(dir.path(), "qemu-img check -f qcow2 new.qcow2");
            assert!(check.contains("No errors were found"), "{size} {version}: {check}");
            let info = run(dir.path(), "qemu-img info -f qcow2 --output=json new.qcow2");
            assert!(info.contains(&format!("\"virtual-size\": {size}")), "{info}");
        }
    }
}

#[test]
fn sixteen_sparse_tebibytes() {
    if tool("qemu-img").is_none() {
        return;
    }
    let dir = scratch();
    let file = HostFile::create_new(&dir.path().join("new.qcow2")).unwrap();
    let size = 16 << 40;
    let image = NewImage::create(Arc::new(file), &CreateOptions::new(size)).unwrap();
    let mut random = Random::new(16);
    for i in 0..2000u64 {
        let at = GuestOffset(random.below(size >> 12) << 12);
        image.write_at(&[i as u8 | 1; 4096], at).unwrap();
        image.write_zeroes(GuestOffset(at.0 + 4096), (size - at.0 - 4096).min(1 << 30)).unwrap();
    }
    image.finish(&[]).unwrap();
    let check = run(dir.path(), "qemu-img check -f qcow2 new.qcow2");
    assert!(check.contains("No errors were found"), "{check}");
}
