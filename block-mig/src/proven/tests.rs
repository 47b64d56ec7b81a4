//! Whatever is written when, the end is as if all had been read in the end; and what is at rest is
//! not read again.

use std::sync::Mutex;

use format_spec::content_hash::{ContentHash, Tree, hash_run};
use mig_core::block::{BlockSink, BlockSource, Extent, ExtentKind};
use proptest::prelude::*;
use qcow2_file::storage::Watched;
use qcow2_file::{Memory, Storage};

use super::*;
use crate::monitor::Unwatched;

const UNIT: usize = 1 << 20;
const UNITS: usize = 5;
const SIZE: usize = UNITS * UNIT - 512;

/// A disk whose units stand in a file in an order of their own, or nowhere.
struct Disk {
    file: Arc<Watched>,
    /// For each unit, where it stands in the file, in units.
    table: Mutex<Vec<Option<u64>>>,
    proven: Arc<Proven>,
    /// Whether a unit is written while it is read, in a way that leaves no mark.
    is_disturbed: bool,
    /// Whether reading ends in a panic.
    is_broken: bool,
}

impl Disk {
    fn new() -> Self {
        let writes = Arc::new(Writes::new(16 << 20, 16));
        let file = Arc::new(Watched::new(Arc::new(Memory::new()), writes.clone()));
        let proven = Arc::new(Proven::new(SIZE as u64, writes).unwrap());
        Self {
            file,
            table: Mutex::new(vec![None; UNITS]),
            proven,
            is_disturbed: false,
            is_broken: false,
        }
    }

    fn len(unit: usize) -> usize {
        UNIT.min(SIZE - unit * UNIT)
    }

    fn range(unit: usize) -> Range<u64> {
        (unit * UNIT) as u64..(unit * UNIT + Self::len(unit)) as u64
    }

    /// A guest's write, as a destination handles it.
    fn write(&self, unit: usize, byte: u8) {
        self.proven.begin(Self::range(unit));
        let host = {
            let mut table = self.table.lock().unwrap();
            let next = table.iter().flatten().max().map_or(1, |last| last + 1);
            *table[unit].get_or_insert(next)
        };
        self.file.write_at(&vec![byte; Self::len(unit)], host * UNIT_BYTES).unwrap();
        self.proven.arrived(Self::range(unit));
    }

    fn zero(&self, unit: usize) {
        self.proven.begin(Self::range(unit));
        self.table.lock().unwrap()[unit] = None;
        self.proven.arrived(Self::range(unit));
    }

    /// Reads what has come to rest.
    fn rest(&self) {
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| self.proven.run(self, &|_, _| {}));
            self.proven.settled();
            self.proven.wait();
            self.proven.stop();
            reader.join().unwrap();
        });
        // Another reader may begin.
        self.proven.lock().is_over = false;
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        self.fill(&mut bytes, 0);
        bytes
    }

    fn fill(&self, buf: &mut [u8], offset: u64) {
        let mut at = offset;
        for piece in buf.chunks_mut(UNIT) {
            assert!(at.is_multiple_of(UNIT_BYTES));
            match self.table.lock().unwrap()[usize::try_from(at / UNIT_BYTES).unwrap()] {
                None => piece.fill(0),
                Some(host) => self.file.read_at(piece, host * UNIT_BYTES).unwrap(),
            }
            at += piece.len() as u64;
        }
    }

    fn finish(&self) -> Proof {
        let places = |offset, max_len| self.placed(offset, max_len);
        let (disk, monitor) = (self, &Unwatched);
        self.proven.finish(Finished { disk, places: &places, workers: 2, monitor }).unwrap()
    }
}

impl ReadBack for Disk {
    fn read_back(&self, buf: &mut [u8], offset: u64) -> mig_core::Result<()> {
        assert!(!self.is_broken, "it is broken");
        if !self.is_disturbed {
            self.fill(buf, offset);
            return Ok(());
        }
        let before = self.table.lock().unwrap().clone();
        self.write(2, 7);
        self.fill(buf, offset);
        self.proven.begin(Self::range(2));
        *self.table.lock().unwrap() = before;
        Ok(())
    }

    fn placed(&self, offset: u64, max_len: u64) -> mig_core::Result<Extent> {
        let (unit, into) = (offset / UNIT_BYTES, offset % UNIT_BYTES);
        let len = (UNIT_BYTES - into).min(max_len);
        let host = self.table.lock().unwrap()[usize::try_from(unit).unwrap()];
        let kind = if host.is_some() { ExtentKind::Data } else { ExtentKind::Zero };
        if self.is_disturbed && into < UNIT_BYTES / 2 {
            // Something stands somewhere, so that it is read.
            let (len, host) = (UNIT_BYTES / 2 - into, Some(1 << 30));
            return Ok(Extent { len, kind: ExtentKind::Data, host });
        }
        Ok(Extent { len, kind, host: host.map(|host| host * UNIT_BYTES + into) })
    }
}

impl BlockSource for Disk {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn extent(&self, offset: u64, max_len: u64) -> mig_core::Result<Extent> {
        self.placed(offset, max_len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> mig_core::Result<()> {
        self.read_back(buf, offset)
    }
}

impl BlockSink for Disk {
    fn size(&self) -> u64 {
        SIZE as u64
    }
    fn write_at(&self, _: &[u8], _: u64) -> mig_core::Result<()> {
        unreachable!("tests write by themselves")
    }
    fn write_zeroes(&self, _: u64, _: u64) -> mig_core::Result<()> {
        unreachable!("tests write by themselves")
    }
    fn discard(&self, _: u64, _: u64) -> mig_core::Result<()> {
        unreachable!("tests write by themselves")
    }
    fn reads_as_zero(&self, _: u64, _: u64) -> bool {
        false
    }
    fn allocation_unit(&self) -> u64 {
        UNIT_BYTES
    }
    fn flush(&self) -> mig_core::Result<()> {
        Ok(())
    }
    fn sync(&self) -> mig_core::Result<()> {
        Ok(())
    }
}

fn root(bytes: &[u8]) -> ContentHash {
    let mut tree = Tree::new(bytes.len() as u64).unwrap();
    for p in hash_run(0, bytes, is_zero) {
        tree.put(p.height, p.index, p.node).unwrap();
    }
    tree.root().unwrap()
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Write(usize, u8),
    Zero(usize),
    Rest,
    /// A write of this program that nobody meant: to a unit of the file, at an offset in it.
    Stray(u64, u64),
    /// Two units change places in the table.
    Swap(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let unit = || 0..UNITS;
    prop_oneof![
        3 => (unit(), 0u8..4).prop_map(|(unit, byte)| Step::Write(unit, byte)),
        1 => unit().prop_map(Step::Zero),
        2 => Just(Step::Rest),
        1 => (0u64..8, 0..UNIT_BYTES).prop_map(|(at, into)| Step::Stray(at, into)),
        1 => (unit(), unit()).prop_map(|(a, b)| Step::Swap(a, b)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_end_is_as_if_all_was_read_then(steps in proptest::collection::vec(step(), 0..14)) {
        let disk = Disk::new();
        for step in steps {
            match step {
                Step::Write(unit, byte) => disk.write(unit, byte),
                Step::Zero(unit) => disk.zero(unit),
                Step::Rest => disk.rest(),
                Step::Stray(at, into) => disk.file.write_at(&[9], at * UNIT_BYTES + into).unwrap(),
                Step::Swap(a, b) => disk.table.lock().unwrap().swap(a, b),
            }
        }
        prop_assert_eq!(disk.finish().content, root(&disk.content()));
    }
}

#[test]
fn what_is_at_rest_is_not_read_again() {
    let disk = Disk::new();
    (0..UNITS).filter(|unit| *unit != 1).for_each(|unit| disk.write(unit, 1));
    assert_eq!(disk.finish().bytes_read, (SIZE - UNIT) as u64);
    disk.rest();
    assert_eq!(disk.finish(), Proof { content: root(&disk.content()), bytes_read: 0 });
    disk.write(3, 2);
    let proof = Proof { content: root(&disk.content()), bytes_read: UNIT_BYTES };
    assert_eq!(disk.finish(), proof);
}

#[test]
fn what_arrives_in_bulk_comes_to_rest_by_itself() {
    let disk = Disk::new();
    std::thread::scope(|scope| {
        scope.spawn(|| disk.proven.run(&disk, &|_, _| {}));
        for (_, byte) in (0..=SETTLE_BYTES / SIZE as u64).zip(1..) {
            (0..UNITS).for_each(|unit| disk.write(unit, byte));
        }
        let is_read = || disk.proven.lock().marks.first_unknown().unwrap() != Some(0..UNITS as u64);
        while !is_read() {
            std::thread::yield_now();
        }
        disk.proven.stop();
    });
    assert_eq!(disk.finish().content, root(&disk.content()));
}

#[test]
fn what_is_written_while_it_is_read_does_not_count() {
    let disk = Disk { is_disturbed: true, ..Disk::new() };
    disk.zero(2);
    disk.rest();
    assert_eq!(disk.proven.lock().marks.first_unknown().unwrap(), Some(0..UNITS as u64));
}

#[test]
fn nobody_waits_for_a_reader_that_is_gone() {
    let disk = Disk { is_broken: true, ..Disk::new() };
    disk.write(0, 1);
    disk.proven.settled();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| disk.proven.run(&disk, &|_, _| {}));
        disk.proven.wait();
        disk.proven.stop();
        assert!(reader.join().is_err());
    });
    let disk = Disk { is_broken: false, ..disk };
    assert_eq!(disk.finish().content, root(&disk.content()));
}
