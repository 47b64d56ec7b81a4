//! A disk in memory, guest threads, backup jobs, and a shadow that records what each of them did by
//! other means.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::Scope;
use std::time::Duration;

use bitmap_mig::LiveBitmaps;
use block_mig::TrackedDisk;
use block_mig::device::ChainSource;
use mig_core::bitmap::BitmapInfo;
use mig_core::block::{BlockSink, BlockSource, Extent, ExtentKind};
use mig_core::guest::{Guest, GuestError};
use mig_core::{Blame, Result};

use crate::Silent;
use crate::disk::{Disk, Request};

pub(super) const SIZE: u64 = (12 << 20) + 512;
/// Writes that touch this sector store half of what they should and fail.
const BAD: u64 = 3 << 20;
const NAMES: [&str; 4] = ["nightly", "job-a", "job-b", "job-c"];

/// What a disk above a base allocates.
const CLUSTER: usize = 4096;

/// Bytes in memory, with a bad sector.
pub(super) struct Ram {
    content: Mutex<Content>,
    has_base: bool,
}

struct Content {
    /// As the guest reads them.
    bytes: Vec<u8>,
    /// Clusters that were written, if only in part.
    held: Vec<bool>,
}

impl Content {
    /// The bytes of a range, which is held from now on.
    fn change(&mut self, offset: u64, len: usize) -> &mut [u8] {
        let range = span(offset, len);
        if len > 0 {
            self.held[range.start / CLUSTER..=(range.end - 1) / CLUSTER].fill(true);
        }
        &mut self.bytes[range]
    }
}

impl Ram {
    fn new(bytes: Vec<u8>, has_base: bool) -> Self {
        let held = vec![false; bytes.len().div_ceil(CLUSTER)];
        Self { content: Mutex::new(Content { bytes, held }), has_base }
    }

    fn content(&self) -> std::sync::MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }

    /// Bytes of the leaves that are held, if only in part.
    pub(super) fn held_leaves(&self) -> u64 {
        let content = self.content();
        let leaves = content.held.chunks(65536 / CLUSTER);
        leaves.filter(|leaf| leaf.contains(&true)).count() as u64 * 65536
    }
}

fn span(offset: u64, len: usize) -> std::ops::Range<usize> {
    let start = usize::try_from(offset).unwrap();
    start..start + len
}

impl BlockSource for Ram {
    fn size(&self) -> u64 {
        SIZE
    }

    fn extent(&self, _offset: u64, max_len: u64) -> Result<Extent> {
        Ok(Extent { len: max_len, kind: ExtentKind::Data, host: None })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.copy_from_slice(&self.content().bytes[span(offset, buf.len())]);
        Ok(())
    }

    fn has_base(&self) -> bool {
        self.has_base
    }

    fn held(&self, offset: u64, max_len: u64) -> Result<Extent> {
        let first = span(offset, 0).start / CLUSTER;
        let is_held = self.content().held[first];
        let len = ((first as u64 + 1) * CLUSTER as u64 - offset).min(max_len);
        let kind = if is_held || !self.has_base { ExtentKind::Data } else { ExtentKind::Hole };
        Ok(Extent { len, kind, host: None })
    }
}

impl BlockSink for Ram {
    fn size(&self) -> u64 {
        SIZE
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let is_bad = (offset..offset + buf.len() as u64).contains(&BAD);
        let stored = if is_bad { &buf[..buf.len() / 2] } else { buf };
        self.content().change(offset, stored.len()).copy_from_slice(stored);
        if !is_bad {
            return Ok(());
        }
        let (blame, source) = (Blame::Device, "bad sector".into());
        Err(mig_core::Error::Device { operation: "write", offset, blame, source })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.content().change(offset, usize::try_from(len).unwrap()).fill(0);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        // Anything may be read afterwards: something else than before.
        self.content().change(offset, usize::try_from(len).unwrap()).fill(0xdd);
        Ok(())
    }

    fn reads_as_zero(&self, _offset: u64, _len: u64) -> bool {
        false
    }

    fn allocation_unit(&self) -> u64 {
        512
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

/// A bitmap as the shadow has it.
#[derive(Clone)]
struct Shadow {
    granularity_bits: u32,
    is_enabled: bool,
    granules: BTreeSet<u64>,
}

pub(super) struct Machine {
    pub(super) disk: Arc<TrackedDisk<Ram>>,
    pub(super) bitmaps: Arc<LiveBitmaps>,
    seed: u64,
    /// Guest threads hold it for reading around a write, jobs for writing: a job is a moment.
    moment: RwLock<()>,
    shadow: Mutex<BTreeMap<&'static str, Shadow>>,
    is_stopped: AtomicBool,
    writes: AtomicU64,
    /// In how many of ten times the guest writes anywhere.
    wild: u64,
    /// Percent of its time that the guest does not have.
    throttle: AtomicU64,
}

/// The guest of a machine, as its migration slows it down; every level is noted.
pub(super) struct Slowed<'a>(pub(super) &'a Machine, pub(super) Vec<u8>);

impl Guest for Slowed<'_> {
    fn pause(&mut self) -> std::result::Result<(), GuestError> {
        Ok(())
    }

    fn resume(&mut self) -> std::result::Result<(), GuestError> {
        Ok(())
    }

    fn throttle(&mut self, percent: u8) {
        self.0.throttle.store(percent.into(), Ordering::Relaxed);
        self.1.push(percent);
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % limit
    }
}

fn random_of(seed: u64) -> Random {
    Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
}

fn random_bytes(seed: u64) -> Vec<u8> {
    let mut random = random_of(seed);
    let mut bytes = vec![0u8; usize::try_from(SIZE).unwrap()];
    for leaf in bytes.chunks_mut(65536) {
        if random.below(8) > 0 {
            leaf.iter_mut().for_each(|b| *b = u8::try_from(random.below(256)).unwrap());
        }
    }
    bytes
}

impl Machine {
    pub(super) fn new(seed: u64) -> Self {
        Self::with(seed, Ram::new(random_bytes(seed), false))
    }

    /// One whose disk stands on a base, which is written to a raw file, and holds a little itself.
    /// Its guest writes to one part of it.
    pub(super) fn above(seed: u64, base: &Path) -> Self {
        let bytes = random_bytes(seed);
        std::fs::write(base, &bytes).unwrap();
        let (disk, mut random) = (Ram::new(bytes, true), random_of(seed + 1));
        for n in 0..12 {
            let (at, len) = (random.below(SIZE / 512) * 512, 512 * (1 + random.below(300)));
            let byte = if n % 2 == 0 { 0 } else { 0xee };
            let len = usize::try_from(len.min(SIZE - at)).unwrap();
            disk.content().change(at, len).fill(byte);
        }
        Self { wild: 0, ..Self::with(seed, disk) }
    }

    fn with(seed: u64, disk: Ram) -> Self {
        let bitmaps = Arc::new(LiveBitmaps::new(SIZE));
        let disk = Arc::new(TrackedDisk::new(disk, bitmaps.clone()));
        let machine = Self {
            disk,
            bitmaps,
            seed,
            moment: RwLock::new(()),
            shadow: Mutex::default(),
            is_stopped: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            wild: 2,
            throttle: AtomicU64::new(0),
        };
        machine.add("nightly", 12);
        machine
    }

    /// One whose guest writes all over the disk.
    pub(super) fn wild(seed: u64) -> Self {
        Self { wild: 10, ..Self::new(seed) }
    }

    /// Starts guest threads and a backup job.
    pub(super) fn start<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        for n in 1..=2 {
            scope.spawn(move || self.guest(Random((self.seed * 31 + n) | 1)));
        }
        scope.spawn(move || self.jobs(Random((self.seed * 131) | 1)));
    }

    pub(super) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Release);
    }

    pub(super) fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    fn guest(&self, mut random: Random) {
        while !self.is_stopped.load(Ordering::Acquire) {
            // Mostly in one part of the disk.
            let is_local = random.below(10) >= self.wild;
            let limit = if is_local { 1 << 20 } else { SIZE };
            let at = random.below(limit / 512) * 512;
            let len = (512 * (1 + random.below(64))).min(SIZE - at);
            let byte = u8::try_from(random.below(256)).unwrap();
            let moment = self.moment.read().unwrap();
            let kind = random.below(20);
            let range = if kind == 2 { BAD - 512..BAD + 512 } else { at..at + len };
            let done = match kind {
                0 => self.disk.write_zeroes(at, len),
                1 => self.disk.discard(at, len),
                _ => {
                    let len = usize::try_from(range.end - range.start).unwrap();
                    self.disk.write(&vec![byte; len], range.start)
                }
            };
            if done.is_err_and(|error| is_handed_over(&error)) {
                return;
            }
            // Failed writes count: part of them happened.
            for bitmap in self.shadow.lock().unwrap().values_mut().filter(|b| b.is_enabled) {
                let bits = bitmap.granularity_bits;
                bitmap.granules.extend(range.start >> bits..=(range.end - 1) >> bits);
            }
            drop(moment);
            self.writes.fetch_add(1, Ordering::Relaxed);
            let left = 100 - self.throttle.load(Ordering::Relaxed).min(99);
            std::thread::sleep(Duration::from_micros(200 * 100 / left));
        }
    }

    fn add(&self, name: &'static str, granularity_bits: u32) {
        let info = BitmapInfo {
            name: name.to_owned(),
            granularity: 1 << granularity_bits,
            is_enabled: true,
            is_persistent: true,
            is_inconsistent: false,
        };
        if self.bitmaps.add(&info).is_ok() {
            let shadow = Shadow { granularity_bits, is_enabled: true, granules: BTreeSet::new() };
            self.shadow.lock().unwrap().insert(name, shadow);
        }
    }

    fn jobs(&self, mut random: Random) {
        while !self.is_stopped.load(Ordering::Acquire) {
            let name = NAMES[1 + usize::try_from(random.below(3)).unwrap()];
            let moment = self.moment.write().unwrap();
            match random.below(6) {
                0 => self.add(name, 9 + u32::try_from(random.below(10)).unwrap()),
                1 => {
                    if self.bitmaps.remove(name).is_ok() {
                        self.shadow.lock().unwrap().remove(name);
                    }
                }
                2 => {
                    if self.bitmaps.clear(name).is_ok() {
                        self.shadow.lock().unwrap().get_mut(name).unwrap().granules.clear();
                    }
                }
                3 => {
                    let is_enabled = random.below(2) == 0;
                    if self.bitmaps.set_enabled(name, is_enabled).is_ok() {
                        self.shadow.lock().unwrap().get_mut(name).unwrap().is_enabled = is_enabled;
                    }
                }
                _ => self.merge(name),
            }
            drop(moment);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn merge(&self, name: &'static str) {
        if self.bitmaps.merge(name, "nightly").is_err() {
            return;
        }
        let mut shadow = self.shadow.lock().unwrap();
        let from = shadow["nightly"].clone();
        let to = shadow.get_mut(name).unwrap();
        for granule in from.granules {
            let bytes = granule << from.granularity_bits..(granule + 1) << from.granularity_bits;
            let last = (bytes.end.min(SIZE) - 1) >> to.granularity_bits;
            to.granules.extend(bytes.start >> to.granularity_bits..=last);
        }
    }

    fn content(&self) -> Vec<u8> {
        self.disk.inner().content().bytes.clone()
    }

    /// The bitmaps here are what the shadow says.
    pub(super) fn compare_source(&self) {
        let shadow = self.shadow.lock().unwrap();
        let mut names: Vec<_> = self.bitmaps.all().into_iter().map(|b| b.name).collect();
        names.sort();
        assert_eq!(names, shadow.keys().copied().collect::<Vec<_>>(), "seed {}", self.seed);
        for (name, bitmap) in &*shadow {
            let bits = self.bitmaps.snapshot(name).unwrap();
            let granules: BTreeSet<u64> = bits.runs().flatten().collect();
            assert!(granules == bitmap.granules, "seed {}: {name} differs", self.seed);
        }
    }

    /// An image has the content of the disk, and the bitmaps are what the shadow says.
    pub(super) fn compare_image(&self, path: &Path) {
        self.compare_source();
        self.compare_bitmaps(path);
        let request = Request { allow_named: true, ..Request::new(path, None) };
        let disk = Disk::open(&request, &Silent).unwrap();
        let mut there = vec![0; usize::try_from(SIZE).unwrap()];
        ChainSource(&disk.chain).read_at(&mut there, 0).unwrap();
        let here = self.content();
        let differs = here.iter().zip(&there).position(|(a, b)| a != b);
        assert_eq!(differs, None, "seed {}: first difference", self.seed);
    }

    /// The bitmaps of an image are what the shadow says.
    pub(super) fn compare_bitmaps(&self, path: &Path) {
        let request = Request { allow_named: true, ..Request::new(path, None) };
        let disk = Disk::open(&request, &Silent).unwrap();
        let directory = disk.bitmaps.directory().unwrap();
        let shadow = self.shadow.lock().unwrap();
        assert_eq!(directory.list().len(), shadow.len(), "seed {}", self.seed);
        for (name, bitmap) in &*shadow {
            let stored = bitmap_mig::load(directory, name).unwrap();
            assert_eq!(stored.is_enabled, bitmap.is_enabled, "seed {}: {name}", self.seed);
            assert_eq!(u32::from(stored.granularity_bits), bitmap.granularity_bits);
            let granules: BTreeSet<u64> = stored.bits.runs().flatten().collect();
            assert!(granules == bitmap.granules, "seed {}: {name} differs", self.seed);
        }
    }
}

fn is_handed_over(error: &mig_core::Error) -> bool {
    use block_mig::tracked::HandedOver;
    std::error::Error::source(error).is_some_and(|source| source.is::<HandedOver>())
}
