//! What single calls mean, and what is refused.

use std::sync::{Arc, Barrier};

use qcow2_file::bitmaps::{Bits, PersistentBitmap};
use qcow2_file::create::{Backing, CreateOptions, DataFile, NewImage};
use qcow2_file::layout::header::CompressionType;
use qcow2_file::{Error, GuestOffset, HostFile, Memory, Storage};

use crate::peer::scratch;
use crate::workload::{Load, Random, is_refused, packed, work};

const SIZE: u64 = 8 << 20;
const CLUSTER: u64 = 65536;

fn start(options: &CreateOptions) -> (Arc<Memory>, NewImage) {
    let file = Arc::new(Memory::new());
    let image = NewImage::create(Arc::clone(&file) as Arc<dyn Storage>, options).unwrap();
    (file, image)
}

fn read(image: &NewImage, at: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    image.read_at(&mut buf, GuestOffset(at)).unwrap();
    buf
}

#[test]
fn random_work_reads_back() {
    for (extended_l2, cluster_bits) in [(false, 9), (false, 12), (false, 16), (true, 16)] {
        let options = CreateOptions { extended_l2, cluster_bits, ..CreateOptions::new(SIZE + 512) };
        let (_, image) = start(&options);
        let mut shadow = vec![0; (SIZE + 512) as usize];
        let compression = Some(CompressionType::Zlib);
        let seed = u64::from(cluster_bits) + u64::from(extended_l2);
        let load = Load { seed, threads: 4, rounds: 5, compression, align: 512, reads: true };
        work(&image, &mut shadow, load);
        assert!(read(&image, 0, shadow.len()) == shadow);
    }
}

/// A writer and a zeroer in step in one cluster, many times over: neither undoes the other.
#[test]
fn writes_and_zeroes_in_one_cluster() {
    for extended_l2 in [false, true] {
        let size = 2048 * CLUSTER;
        let (_, image) = start(&CreateOptions { extended_l2, ..CreateOptions::new(size) });
        let step = Barrier::new(3);
        let each = |f: &(dyn Fn(u64) + Sync)| {
            for cluster in 0..2048 {
                step.wait();
                f(cluster * CLUSTER);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| each(&|at| image.write_at(&[1; 4096], GuestOffset(at)).unwrap()));
            scope.spawn(|| each(&|at| image.write_zeroes(GuestOffset(at + 8192), 4096).unwrap()));
            scope.spawn(|| {
                each(&|at| {
                    image.write_zeroes(GuestOffset(at + 32768), 32768).unwrap();
                    image.write_at(&[2; 4096], GuestOffset(at + 40000)).unwrap();
                });
            });
        });
        for cluster in 0..2048 {
            let found = read(&image, cluster * CLUSTER, CLUSTER as usize);
            let ones = found.iter().filter(|b| **b == 1).count();
            let twos = found.iter().filter(|b| **b == 2).count();
            assert_eq!((ones, twos), (4096, 4096), "cluster {cluster}");
        }
    }
}

#[test]
fn a_zeroed_cluster_does_not_give_its_old_content_back() {
    for options in [
        CreateOptions::new(SIZE),
        CreateOptions { version: 2, ..CreateOptions::new(SIZE) },
        CreateOptions { extended_l2: true, ..CreateOptions::new(SIZE) },
    ] {
        let (_, image) = start(&options);
        image.write_at(&[7; 2 * CLUSTER as usize], GuestOffset(0)).unwrap();
        image.write_zeroes(GuestOffset(0), CLUSTER).unwrap();
        image.write_at(&[8; 100], GuestOffset(5000)).unwrap();
        let found = read(&image, 0, CLUSTER as usize + 1);
        assert!(found[..5000].iter().all(|b| *b == 0));
        assert!(found[5000..5100].iter().all(|b| *b == 8));
        assert!(found[5100..CLUSTER as usize].iter().all(|b| *b == 0));
        assert_eq!(found[CLUSTER as usize], 7);
    }
}

#[test]
fn compressed_clusters_take_part_writes() {
    let (_, image) = start(&CreateOptions::new(SIZE));
    let content = Random::new(4).bytes(CLUSTER / 2).repeat(2);
    let bytes = packed(&content, CompressionType::Zlib);
    let store = |at: u64| {
        let at = GuestOffset(at);
        image.write_compressed(at, CompressionType::Zlib, CLUSTER, &bytes).unwrap()
    };
    assert!(store(0) && store(CLUSTER) && store(CLUSTER));
    image.write_at(&[5; 10], GuestOffset(CLUSTER - 5)).unwrap();
    let mut expected = content.repeat(2);
    expected[CLUSTER as usize - 5..CLUSTER as usize + 5].fill(5);
    assert!(read(&image, 0, 2 * CLUSTER as usize) == expected);
    assert!(!store(0), "a cluster that is data stays data");
    assert!(read(&image, 0, 2 * CLUSTER as usize) == expected);
    image.write_zeroes(GuestOffset(2 * CLUSTER), CLUSTER).unwrap();
    assert!(store(2 * CLUSTER));
    image.write_zeroes(GuestOffset(2 * CLUSTER), CLUSTER).unwrap();
    assert!(image.reads_as_zero(GuestOffset(2 * CLUSTER), CLUSTER));
    assert!(store(SIZE - CLUSTER));
}

#[test]
fn only_fitting_compressed_clusters_are_taken() {
    let (_, image) = start(&CreateOptions::new(SIZE));
    let zlib = CompressionType::Zlib;
    let store = |at: u64, kind, size, bytes: &[u8]| {
        image.write_compressed(GuestOffset(at), kind, size, bytes).unwrap()
    };
    assert!(!store(0, CompressionType::Zstd, CLUSTER, &[1; 100]));
    assert!(!store(0, zlib, 4096, &[1; 100]));
    assert!(!store(512, zlib, CLUSTER, &[1; 100]));
    assert!(!store(0, zlib, CLUSTER, &[]));
    assert!(!store(0, zlib, CLUSTER, &[1; CLUSTER as usize]));
    assert!(store(0, zlib, CLUSTER, &[1; CLUSTER as usize - 1]));
    assert!(is_refused(image.write_compressed(GuestOffset(SIZE), zlib, CLUSTER, &[1; 9])));
}

#[test]
fn zeroes_are_known() {
    let (_, image) = start(&CreateOptions::new(16 << 40));
    assert!(image.reads_as_zero(GuestOffset(0), 16 << 40));
    image.write_at(&[1], GuestOffset(1 << 40)).unwrap();
    assert!(!image.reads_as_zero(GuestOffset(0), 16 << 40));
    assert!(image.reads_as_zero(GuestOffset(0), 1 << 40));
    assert!(!image.reads_as_zero(GuestOffset((1 << 40) + 9), 1));
    image.write_at(&[0; 1 << 20], GuestOffset(2 << 40)).unwrap();
    assert!(image.reads_as_zero(GuestOffset(2 << 40), 14 << 40));
    assert!(!image.reads_as_zero(GuestOffset(15 << 40), 2 << 40), "beyond the disk");
}

#[test]
fn ranges_beyond_the_disk_change_nothing() {
    let (_, image) = start(&CreateOptions::new(SIZE));
    assert!(is_refused(image.write_at(&[1; 512], GuestOffset(SIZE - 511))));
    assert!(is_refused(image.write_zeroes(GuestOffset(1), u64::MAX)));
    assert!(is_refused(image.discard(GuestOffset(SIZE), 1)));
    assert!(is_refused(image.read_at(&mut [0; 2], GuestOffset(SIZE - 1))));
    image.write_at(&[], GuestOffset(SIZE)).unwrap();
    image.write_zeroes(GuestOffset(SIZE), 0).unwrap();
    image.finish(&[]).unwrap();
}

#[test]
fn a_part_of_a_unit_over_an_unread_backing_file_is_refused() {
    let backing = Some(Backing { name: "below".into(), format: None, reader: None });
    let (_, image) = start(&CreateOptions { backing, ..CreateOptions::new(SIZE - 512) });
    image.write_at(&[1; CLUSTER as usize], GuestOffset(0)).unwrap();
    image.write_at(&[2; 10], GuestOffset(10)).unwrap();
    let last = SIZE - CLUSTER;
    image.write_at(&[3; CLUSTER as usize - 512], GuestOffset(last)).unwrap();
    assert!(!image.reads_as_zero(GuestOffset(2 * CLUSTER), CLUSTER));
    image.write_zeroes(GuestOffset(2 * CLUSTER), CLUSTER).unwrap();
    assert!(image.reads_as_zero(GuestOffset(2 * CLUSTER), CLUSTER));
    image.write_at(&[4; 10], GuestOffset(2 * CLUSTER + 5)).unwrap();
    assert!(is_refused(image.write_at(&[1; 10], GuestOffset(4 * CLUSTER))));
    assert!(is_refused(image.finish(&[])), "what was refused is missing");
}

#[test]
fn a_file_that_is_not_empty_is_refused() {
    let file = Arc::new(Memory::from_bytes(&[0; 512]));
    assert!(is_refused(NewImage::create(file, &CreateOptions::new(SIZE))));
}

#[test]
fn a_finished_image_is_finished() {
    let (_, image) = start(&CreateOptions::new(SIZE));
    image.write_at(&[1; 512], GuestOffset(0)).unwrap();
    let bitmap = |bits| PersistentBitmap {
        name: "b".into(),
        granularity_bits: 16,
        is_enabled: true,
        bits: Bits::new(bits),
    };
    assert!(matches!(image.finish(&[bitmap(5)]), Err(Error::Bitmap { .. })));
    image.write_at(&[1; 512], GuestOffset(5 << 20)).unwrap();
    image.finish(&[bitmap(128)]).unwrap();
    assert!(is_refused(image.write_at(&[1; 512], GuestOffset(0))));
    assert!(is_refused(image.finish(&[])));
    assert_eq!(read(&image, 5 << 20, 1), [1]);
}

#[test]
fn version_2_holds_no_bitmaps() {
    let (_, image) = start(&CreateOptions { version: 2, ..CreateOptions::new(SIZE) });
    let bits = Bits::for_disk(SIZE, 16);
    let bitmap =
        PersistentBitmap { name: "b".into(), granularity_bits: 16, is_enabled: true, bits };
    assert!(matches!(image.finish(&[bitmap]), Err(Error::Bitmap { .. })));
    image.finish(&[]).unwrap();
}

/// One page in four of the source holds data: the new file takes no more than that and its tables.
#[test]
fn finely_sparse_data_stays_sparse() {
    use std::os::unix::fs::MetadataExt;
    let dir = scratch();
    let path = dir.path().join("new.qcow2");
    let file = Arc::new(HostFile::create_new(&path).unwrap());
    let image = NewImage::create(file, &CreateOptions::new(64 << 20)).unwrap();
    let mut unit = vec![0; 1 << 20];
    unit.chunks_mut(16384).for_each(|c| c[4096..8192].fill(3));
    for i in 0..64 {
        image.write_at(&unit, GuestOffset(i << 20)).unwrap();
    }
    image.finish(&[]).unwrap();
    let allocated = std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(allocated <= (16 << 20) + (128 << 10), "{allocated}");
}

/// The same beside a raw data file, whose clusters are all mapped; and zeroes written over data
/// are zeroes.
#[test]
fn a_raw_data_file_stays_sparse() {
    use std::os::unix::fs::MetadataExt;
    let dir = scratch();
    let data = dir.path().join("data.raw");
    let storage = Arc::new(HostFile::create_new(&data).unwrap());
    let data_file = Some(DataFile { name: "data.raw".into(), is_raw: true, storage });
    let options = CreateOptions { data_file, ..CreateOptions::new(16 << 20) };
    let (_, image) = start(&options);
    let mut unit = vec![0; 1 << 20];
    unit.chunks_mut(16384).for_each(|c| c[4096..8192].fill(3));
    for i in 0..16 {
        image.write_at(&unit, GuestOffset(i << 20)).unwrap();
    }
    image.write_at(&[0; 16384], GuestOffset(32768)).unwrap();
    unit[32768..49152].fill(0);
    assert!(read(&image, 0, unit.len()) == unit);
    image.finish(&[]).unwrap();
    let allocated = std::fs::metadata(&data).unwrap().blocks() * 512;
    assert!(allocated <= (4 << 20) + (128 << 10), "{allocated}");
}

/// A zeroing beyond the end of the file beside a write further on cuts nothing off.
#[test]
fn zeroing_beyond_the_end_cuts_nothing_off() {
    const BLOCKS: u64 = 400_000;
    let dir = scratch();
    let file = HostFile::create_new(&dir.path().join("raw")).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| (0..BLOCKS).for_each(|i| file.write_at(&[1; 8], i * 64).unwrap()));
        loop {
            let end = file.len().unwrap().next_multiple_of(64);
            if end >= (BLOCKS - 1) * 64 {
                break;
            }
            file.write_zeroes(end + 16, 40).unwrap();
        }
    });
    let mut found = vec![0; (BLOCKS * 64) as usize];
    file.read_at(&mut found, 0).unwrap();
    let lost = found.chunks(64).filter(|block| block[..8] != [1; 8]).count();
    assert_eq!(lost, 0);
}
