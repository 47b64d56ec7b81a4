//! Images that break the format, and honest ones of absurd sizes: typed errors, bounded time.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod campaign;
mod hand;
mod model;
mod opening;

use std::sync::Arc;
use std::time::{Duration, Instant};

use hand::Hand;
use qcow2_file::chain::RawLayer;
use qcow2_file::layout::extension::{Extension, FeatureName};
use qcow2_file::layout::header::{CompressionType, incompatible};
use qcow2_file::preflight::Warning;
use qcow2_file::storage::{Fault, OperationKind};
use qcow2_file::{
    Chain, ChainKind, Error, GuestOffset, Image, Layer, LayerKind, Memory, Result, Storage,
};

const K64: u64 = 65536;

/// The error of reading one byte, as text with its causes.
fn complaint(image: &Image, at: u64) -> String {
    text(&image.read_at(&mut [0], GuestOffset(at)).unwrap_err())
}

fn text(e: &dyn std::error::Error) -> String {
    e.source().map_or_else(|| e.to_string(), |s| format!("{e} | {}", text(s)))
}

fn byte(image: &Image, at: u64) -> u8 {
    let mut buf = [0xee];
    image.read_at(&mut buf, GuestOffset(at)).unwrap();
    buf[0]
}

fn open_error(hand: Hand) -> String {
    text(&Image::open(hand.finish(), None).unwrap_err())
}

#[test]
fn a_bad_l2_entry_hurts_its_cluster_only() {
    let mut hand = Hand::new(16, 8 * K64);
    for n in 0..8 {
        hand.data(n * K64, n as u8 + 1);
    }
    let entry = hand.l2_at(3 * K64);
    hand.word(entry, 0x12345 << 9 | 0x1fe);
    let image = Image::open(hand.finish(), None).unwrap();
    assert_eq!((byte(&image, 3 * K64 - 1), byte(&image, 4 * K64)), (3, 5));
    let said = complaint(&image, 3 * K64);
    assert!(said.contains(&format!("hand: l2_entry at offset {entry}")), "{said}");
    // The good part before it is answered, then the error, and behind it life goes on.
    assert_eq!(image.extent(GuestOffset(0), u64::MAX).unwrap().len, 3 * K64);
    assert!(image.extent(GuestOffset(3 * K64), u64::MAX).is_err());
    assert_eq!(image.extent(GuestOffset(4 * K64), u64::MAX).unwrap().len, 4 * K64);
}

#[test]
fn a_bad_l1_entry_hurts_its_span_only() {
    let span = 512 << 20;
    let mut hand = Hand::new(16, 3 * span);
    hand.data(0, 1);
    hand.data(2 * span, 3);
    hand.word(hand.l1_at(span), 1 << 60 | 0x5_0000);
    let image = Image::open(hand.finish(), None).unwrap();
    assert_eq!((byte(&image, 0), byte(&image, 2 * span)), (1, 3));
    assert!(complaint(&image, span + 5).contains("l1_entry at offset 131080 has reserved bits"));
}

#[test]
fn what_is_cut_off_is_an_error_and_not_zeroes() {
    let mut hand = Hand::new(16, 4 * K64);
    hand.data(0, 1);
    let last = hand.data(K64, 2);
    let file = hand.finish();
    let cut = |len| {
        let short = file.snapshot();
        short.set_len(len).unwrap();
        Image::open(Arc::new(short), None)
    };
    // The tail of a cluster may be missing.
    let image = cut(last + 512).unwrap();
    assert_eq!((byte(&image, K64 + 511), byte(&image, K64 + 512)), (2, 0));
    let image = cut(last).unwrap();
    assert_eq!(byte(&image, 0), 1);
    let said = complaint(&image, K64);
    assert!(said.contains("l2_entry") && said.contains(&format!("is {last}, outside")), "{said}");
    let image = cut(3 * K64).unwrap();
    assert!(complaint(&image, 0).contains("l1_entry at offset 131072 is 196608, outside 0 to"));
    let image = cut(3 * K64 + 8).unwrap();
    assert!(complaint(&image, K64).contains("l2_entry at offset 196616 needs 8 bytes"));
    assert!(text(&cut(2 * K64).unwrap_err()).contains("l1_table_offset at offset 40"));
    assert!(text(&cut(50).unwrap_err()).contains("needs"));
    assert!(text(&cut(0).unwrap_err()).contains("magic"));
}

#[test]
fn compressed_clusters_are_checked() {
    for kind in [CompressionType::Zlib, CompressionType::Zstd] {
        let mut hand = Hand::new(16, 8 * K64);
        if kind == CompressionType::Zstd {
            hand.header.incompatible_features |= incompatible::COMPRESSION_TYPE;
            hand.header.compression_type = kind;
        }
        let content: Vec<u8> = (0..65536u32).map(|n| (n / 5) as u8).collect();
        hand.compressed(0, &content);
        hand.compressed(K64, &content[..60000]);
        let long = [content.as_slice(), &content].concat();
        hand.compressed(2 * K64, &long);
        let garbage = hand.compressed(3 * K64, &content);
        hand.file.write_at(&[0xff; 40], garbage).unwrap();
        let into_header = hand.l2_at(4 * K64);
        hand.word(into_header, 1 << 62 | 100);
        let beyond = hand.l2_at(5 * K64);
        hand.word(beyond, 1 << 62 | 1 << 40);
        let image = Image::open(hand.finish(), None).unwrap();
        let mut buf = vec![0; content.len()];
        image.read_at(&mut buf, GuestOffset(0)).unwrap();
        assert_eq!(buf, content);
        assert_eq!(byte(&image, 700), content[700]);
        assert!(complaint(&image, K64).contains("compressed cluster at offset"));
        assert!(complaint(&image, 3 * K64).contains("does not decode to one cluster"));
        assert!(complaint(&image, 4 * K64).contains("is 100, outside 65536"));
        assert!(complaint(&image, 5 * K64).contains("is 1099511627776, outside"));
        let mut stored = Vec::new();
        // QEMU reads the start of a stream that is too long; such a one is never passed on.
        if kind == CompressionType::Zlib {
            assert_eq!(byte(&image, 2 * K64 + 700), content[700]);
            assert_eq!(image.read_compressed(GuestOffset(2 * K64), &mut stored).unwrap(), None);
        }
        assert!(image.read_compressed(GuestOffset(3 * K64), &mut stored).is_err());
        assert!(stored.is_empty());
        assert_eq!(image.read_compressed(GuestOffset(512), &mut stored).unwrap(), None);
        // The same bytes, whether the content was read before or not.
        let unit = image.read_compressed(GuestOffset(0), &mut stored).unwrap().unwrap();
        assert_eq!(unit.cluster_size, K64);
        image.forget_tables();
        let mut again = Vec::new();
        image.read_compressed(GuestOffset(0), &mut again).unwrap();
        assert!(again == stored && !stored.is_empty());
    }
}

#[test]
fn subclusters_are_cut_where_they_change() {
    let mut hand = Hand::with_subclusters(16, 4 * K64);
    let host = hand.data(0, 9);
    let entry = hand.l2_at(0);
    hand.word(entry + 8, 0x0000_0f00_0000_00ff);
    let clash = hand.l2_at(K64);
    hand.word(clash + 8, 0x0000_0001_0000_0001);
    let nowhere = hand.l2_at(2 * K64);
    hand.word(nowhere + 8, 1);
    let image = Image::open(hand.finish(), None).unwrap();
    let kinds: Vec<_> = [0, 2048 * 8, 2048 * 12, 2048 * 3 + 100]
        .map(|at| image.extent(GuestOffset(at), 1 << 20).unwrap())
        .iter()
        .map(|e| (e.kind, e.len, e.host.map(|h| h.0)))
        .collect();
    assert_eq!(kinds[0], (LayerKind::Data, 2048 * 8, Some(host)));
    assert_eq!(kinds[1], (LayerKind::Zero, 2048 * 4, Some(host + 2048 * 8)));
    assert_eq!(kinds[2], (LayerKind::Unallocated, 2048 * 20, None));
    assert_eq!(kinds[3], (LayerKind::Data, 2048 * 5 - 100, Some(host + 2048 * 3 + 100)));
    assert!(complaint(&image, K64).contains("both allocated and zero"));
    assert!(complaint(&image, 2 * K64).contains("without a host cluster"));
}

#[test]
fn features_are_judged_and_named() {
    let plain = || Hand::new(16, K64);
    let with = |bits| {
        let mut hand = plain();
        hand.header.incompatible_features = bits;
        hand
    };
    let name = FeatureName { kind: 0, bit: 40, name: "time travel".into() };
    let said = open_error(with(1 << 40 | 1 << 41).extension(Extension::FeatureNames(vec![name])));
    let want = "\"time travel\" (bit 40), incompatible feature bit 41 is not supported";
    assert!(said.contains(want), "{said}");
    for (method, word) in [(1, "AES"), (2, "LUKS")] {
        let mut hand = plain();
        hand.header.crypt_method = method;
        assert!(open_error(hand).contains(word));
    }
    assert!(open_error(with(incompatible::UNFINISHED_COPY)).contains("not finished"));
    let options = qcow2_file::image::ImageOptions { accept_unfinished: true, ..Default::default() };
    let image = Image::open_with(with(incompatible::UNFINISHED_COPY).finish(), options).unwrap();
    assert_eq!(image.warnings(), [Warning::UnfinishedCopy]);
    let image = Image::open(with(3).finish(), None).unwrap();
    assert_eq!(image.warnings(), [Warning::Dirty, Warning::Corrupt]);
    let mut hand = plain();
    hand.header.version = 2;
    let entry = hand.l2_at(0);
    hand.word(entry, 1);
    let image = Image::open(hand.finish(), None).unwrap();
    assert!(complaint(&image, 0).contains("version 2"));
}

/// Header fields that other implementations fell over, by offset.
#[test]
fn header_fields_are_bounded() {
    let good = Hand::new(16, 4 << 30).finish();
    let with = |at: u64, bytes: &[u8]| {
        let bad = good.snapshot();
        bad.write_at(bytes, at).unwrap();
        text(&Image::open(Arc::new(bad), None).unwrap_err())
    };
    let all: [(u64, &[u8], &str); 18] = [
        (0, b"QFI\0", "magic"),
        (4, &[0, 0, 0, 4], "version at offset 4"),
        (8, &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 3, 0xff], "backing_file_offset at offset 8"),
        (8, &[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 0], "backing_file_size at offset 16"),
        (20, &[0, 0, 0, 8], "cluster_bits at offset 20 is 8, outside 9 to 21"),
        (20, &[0, 0, 1, 4], "cluster_bits at offset 20 is 260"),
        (24, &[0x7f; 8], "size at offset 24"),
        (24, &[0, 0, 1, 0, 0, 0, 0, 0], "l1_size at offset 36 is 8, outside 2048"),
        (36, &[0, 0, 0, 7], "l1_size at offset 36 is 7, outside 8"),
        (36, &[0x7f, 0xff, 0xff, 0xff], "l1_size at offset 36"),
        (40, &[0; 8], "l1_table_offset at offset 40"),
        (40, &[0, 0, 0, 0, 0, 2, 0, 8], "l1_table_offset at offset 40 is 0x20008, not a multiple"),
        (40, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], "l1_table_offset at offset 40"),
        (48, &[0xff; 8], "refcount_table_offset at offset 48"),
        (56, &[0, 0x10, 0, 0], "refcount_table_clusters at offset 56"),
        (56, &[0; 4], "refcount_table_clusters at offset 56"),
        (60, &[0xff; 4], "nb_snapshots at offset 60"),
        (96, &[0, 0, 1, 0], "refcount_order at offset 96 is 256"),
    ];
    for (at, bytes, want) in all {
        let said = with(at, bytes);
        assert!(said.contains(want), "{at}: {said}");
    }
    assert!(with(100, &[0, 0, 0, 105]).contains("header_length at offset 100"));
    assert!(with(104, &[9]).contains("compression_type at offset 104"));
    // The length of the first extension, beyond the cluster.
    assert!(with(112, &[1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff]).contains("extension data at offset"));
}

#[test]
fn a_crooked_feature_name_table_means_nothing() {
    for len in [0, 1, 47, 49, 97] {
        let odd = Extension::Unknown { kind: 0x6803_f857, data: vec![0; len] };
        let image = Image::open(Hand::new(16, K64).extension(odd).finish(), None).unwrap();
        assert_eq!(byte(&image, 0), 0);
    }
}

#[test]
fn a_data_file_that_was_not_opened_is_missed_only_by_reads() {
    let mut hand = Hand::new(16, 4 * K64);
    hand.header.incompatible_features = incompatible::EXTERNAL_DATA_FILE;
    let entry = hand.l2_at(0);
    hand.word(entry, 1 << 63);
    let packed = hand.l2_at(K64);
    hand.word(packed, 1 << 62 | 0x30000);
    let file = hand.finish();
    let image = Image::open(file.clone(), None).unwrap();
    assert!(complaint(&image, 0).contains("was not opened"));
    assert_eq!(byte(&image, 2 * K64), 0);
    let data = Arc::new(Memory::from_bytes(&[5; 600]));
    let image = Image::open(file, Some(data)).unwrap();
    assert_eq!((byte(&image, 599), byte(&image, 600)), (5, 0));
    assert!(complaint(&image, K64).contains("is compressed in an image with a data file"));
}

/// Walks a whole disk; answers the number of extents.
fn walk(size: u64, ask: impl Fn(u64) -> Result<(u64, bool)>) -> (usize, u64) {
    let (mut at, mut count, mut data) = (0, 0, 0);
    while at < size {
        let (len, is_data) = ask(at).unwrap();
        data += if is_data { len } else { 0 };
        at += len;
        count += 1;
    }
    (count, data)
}

#[test]
fn huge_disks_are_walked_in_no_time() {
    let started = Instant::now();
    for (bits, size) in [(16, 1u64 << 40), (16, 16 << 40), (21, 1 << 60), (9, 100 << 30)] {
        let mut hand = Hand::new(bits, size);
        hand.data(0, 1);
        hand.data(size - hand.cluster(), 2);
        let image = Image::open(hand.finish(), None).unwrap();
        let cluster = image.geometry().cluster_size();
        let (count, data) = walk(size, |at| {
            let e = image.extent(GuestOffset(at), u64::MAX)?;
            Ok((e.len, e.kind == LayerKind::Data))
        });
        assert_eq!((count, data), (3, 2 * cluster), "{bits}");
    }
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[test]
fn an_empty_layer_over_a_fragmented_one_is_not_walked_again_and_again() {
    let size = 64u64 << 30;
    let mut top = Hand::new(12, size);
    // Tables everywhere, all empty: the dearest way of saying nothing.
    for span in 0..size / (2 << 20) {
        top.l2_at(span * (2 << 20));
    }
    let mut base = Hand::new(16, size);
    for n in 0..4000 {
        let host = base.allocate();
        let entry = base.l2_at(n * 4 * K64);
        base.file.write_at(&[1], host).unwrap();
        base.word(entry, host | 1 << 63);
    }
    let layer = |hand: Hand| Layer::Qcow2(Box::new(Image::open(hand.finish(), None).unwrap()));
    let chain = Chain::from_layers(vec![layer(top), layer(base)]).unwrap();
    let started = Instant::now();
    let (count, _) = walk(size, |at| {
        let e = chain.extent(GuestOffset(at), u64::MAX)?;
        Ok((e.len, e.kind == ChainKind::Data))
    });
    assert!((8000..30000).contains(&count), "{count}");
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[test]
fn an_overlay_longer_than_its_backing_reads_zero_beyond() {
    let top = Hand::new(16, 4 * K64);
    let raw = RawLayer::open(Arc::new(Memory::from_bytes(&vec![7; 70000]))).unwrap();
    assert_eq!(raw.virtual_size(), 70144);
    let deep = RawLayer::open(Arc::new(Memory::from_bytes(&vec![8; 262144]))).unwrap();
    let mut middle = Hand::new(16, K64 + 512);
    middle.data(0, 6);
    let layer = |hand: Hand| Layer::Qcow2(Box::new(Image::open(hand.finish(), None).unwrap()));
    let chain = Chain::from_layers(vec![layer(top), Layer::Raw(raw)]).unwrap();
    let mut buf = vec![0xee; 4 * K64 as usize];
    chain.read_at(&mut buf, GuestOffset(0)).unwrap();
    assert!(buf[..70000].iter().all(|b| *b == 7) && buf[70000..].iter().all(|b| *b == 0));
    let tail = chain.extent(GuestOffset(70144), u64::MAX).unwrap();
    assert_eq!((tail.kind, tail.len), (ChainKind::Hole, 4 * K64 - 70144));
    // A short layer in the middle hides what is below its end.
    let layers = vec![layer(Hand::new(16, 4 * K64)), layer(middle), Layer::Raw(deep)];
    let chain = Chain::from_layers(layers).unwrap();
    chain.read_at(&mut buf, GuestOffset(0)).unwrap();
    let cut = K64 as usize;
    assert!(buf[..cut].iter().all(|b| *b == 6) && buf[cut..cut + 512].iter().all(|b| *b == 8));
    assert!(buf[cut + 512..].iter().all(|b| *b == 0));
}

#[test]
fn a_failing_device_is_an_error_with_its_place() {
    let mut hand = Hand::new(16, 2 * K64);
    let host = hand.data(0, 1);
    let file = hand.finish();
    let image = Image::open(file.clone(), None).unwrap();
    assert_eq!(byte(&image, 0), 1);
    file.inject(Fault::new(OperationKind::Read, 0, 5));
    match image.read_at(&mut [0; 10], GuestOffset(100)) {
        Err(Error::Io { offset, source, .. }) => {
            assert_eq!((offset, source.raw_os_error()), (host + 100, Some(5)));
        }
        other => panic!("{other:?}"),
    }
    assert!(Image::open(file, None).is_err());
}

#[test]
fn threads_read_one_image() {
    let mut hand = Hand::new(9, 4 << 20);
    for n in (0..8192).step_by(3) {
        hand.data(n * 512, n as u8 | 1);
    }
    let image = Image::open(hand.finish(), None).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                let mut buf = vec![0; 10_000];
                for n in 0..400 {
                    let at = (n * 7919 + thread * 104_729) % ((4 << 20) - 10_000);
                    image.read_at(&mut buf, GuestOffset(at)).unwrap();
                    for (i, b) in buf.iter().enumerate() {
                        let cluster = (at + i as u64) / 512;
                        let want = if cluster.is_multiple_of(3) { cluster as u8 | 1 } else { 0 };
                        assert_eq!(*b, want);
                    }
                }
            });
        }
    });
}
