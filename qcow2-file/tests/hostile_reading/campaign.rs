//! Thousands of mutants with a fixed seed: no panic, bounded time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2_file::layout::header::{CompressionType, incompatible};
use qcow2_file::{GuestOffset, Image, Memory, Storage};

use crate::hand::Hand;

const MUTANTS: u64 = 4000;
/// Far beyond what any mutant needs, so that a slow machine does not fail.
const LONGEST: Duration = Duration::from_secs(10);

pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// Numbers that tend to hurt.
    fn nasty(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => (1 << self.below(64)) - 1,
            4 => self.below(1 << 20),
            5 => self.below(1 << 20) << 9,
            6 => self.below(64) << 16,
            _ => self.next(),
        }
    }
}

/// A healthy image, and the stretches (offset, length) of it that are worth changing.
type Victim = (Arc<Memory>, Vec<(u64, u64)>);

/// An image of each kind.
fn victims() -> Vec<Victim> {
    let mut all = Vec::new();
    for (bits, kind) in [(9, "plain"), (16, "plain"), (14, "extended"), (12, "zlib"), (16, "zstd")]
    {
        let size = 96u64 << bits;
        let mut hand = match kind {
            "extended" => Hand::with_subclusters(bits, size),
            _ => Hand::new(bits, size),
        };
        if kind == "zstd" {
            hand.header.compression_type = CompressionType::Zstd;
            hand.header.incompatible_features |= incompatible::COMPRESSION_TYPE;
        }
        hand.header.backing_file = Some("base.raw".into());
        let content: Vec<u8> = (0..1u64 << bits).map(|n| (n / 7) as u8).collect();
        let mut places = vec![(0, 112), (112, 64), (hand.l1_at(0), 16)];
        for n in 0..8 {
            let guest = n * 11 * hand.cluster();
            let host = match kind {
                "zlib" | "zstd" if n % 2 == 0 => hand.compressed(guest, &content),
                _ => hand.data(guest, n as u8),
            };
            places.push((hand.l2_at(guest), hand.header.geometry().l2_entry_size()));
            places.push((host, 32));
        }
        all.push((hand.finish(), places));
    }
    all
}

fn mutate(file: &Memory, places: &[(u64, u64)], random: &mut Random) {
    for _ in 0..1 + random.below(3) {
        let (start, len) = places[random.below(places.len() as u64) as usize];
        let width = [1, 4, 8][random.below(3) as usize];
        let at = start + random.below(len / width) * width;
        let bytes = random.nasty().to_be_bytes();
        file.write_at(&bytes[8 - width as usize..], at).unwrap();
    }
    if random.below(8) == 0 {
        file.set_len(random.below(file.len().unwrap() + 1)).unwrap();
    }
}

/// Opens, walks at most so many extents and reads at each.
fn exercise(file: Arc<Memory>) -> bool {
    let Ok(image) = Image::open(file, Some(Arc::new(Memory::from_bytes(&[1; 4096])))) else {
        return false;
    };
    let size = image.virtual_size();
    let (mut at, mut stored) = (0, Vec::new());
    let mut buf = vec![0; 3 * 65536 + 77];
    for _ in 0..400 {
        if at >= size {
            break;
        }
        let found = image.extent(GuestOffset(at), u64::MAX);
        let _ = image.read_at(&mut buf, GuestOffset(at));
        let _ = image.read_at(&mut buf[..100], GuestOffset(at.saturating_add(1000)));
        let _ = image.read_compressed(GuestOffset(at), &mut stored);
        stored.clear();
        at += match found {
            Ok(found) => {
                assert!(found.len >= 1 && found.len <= size - at);
                found.len
            }
            Err(_) => image.geometry().cluster_size() - image.geometry().in_cluster(at),
        };
    }
    true
}

#[test]
fn mutants_give_errors_and_nothing_worse() {
    let victims = victims();
    let mut random = Random::new(0x0bad_5eed_0bad_5eed);
    let mut opened = 0;
    for n in 0..MUTANTS {
        let (file, places) = &victims[(n % victims.len() as u64) as usize];
        let mutant = Arc::new(file.snapshot());
        mutate(&mutant, places, &mut random);
        let started = Instant::now();
        opened += u64::from(exercise(mutant));
        assert!(started.elapsed() < LONGEST, "mutant {n} took {:?}", started.elapsed());
    }
    assert!(
        opened > MUTANTS / 4,
        "only {opened} mutants could be opened: the campaign is too blunt"
    );
}

#[test]
fn every_cut_of_the_file_gives_errors_and_nothing_worse() {
    for (file, _) in victims() {
        let len = file.len().unwrap();
        for cut in (0..len).step_by(61).chain(0..200) {
            let short = Arc::new(file.snapshot());
            short.set_len(cut).unwrap();
            if cut % 7 == 0 {
                exercise(short);
            } else {
                let _ = Image::open(short, None);
            }
        }
        exercise(file);
    }
}
