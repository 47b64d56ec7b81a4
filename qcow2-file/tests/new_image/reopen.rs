//! An image that was cut off while it was written is gone on with: what was synced is there, what
//! was not can be written anew, and the finished image is sound.

use std::collections::BTreeMap;
use std::sync::Arc;

use qcow2_file::bitmaps::{Bits, PersistentBitmap};
use qcow2_file::check::check;
use qcow2_file::create::{Backing, CreateOptions, DataFile, NewImage};
use qcow2_file::layout::header::CompressionType;
use qcow2_file::preflight::read_header;
use qcow2_file::storage::{Operation, OperationKind};
use qcow2_file::{Error, GuestOffset, Image, Memory, Storage};

use crate::matrix::Below;
use crate::workload::{Random, packed};

/// What is written, claimed and written again as one.
const UNIT: u64 = 8192;
const UNITS: u64 = 96;
const SIZE: u64 = UNITS * UNIT - 512;
const SECTOR: usize = 512;

fn unit_len(unit: u64) -> u64 {
    UNIT.min(SIZE - unit * UNIT)
}

fn shapes() -> Vec<CreateOptions> {
    let shape = |cluster_bits, extended_l2, version| CreateOptions {
        cluster_bits,
        extended_l2,
        version,
        ..CreateOptions::new(SIZE)
    };
    vec![
        shape(9, false, 3),
        shape(12, false, 2),
        shape(13, false, 3),
        shape(16, false, 3),
        shape(16, true, 3),
        shape(18, true, 3),
    ]
}

/// A file's life: what was done to it, and what was known to be durable from when on.
#[derive(Default)]
struct Life {
    log: Vec<Operation>,
    /// Units that were about to be written, by position in the log.
    touched: Vec<(usize, u64)>,
    /// Content that was synced, by position in the log.
    synced: Vec<(usize, BTreeMap<u64, Vec<u8>>)>,
}

impl Life {
    /// What a journal would claim when the power goes at `cut`.
    fn claims(&self, cut: usize) -> BTreeMap<u64, Vec<u8>> {
        let last = self.synced.iter().rev().find(|(at, _)| *at <= cut);
        let Some((since, claims)) = last else { return BTreeMap::new() };
        let mut claims = claims.clone();
        let later = self.touched.iter().filter(|(at, _)| (*since..cut).contains(at));
        later.for_each(|(_, unit)| {
            claims.remove(unit);
        });
        claims
    }
}

/// One unit's worth of work, and what the guest then reads.
fn write(image: &NewImage, random: &mut Random, unit: u64) -> Vec<u8> {
    let (at, len) = (GuestOffset(unit * UNIT), unit_len(unit));
    let cluster = image.geometry().cluster_size();
    let mut bytes = random.bytes(len);
    match random.below(4) {
        0 => {
            bytes.fill(0);
            image.write_zeroes(at, len).unwrap();
        }
        1 if cluster <= UNIT && len == UNIT => {
            for (i, part) in (0..).zip(bytes.chunks_mut(cluster as usize)) {
                part[cluster as usize / 2..].fill(7);
                let packed = packed(part, CompressionType::Zlib);
                let at = GuestOffset(at.0 + i * cluster);
                if !image.write_compressed(at, CompressionType::Zlib, cluster, &packed).unwrap() {
                    image.write_at(part, at).unwrap();
                }
            }
        }
        _ => image.write_at(&bytes, at).unwrap(),
    }
    bytes
}

fn live(options: &CreateOptions, seed: u64) -> Life {
    let file = Arc::new(Memory::new());
    let mut random = Random::new(seed);
    let mut life = Life::default();
    let mut content = BTreeMap::new();
    file.start_log();
    let image = NewImage::create(Arc::clone(&file) as Arc<dyn Storage>, options).unwrap();
    for step in 0..70 {
        let unit = random.below(UNITS);
        life.touched.push((life.log.len(), unit));
        content.insert(unit, write(&image, &mut random, unit));
        match random.below(6) {
            0 => {
                image.sync().unwrap();
                life.log.append(&mut file.take_log());
                file.start_log();
                life.synced.push((life.log.len(), content.clone()));
            }
            1 => image.flush().unwrap(),
            _ => {}
        }
        life.log.append(&mut file.take_log());
        file.start_log();
        if step == 60 {
            // Finished, and then the other side changed its mind.
            image.finish(&[]).unwrap();
            life.log.append(&mut file.take_log());
            life.synced.push((life.log.len(), content.clone()));
            return life;
        }
    }
    life
}

/// What a cut leaves: what was synced, and of the rest all (a kill), nothing, or any sectors.
fn state(life: &Life, cut: usize, random: &mut Random, variant: u64) -> Memory {
    let is_sync = |o: &Operation| o.kind == OperationKind::Sync;
    let synced = life.log[..cut].iter().rposition(is_sync).map_or(0, |at| at + 1);
    let state = Memory::new();
    for (at, operation) in life.log[..cut].iter().enumerate() {
        if at < synced || variant == 0 {
            state.apply(operation);
        } else if variant > 1 {
            for (i, sector) in operation.data.chunks(SECTOR).enumerate() {
                if random.below(2) == 0 {
                    let offset = operation.offset + (i * SECTOR) as u64;
                    state.apply(&Operation { offset, data: sector.to_vec(), ..operation.clone() });
                }
            }
            if operation.data.is_empty() && random.below(2) == 0 {
                state.apply(operation);
            }
        }
    }
    state
}

fn read(image: &NewImage, unit: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; unit_len(unit) as usize];
    image.read_at(&mut bytes, GuestOffset(unit * UNIT)).unwrap();
    bytes
}

/// Goes on, holds the claims, writes the rest anew and holds the finished image.
fn go_on(options: &CreateOptions, state: Memory, claims: &BTreeMap<u64, Vec<u8>>, what: &str) {
    let file = Arc::new(state);
    let mut random = Random::new(claims.len() as u64 + 3);
    let image = NewImage::reopen(Arc::clone(&file) as Arc<dyn Storage>, options).unwrap();
    for (unit, bytes) in claims {
        assert!(read(&image, *unit) == *bytes, "{what}: unit {unit} was synced");
    }
    for unit in (0..UNITS).filter(|unit| !claims.contains_key(unit)) {
        let at = GuestOffset(unit * UNIT);
        image.write_zeroes(at, unit_len(unit)).unwrap();
    }
    let mut content = claims.clone();
    for unit in (0..UNITS).filter(|unit| !claims.contains_key(unit) || unit % 7 == 0) {
        content.insert(unit, write(&image, &mut random, unit));
    }
    let mut bits = Bits::for_disk(SIZE, 9);
    bits.set_range(3..90);
    let bitmap = PersistentBitmap { name: "b".into(), granularity_bits: 9, is_enabled: true, bits };
    let bitmaps = if options.version >= 3 { vec![bitmap] } else { Vec::new() };
    image.finish(&bitmaps).unwrap();
    let storage: Arc<dyn Storage> = file.clone();
    let header = read_header(&*storage).unwrap();
    let report = check(&storage, &header).unwrap();
    assert!(report.is_clean(), "{what}: {report:?}");
    let found = Image::open(storage, None).unwrap();
    for (unit, bytes) in &content {
        let mut read = vec![0xee; bytes.len()];
        found.read_at(&mut read, GuestOffset(unit * UNIT)).unwrap();
        assert!(read == *bytes, "{what}: unit {unit}");
    }
}

#[test]
fn whatever_a_cut_leaves_can_be_gone_on_with() {
    for (seed, options) in (5..).zip(shapes()) {
        let life = live(&options, seed);
        let mut random = Random::new(seed ^ 0xabcd);
        let stride = (life.log.len() / 40).max(1);
        for cut in (0..=life.log.len()).step_by(stride).chain([life.log.len()]) {
            let claims = life.claims(cut);
            for variant in 0..4 {
                let state = state(&life, cut, &mut random, variant);
                let what = format!("seed {seed}, cut {cut}, variant {variant}");
                go_on(&options, state, &claims, &what);
            }
        }
    }
}

/// Any byte of the tables changed, many times over: an error of its kind, or an image that may read
/// wrong but that is sound when it is finished.
#[test]
fn an_unfinished_file_in_other_hands_is_an_error_or_sound() {
    let (mut refused, mut sound) = (0, 0);
    for (seed, options) in (50..).zip(shapes()) {
        let life = live(&options, seed);
        let whole = Memory::new();
        life.log.iter().for_each(|operation| whole.apply(operation));
        let mut random = Random::new(seed);
        for _ in 0..200 {
            let file = Arc::new(whole.snapshot());
            let len = file.len().unwrap();
            for _ in 0..=random.below(3) {
                // Anywhere, or in the first tables.
                let (from, reach) = match random.below(3) {
                    0 => (0, len),
                    1 => (1 << options.cluster_bits, 8),
                    _ => (2 << options.cluster_bits, 512),
                };
                let garbage = random.next().to_be_bytes();
                let garbage = &garbage[..1 + random.below(8) as usize];
                file.write_at(garbage, from + random.below(reach)).unwrap();
            }
            let reopened = NewImage::reopen(Arc::clone(&file) as Arc<dyn Storage>, &options);
            let finished = reopened.and_then(|image| {
                image.write_at(&[5; 3 * 512], GuestOffset(512 * 100))?;
                image.finish(&[])
            });
            match finished {
                Ok(()) => {
                    let storage: Arc<dyn Storage> = file.clone();
                    let report = check(&storage, &read_header(&*storage).unwrap()).unwrap();
                    assert!(!report.is_corrupt(), "{report:?}");
                    sound += 1;
                }
                Err(Error::Refused { .. } | Error::Malformed { .. }) => refused += 1,
                Err(error) => panic!("{error:?}"),
            }
        }
    }
    assert!(sound > 100 && refused > 100, "{sound} sound, {refused} refused");
}

#[test]
fn data_files_can_be_gone_on_with() {
    for is_raw in [false, true] {
        let (file, data) = (Arc::new(Memory::new()), Arc::new(Memory::new()));
        let name = "data".to_owned();
        let data_file = DataFile { name: name.into(), is_raw, storage: data.clone() };
        let options = CreateOptions { data_file: Some(data_file), ..CreateOptions::new(SIZE) };
        let image = NewImage::create(Arc::clone(&file) as Arc<dyn Storage>, &options).unwrap();
        image.write_at(&[1; 100_000], GuestOffset(70_000)).unwrap();
        image.sync().unwrap();
        drop(image);
        let image = NewImage::reopen(Arc::clone(&file) as Arc<dyn Storage>, &options).unwrap();
        image.write_at(&[2; 100], GuestOffset(400_000)).unwrap();
        image.write_zeroes(GuestOffset(70_000), 1000).unwrap();
        image.finish(&[]).unwrap();
        let storage: Arc<dyn Storage> = file.clone();
        assert!(check(&storage, &read_header(&*storage).unwrap()).unwrap().is_clean());
        let found = Image::open(storage, Some(data.clone())).unwrap();
        let mut bytes = vec![0xee; SIZE as usize];
        found.read_at(&mut bytes, GuestOffset(0)).unwrap();
        let mut expected = vec![0; SIZE as usize];
        expected[71_000..170_000].fill(1);
        expected[400_000..400_100].fill(2);
        assert!(bytes == expected, "raw: {is_raw}");
    }
}

/// What a crash left of what was not synced is not seen any more, and what is below is.
#[test]
fn above_a_backing_file_what_is_not_known_is_uncovered() {
    let size = SIZE as usize;
    let below: Vec<u8> = (0..size).map(|at| (at / 512 % 251) as u8 | 1).collect();
    for shape in shapes() {
        let reader = Some(Arc::new(Below(below.clone())) as _);
        let backing = Some(Backing { name: "below".into(), format: Some("raw".into()), reader });
        let options = CreateOptions { backing, ..shape };
        let cluster = 1 << options.cluster_bits;
        let (known, some) = (3 * cluster, 64 << 10);
        let file = Arc::new(Memory::new());
        let image = NewImage::create(Arc::clone(&file) as Arc<dyn Storage>, &options).unwrap();
        let known = known.min(size / 2 / cluster * cluster);
        image.write_at(&vec![2; known], GuestOffset(0)).unwrap();
        image.sync().unwrap();
        image.write_at(&vec![4; some], GuestOffset(known as u64 + 512)).unwrap();
        image.write_zeroes(GuestOffset((size - 5000) as u64 & !511), 1024).unwrap();
        // Its tables come to the file and its content does not.
        image.flush().unwrap();
        drop(image);
        let image = NewImage::reopen(Arc::clone(&file) as Arc<dyn Storage>, &options).unwrap();
        image.uncover(GuestOffset(known as u64), (size - known) as u64).unwrap();
        let mut expected = below.clone();
        expected[..known].fill(2);
        let holds = |image: &NewImage, expected: &[u8]| {
            let mut bytes = vec![0xee; size];
            image.read_at(&mut bytes, GuestOffset(0)).unwrap();
            assert!(bytes == expected, "{options:?}");
        };
        holds(&image, &expected);
        // A part of a cluster is not uncovered.
        image.uncover(GuestOffset(512), cluster as u64 - 512).unwrap();
        image.write_at(&[7; 1024], GuestOffset(known as u64 + 1024)).unwrap();
        expected[known + 1024..known + 2048].fill(7);
        holds(&image, &expected);
        image.finish(&[]).unwrap();
        let storage: Arc<dyn Storage> = file.clone();
        assert!(check(&storage, &read_header(&*storage).unwrap()).unwrap().is_clean());
    }
}
