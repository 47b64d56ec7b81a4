#![allow(clippy::cast_possible_truncation)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use format_spec::Reader;
use format_spec::content_hash::BitmapDigest;
use format_spec::native::block::{BitmapVersion, BlockRecord, DiskId, PIECE_BYTES, Pieces};
use mig_core::bitmap::BitmapStore as _;
use proptest::prelude::*;

use super::*;
use crate::Bitmap;

const SIZE: u64 = (600 << 20) + 512;

fn info(name: &str, granularity: u64) -> BitmapInfo {
    BitmapInfo {
        name: name.to_owned(),
        granularity,
        is_enabled: true,
        is_persistent: true,
        is_inconsistent: false,
    }
}

fn sender(bitmaps: &Arc<LiveBitmaps>) -> Sender {
    let carry = Box::new(|info: &BitmapInfo| (info.name != "private").then(|| info.name.clone()));
    Sender::new(bitmaps.clone(), DiskId(0), Arc::default(), carry)
}

/// A destination that holds records against the rules of SPEC 6.
struct Mirror {
    store: LiveBitmaps,
    /// By number: generation, and the name while it exists.
    known: BTreeMap<u32, (u32, Option<String>)>,
    sealed: Vec<(BitmapVersion, BitmapDigest)>,
}

impl Mirror {
    fn new(size: u64) -> Self {
        Self { store: LiveBitmaps::new(size), known: BTreeMap::new(), sealed: Vec::new() }
    }

    fn name(&self, version: BitmapVersion) -> String {
        let (generation, name) = &self.known[&version.bitmap];
        assert_eq!(*generation, version.generation);
        name.clone().expect("it exists")
    }

    fn apply(&mut self, record: &BlockRecord<'_>) {
        match record {
            BlockRecord::BitmapCreate(create) => {
                let BitmapVersion { bitmap, generation } = create.version;
                let before = self.known.get(&bitmap).map_or((0, None), Clone::clone);
                assert_eq!(before, (generation - 1, None));
                create.check(self.store.size()).unwrap();
                let mut info = info(create.name, create.shape.granularity.into());
                info.is_enabled = create.is_enabled;
                self.store.create(&info).unwrap();
                self.known.insert(bitmap, (generation, Some(create.name.to_owned())));
            }
            BlockRecord::BitmapUpdate(update) => {
                self.store.update(&self.name(update.version), update.is_enabled).unwrap();
            }
            BlockRecord::BitmapRemove(version) => {
                self.store.remove(&self.name(*version)).unwrap_err();
                mig_core::bitmap::BitmapStore::remove(&self.store, &self.name(*version)).unwrap();
                self.known.get_mut(&version.bitmap).unwrap().1 = None;
            }
            BlockRecord::BitmapSeal(seal) => {
                self.store.seal(&self.name(seal.version)).unwrap();
                self.sealed.push((seal.version, seal.digest.unwrap()));
            }
            other => panic!("{other:?}"),
        }
    }

    fn put(&self, packed: &[u8]) {
        for piece in Pieces::decode(Reader::new(packed, 0)).unwrap().iter() {
            let name = self.name(piece.version);
            let offset = piece.index * PIECE_BYTES as u64;
            let zeroes = [0; PIECE_BYTES];
            let bits = if piece.bits.is_empty() { &zeroes } else { piece.bits };
            self.store.put_bits(&name, offset, bits).unwrap();
        }
    }

    fn digest(&self, name: &str) -> BitmapDigest {
        digest(&self.store, name)
    }
}

fn digest(bitmaps: &LiveBitmaps, name: &str) -> BitmapDigest {
    let info = bitmaps.all().into_iter().find(|b| b.name == name).unwrap();
    let granularity_bits = info.granularity.ilog2() as u8;
    let bits = bitmaps.snapshot(name).unwrap();
    Bitmap { name: info.name, granularity_bits, is_enabled: info.is_enabled, bits }
        .digest()
        .unwrap()
}

/// One pass. Pieces are lost on the way if `is_lost`.
fn pass(sender: &mut Sender, mirror: &mut Mirror, is_lost: bool) -> usize {
    let mut tell = |record: &BlockRecord<'_>| {
        mirror.apply(record);
        Ok(())
    };
    sender.announce(&mut tell).unwrap();
    let mut total = 0;
    loop {
        let mut packed = Vec::new();
        sender.pieces(3000, &mut packed).unwrap();
        if packed.is_empty() {
            break;
        }
        assert!(packed.len() <= 3000);
        total += packed.len();
        if !is_lost {
            mirror.put(&packed);
        }
    }
    if is_lost {
        sender.give_back()
    } else {
        sender.acknowledged()
    }
    sender.hash().unwrap();
    total
}

/// The last pass and the seals; what both ends have must be the same.
fn hand_over(mut sender: Sender, source: &LiveBitmaps, mirror: &mut Mirror) {
    source.freeze();
    pass(&mut sender, mirror, false);
    let mut tell = |record: &BlockRecord<'_>| {
        mirror.apply(record);
        Ok(())
    };
    let sealed = sender.seal(true, &mut tell).unwrap();
    assert_eq!(sealed, mirror.sealed);
    let carried: Vec<_> = source.all().into_iter().filter(|b| b.name != "private").collect();
    let mut there = mirror.store.all();
    there.sort_by_key(|b| carried.iter().position(|c| c.name == b.name));
    assert_eq!(there, carried);
    for bitmap in &carried {
        assert_eq!(mirror.digest(&bitmap.name), digest(source, &bitmap.name), "{}", bitmap.name);
    }
    let digests: BTreeSet<_> = sealed.iter().map(|(_, digest)| digest.0).collect();
    assert_eq!(digests, carried.iter().map(|b| mirror.digest(&b.name).0).collect());
}

/// What a user may do, by name number.
#[derive(Debug, Clone)]
enum Op {
    Write(u64, u64),
    Add(usize, u8),
    Remove(usize),
    Clear(usize),
    Merge(usize, usize),
    Enable(usize, bool),
    Pass(bool),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..SIZE, 0u64..(4 << 20)).prop_map(|(at, len)| Op::Write(at, len.min(SIZE - at))),
        2 => (0usize..4, 9u8..22).prop_map(|(name, bits)| Op::Add(name, bits)),
        1 => (0usize..4).prop_map(Op::Remove),
        1 => (0usize..4).prop_map(Op::Clear),
        1 => (0usize..4, 0usize..4).prop_map(|(to, from)| Op::Merge(to, from)),
        1 => (0usize..4, any::<bool>()).prop_map(|(name, on)| Op::Enable(name, on)),
        2 => any::<bool>().prop_map(Op::Pass),
    ]
}

/// The same bitmaps as sets of granules, by other means.
#[derive(Default)]
struct Shadow(BTreeMap<usize, (u8, bool, BTreeSet<u64>)>);

impl Shadow {
    fn apply(&mut self, op: &Op) {
        let bitmaps = &mut self.0;
        match *op {
            Op::Write(at, len) => {
                for (bits, is_enabled, set) in bitmaps.values_mut() {
                    if *is_enabled && len > 0 {
                        set.extend(at >> *bits..=(at + len - 1) >> *bits);
                    }
                }
            }
            Op::Add(name, bits) => _ = bitmaps.entry(name).or_insert((bits, true, BTreeSet::new())),
            Op::Remove(name) => _ = bitmaps.remove(&name),
            Op::Clear(name) => _ = bitmaps.get_mut(&name).map(|b| b.2.clear()),
            Op::Enable(name, on) => _ = bitmaps.get_mut(&name).map(|b| b.1 = on),
            Op::Merge(to, from) => {
                let Some((theirs, _, set)) = bitmaps.get(&from).cloned() else { return };
                let Some((ours, _, target)) = bitmaps.get_mut(&to) else { return };
                for granule in set {
                    let last = ((granule + 1) << theirs).min(SIZE) - 1;
                    target.extend((granule << theirs) >> *ours..=last >> *ours);
                }
            }
            Op::Pass(_) => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn whatever_jobs_do_both_ends_and_the_shadow_agree(
        ops in proptest::collection::vec(op(), 1..60),
    ) {
        let names = ["a", "b", "c", "private"];
        let source = Arc::new(LiveBitmaps::new(SIZE));
        let (mut shadow, mut mirror) = (Shadow::default(), Mirror::new(SIZE));
        source.add(&info("a", 4096)).unwrap();
        shadow.apply(&Op::Add(0, 12));
        let mut sender = sender(&source);
        for op in &ops {
            shadow.apply(op);
            // Those that fail do so at the shadow too.
            match *op {
                Op::Write(at, len) => source.record_write(at..at + len),
                Op::Add(name, bits) => _ = source.add(&info(names[name], 1 << bits)),
                Op::Remove(name) => _ = LiveBitmaps::remove(&source, names[name]),
                Op::Clear(name) => _ = source.clear(names[name]),
                Op::Merge(to, from) => _ = source.merge(names[to], names[from]),
                Op::Enable(name, on) => _ = source.set_enabled(names[name], on),
                Op::Pass(is_lost) => _ = pass(&mut sender, &mut mirror, is_lost),
            }
        }
        hand_over(sender, &source, &mut mirror);
        prop_assert_eq!(source.all().len(), shadow.0.len());
        for (name, (bits, is_enabled, set)) in &shadow.0 {
            let found = source.all().into_iter().find(|b| b.name == names[*name]).unwrap();
            prop_assert_eq!((found.granularity, found.is_enabled), (1 << bits, *is_enabled));
            let snapshot = source.snapshot(names[*name]).unwrap();
            let granules: BTreeSet<u64> = snapshot.runs().flatten().collect();
            prop_assert_eq!(&granules, set);
        }
    }
}

#[test]
fn guests_and_jobs_at_full_speed_lose_nothing() {
    let source = Arc::new(LiveBitmaps::new(SIZE));
    source.add(&info("kept", 65536)).unwrap();
    source.add(&info("busy", 512)).unwrap();
    let mut mirror = Mirror::new(SIZE);
    let mut sender = sender(&source);
    let is_done = AtomicBool::new(false);
    let written = Mutex::new(BTreeSet::new());
    std::thread::scope(|scope| {
        for seed in 1..=3u64 {
            let (source, is_done, written) = (&source, &is_done, &written);
            scope.spawn(move || {
                let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mut mine = BTreeSet::new();
                while !is_done.load(Ordering::Relaxed) {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let at = random % (SIZE - 100_000);
                    source.record_write(at..at + random % 100_000 + 1);
                    mine.extend(at >> 16..=(at + random % 100_000) >> 16);
                }
                written.lock().unwrap().extend(mine);
            });
        }
        scope.spawn(|| {
            for round in 0..40 {
                source.add(&info("job", 1 << (9 + round % 8))).unwrap();
                source.merge("job", "busy").unwrap();
                source.clear("busy").unwrap();
                source.set_enabled("job", round % 2 == 0).unwrap();
                LiveBitmaps::remove(&source, "job").unwrap();
            }
            source.add(&info("job", 1 << 20)).unwrap();
            is_done.store(true, Ordering::Relaxed);
        });
        while !is_done.load(Ordering::Relaxed) {
            pass(&mut sender, &mut mirror, false);
        }
    });
    hand_over(sender, &source, &mut mirror);
    let kept: BTreeSet<u64> = mirror.store.snapshot("kept").unwrap().runs().flatten().collect();
    assert_eq!(kept, written.into_inner().unwrap());
}

#[test]
fn a_bitmap_that_becomes_inconsistent_is_taken_back() {
    let source = Arc::new(LiveBitmaps::new(SIZE));
    for name in ["good", "bad"] {
        source.add(&info(name, 65536)).unwrap();
    }
    let mut mirror = Mirror::new(SIZE);
    let mut sender = sender(&source);
    pass(&mut sender, &mut mirror, false);
    assert_eq!(mirror.store.all().len(), 2);
    source.invalidate("bad").unwrap();
    pass(&mut sender, &mut mirror, false);
    let names: Vec<_> = mirror.store.all().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["good"]);
}

#[test]
fn many_giant_bitmaps_cost_what_their_bits_cost() {
    const GIANT: u64 = 16 << 40;
    let source = Arc::new(LiveBitmaps::new(GIANT));
    for number in 0..64u64 {
        source.add(&info(&format!("b{number}"), 65536)).unwrap();
        let at = (number << 34) + 12345;
        source.record_write(at..at + (40 << 20));
    }
    let mut mirror = Mirror::new(GIANT);
    let mut sender = sender(&source);
    let pieces: u64 = (0..64).map(|n| 64 - n).sum();
    let wire = pass(&mut sender, &mut mirror, false) as u64;
    let held = pieces * PIECE_BYTES as u64;
    assert!(wire >= held && wire * 100 <= held * 105, "{wire} for {held}");
    source.record_write(5 << 40..(5 << 40) + 512);
    source.freeze();
    let begun = Instant::now();
    sender.announce(&mut |_| Ok(())).unwrap();
    let mut packed = Vec::new();
    sender.pieces(usize::MAX, &mut packed).unwrap();
    let sealed = sender.seal(true, &mut |_| Ok(())).unwrap();
    let took = begun.elapsed();
    // A loaded machine and an unoptimised build: the order of magnitude is what can be held here.
    assert!(took < Duration::from_millis(100), "{took:?}");
    assert_eq!((packed.len(), sealed.len()), (64 * (PIECE_BYTES + 20), 64));
    eprintln!("last pass and seals of 64 bitmaps: {took:?}");
}

#[test]
fn what_the_guest_writes_while_a_bitmap_loads_is_added_at_its_seal() {
    let store = LiveBitmaps::new(1 << 20);
    store.create(&info("a", 65536)).unwrap();
    store.create(&BitmapInfo { is_enabled: false, ..info("off", 65536) }).unwrap();
    store.put_bits("a", 0, &[0b0110, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    store.record_write(0..1);
    store.put_bits("a", 0, &[0b0100, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    assert!(store.put_bits("a", 3, &[0; 8]).is_err());
    assert_eq!(store.clear("a"), Err(JobError::Loading { name: "a".into() }));
    store.seal("a").unwrap();
    store.seal("off").unwrap();
    assert!(store.seal("a").is_err() && store.put_bits("a", 0, &[0; 8]).is_err());
    assert_eq!(store.snapshot("a").unwrap().runs().collect::<Vec<_>>(), [0..1, 2..3]);
    assert_eq!(store.count("off").unwrap(), 0);
    store.invalidate("a").unwrap();
    assert!(store.all()[0].is_inconsistent && store.snapshot("a").is_err());
    store.store().unwrap();
}

#[test]
fn sealed_bitmaps_are_kept_in_the_image() {
    use qcow2_file::Memory;
    use qcow2_file::create::{CreateOptions, NewImage};
    let file = Arc::new(Memory::new());
    let image = NewImage::create(file.clone(), &CreateOptions::new(SIZE & !511)).unwrap();
    image.finish(&[]).unwrap();
    let keeper = Arc::new(crate::ImageBitmaps::open(file).unwrap());
    for bits in [0x11, 0x22] {
        let store = LiveBitmaps::kept_in(SIZE & !511, keeper.clone());
        store.create(&info("a", 65536)).unwrap();
        store.create(&BitmapInfo { is_persistent: false, ..info("fleeting", 65536) }).unwrap();
        store.put_bits("a", 8, &[bits, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        store.seal("a").unwrap();
        store.seal("fleeting").unwrap();
        store.store().unwrap();
        assert_eq!(keeper.list().unwrap(), [info("a", 65536)]);
        let mut stored = [0; 16];
        keeper.read_bits("a", 0, &mut stored).unwrap();
        assert_eq!(stored[8], bits);
    }
}

#[test]
fn jobs_wait_while_bitmaps_are_sealed_and_fail_once_they_are_gone() {
    let bitmaps = LiveBitmaps::new(SIZE);
    bitmaps.add(&info("a", 65536)).unwrap();
    bitmaps.freeze();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| bitmaps.clear("a"));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waits.is_finished());
        bitmaps.thaw();
        waits.join().unwrap().unwrap();
        bitmaps.freeze();
        let fails = scope.spawn(|| bitmaps.add(&info("b", 65536)));
        bitmaps.retire();
        assert_eq!(fails.join().unwrap(), Err(JobError::HandedOver));
    });
    for (name, granularity) in [("", 512), ("x\0", 512), ("x", 256), ("x", 3000), ("x", 1 << 32)] {
        let error = LiveBitmaps::new(SIZE).add(&info(name, granularity)).unwrap_err();
        assert!(matches!(error, JobError::Wrong { .. }));
    }
    let giant = LiveBitmaps::new(16 << 40).add(&info("fine", 512)).unwrap_err();
    assert!(matches!(giant, JobError::Wrong { .. }));
}

/// A destination that has kept bitmaps of an earlier attempt.
struct Kept<'a>(&'a LiveBitmaps);

impl mig_core::section::HaveReader for Kept<'_> {
    fn next(&mut self, _disk: DiskId) -> mig_core::stream::Result<Option<mig_core::section::Have>> {
        unreachable!("no disk is asked for")
    }

    fn next_bitmap(
        &mut self,
        version: BitmapVersion,
    ) -> mig_core::stream::Result<Vec<(u64, format_spec::content_hash::Node)>> {
        let name = &self.0.all()[version.bitmap as usize].name;
        let bits = self.0.snapshot(name).unwrap();
        let leaves = (0..bits.byte_len().div_ceil(65536)).map(|leaf| {
            let mut bytes = vec![0; (bits.byte_len() - leaf * 65536).min(65536) as usize];
            bits.read_bytes(leaf * 65536, &mut bytes);
            (leaf, bytes)
        });
        let leaves = leaves.filter(|(_, bytes)| !mig_core::block::is_zero(bytes));
        Ok(leaves.map(|(leaf, bytes)| (leaf, format_spec::content_hash::leaf(&bytes))).collect())
    }
}

#[test]
fn only_what_the_destination_lacks_is_sent_again() {
    let source = Arc::new(LiveBitmaps::new(SIZE));
    let there = LiveBitmaps::new(SIZE);
    for bitmaps in [&*source, &there] {
        bitmaps.add(&info("fine", 512)).unwrap();
        bitmaps.add(&info("coarse", 65536)).unwrap();
        bitmaps.record_write(0..200 << 20);
        bitmaps.record_write(500 << 20..501 << 20);
    }
    // What differs: set here only, set there only, and a leaf that is there alone.
    source.record_write(511 << 20..(511 << 20) + 512);
    there.clear("coarse").unwrap();
    there.record_write(300 << 20..(300 << 20) + 512);
    let mut sender = sender(&source);
    sender.announce(&mut |_| Ok(())).unwrap();
    sender.compare(&mut Kept(&there)).unwrap();
    // The guest goes on between comparing and sending.
    source.record_write(7 << 20..(7 << 20) + 512);
    source.record_write(290 << 20..(290 << 20) + 512);
    let mut packed = Vec::new();
    sender.pieces(usize::MAX, &mut packed).unwrap();
    let held = Pieces::decode(Reader::new(&packed, 0)).unwrap();
    assert!(packed.len() < 80 * (PIECE_BYTES + 20), "{}", packed.len());
    let names = ["fine", "coarse"];
    let loaded = LiveBitmaps::new(SIZE);
    for name in names {
        let granularity = there.all().iter().find(|b| b.name == name).unwrap().granularity;
        loaded.create(&info(name, granularity)).unwrap();
        let bits = there.snapshot(name).unwrap();
        let mut bytes = vec![0; bits.byte_len() as usize];
        bits.read_bytes(0, &mut bytes);
        loaded.put_bits(name, 0, &bytes).unwrap();
    }
    for piece in held.iter() {
        let zeroes = [0; PIECE_BYTES];
        let bits = if piece.bits.is_empty() { &zeroes } else { piece.bits };
        let name = names[piece.version.bitmap as usize];
        loaded.put_bits(name, piece.index * PIECE_BYTES as u64, bits).unwrap();
    }
    let sealed = sender.seal(true, &mut |_| Ok(())).unwrap();
    for (name, (_, digest_sent)) in names.into_iter().zip(sealed) {
        loaded.seal(name).unwrap();
        assert_eq!(digest(&loaded, name), digest(&source, name), "{name}");
        assert_eq!(digest_sent, digest(&source, name), "{name}");
    }
    assert!(sender.compare(&mut Liar).is_err());
}

/// It has a leaf behind the end.
struct Liar;

impl mig_core::section::HaveReader for Liar {
    fn next(&mut self, _disk: DiskId) -> mig_core::stream::Result<Option<mig_core::section::Have>> {
        Ok(None)
    }

    fn next_bitmap(
        &mut self,
        _version: BitmapVersion,
    ) -> mig_core::stream::Result<Vec<(u64, format_spec::content_hash::Node)>> {
        Ok(vec![(u64::MAX / 2, [0; 32])])
    }
}
