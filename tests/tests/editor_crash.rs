//! Power cuts at every point of an editor's life: what was not synced may be on disk or not,
//! sector by sector. Whatever is left must have leaked clusters at worst, and every guest sector
//! must read as it was at the last sync or as somebody wrote it since.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bitferry_tests::peer::{Peer, require_all};
use bitferry_tests::random::{Random, seed};
use bitferry_tests::scratch::Scratch;
use bitferry_tests::{image, qemu};
use qcow2_file::check::{CheckReport, Finding, FindingKind, check};
use qcow2_file::edit::{Editor, EditorOptions, ZeroMode};
use qcow2_file::image::ImageOptions;
use qcow2_file::layout::entry::L1Entry;
use qcow2_file::layout::snapshot::{HEAD_BYTES, SnapshotHead};
use qcow2_file::preflight::read_header;
use qcow2_file::storage::Run;
use qcow2_file::{GuestOffset, Image, Memory, Storage};

const SIZE: u64 = (1 << 20) + 1536;
const SECTOR: u64 = 512;

#[derive(Debug, Clone)]
enum Event {
    Write(u64, Vec<u8>),
    Garbage(u64, u64),
    Sync,
}

/// A disk that remembers the order of what was done. What is discarded becomes garbage at once.
#[derive(Debug)]
struct Recorder {
    inner: Memory,
    log: Mutex<Vec<Event>>,
}

impl Recorder {
    fn position(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    fn push(&self, event: Event) {
        self.log.lock().unwrap().push(event);
    }
}

fn apply(memory: &Memory, event: &Event) {
    match event {
        Event::Write(at, data) => memory.write_at(data, *at).unwrap(),
        Event::Garbage(at, len) => {
            // What is discarded may also stay as it is; nothing grows a file by it.
            let len = (*len).min(memory.len().unwrap().saturating_sub(*at));
            memory.write_at(&vec![0xdd; len as usize], *at).unwrap();
        }
        Event::Sync => {}
    }
}

impl Storage for Recorder {
    fn name(&self) -> Arc<str> {
        self.inner.name()
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.push(Event::Write(offset, buf.to_vec()));
        self.inner.write_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(&vec![0; len as usize], offset)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let event = Event::Garbage(offset, len);
        apply(&self.inner, &event);
        self.push(event);
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }
    fn run_at(&self, _offset: u64, max_len: u64) -> io::Result<Run> {
        Ok(Run { len: max_len, is_hole: false })
    }
    fn sync(&self) -> io::Result<()> {
        self.push(Event::Sync);
        Ok(())
    }
}

/// A change or a sync: when it ran, and what the sectors that it touched held afterwards.
struct Step {
    events: Range<usize>,
    sectors: Vec<(u64, Vec<u8>)>,
    is_sync: bool,
}

struct Story {
    before: Memory,
    log: Vec<Event>,
    steps: Vec<Step>,
    content: Vec<u8>,
}

/// Runs random changes on an image and writes down what happened.
fn tell(path: &Path, random: &mut Random, count: u64) -> Story {
    let before = Memory::from_bytes(&std::fs::read(path).unwrap());
    let disk = Arc::new(Recorder { inner: before.snapshot(), log: Mutex::default() });
    let content = read_all(&before);
    let mut shadow = content.clone();
    let file: Arc<dyn Storage> = disk.clone();
    let editor = Editor::open(file, in_place()).unwrap();
    let mut steps = Vec::new();
    for round in 0..count {
        let start = disk.position();
        let (range, is_sync) = change(&editor, &mut shadow, random, round);
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        let sector = |s: u64| shadow[(s * SECTOR) as usize..((s + 1) * SECTOR) as usize].to_vec();
        let sectors = sectors.map(|s| (s, sector(s))).collect();
        steps.push(Step { events: start..disk.position(), sectors, is_sync });
    }
    let start = disk.position();
    editor.close().unwrap();
    steps.push(Step { events: start..disk.position(), sectors: Vec::new(), is_sync: true });
    let log = disk.log.lock().unwrap().clone();
    Story { before, log, steps, content }
}

/// One change. Answers what it touched.
fn change(
    editor: &Editor,
    shadow: &mut [u8],
    random: &mut Random,
    round: u64,
) -> (Range<u64>, bool) {
    let at = random.below(SIZE);
    let most = (SIZE - at).min(*random.pick(&[700, 9000, 300_000]));
    let (mut at, mut len) = (at, 1 + random.below(most));
    if random.one_in(2) {
        (at, len) = (at & !4095, len.next_multiple_of(4096));
        len = len.min(SIZE - at);
    }
    let bytes = at as usize..(at + len) as usize;
    match random.below(12) {
        0..=6 => {
            let data: Vec<u8> = (0..len).map(|i| (round + (at + i) / SECTOR) as u8 | 1).collect();
            editor.write_at(&data, GuestOffset(at)).unwrap();
            shadow[bytes].copy_from_slice(&data);
        }
        7 | 8 => {
            let mode = if random.one_in(2) { ZeroMode::Free } else { ZeroMode::Keep };
            editor.write_zeroes(GuestOffset(at), len, mode).unwrap();
            shadow[bytes].fill(0);
        }
        9 => {
            editor.discard(GuestOffset(at), len).unwrap();
            let cluster = editor.geometry().cluster_size();
            let (first, end) = (at.next_multiple_of(cluster), at + len);
            let last = if end == SIZE { end } else { end - end % cluster };
            if first < last {
                shadow[first as usize..last as usize].fill(0);
            }
        }
        _ => {
            editor.sync().unwrap();
            return (0..0, true);
        }
    }
    (at..at + len, false)
}

fn read_all(memory: &Memory) -> Vec<u8> {
    let file: Arc<dyn Storage> = Arc::new(memory.snapshot());
    let options = ImageOptions { accept_unfinished: true, ..ImageOptions::default() };
    let image = Image::open_with(file, options).unwrap();
    let mut content = vec![0xee; SIZE as usize];
    image.read_at(&mut content, GuestOffset(0)).unwrap();
    content
}

/// Every byte that snapshots hold.
fn snapshot_bytes(memory: &Memory) -> Vec<u8> {
    let header = read_header(memory).unwrap();
    let g = header.geometry();
    let (mut at, mut bytes) = (header.snapshots_offset, Vec::new());
    let word = |at: u64| {
        let mut buf = [0; 8];
        memory.read_at(&mut buf, at).unwrap();
        u64::from_be_bytes(buf)
    };
    for _ in 0..header.nb_snapshots {
        let mut head = [0; HEAD_BYTES];
        memory.read_at(&mut head, at).unwrap();
        let head = SnapshotHead::decode(&head, at, g).unwrap();
        at += head.entry_len();
        for i in 0..u64::from(head.l1_size) {
            let entry = L1Entry::decode(word(head.l1_table_offset + i * 8), g, 0).unwrap();
            let Some(table) = entry.table else { continue };
            let words = g.cluster_size() / 8;
            for raw in (0..words).map(|n| word(table.0 + n * 8)).filter(|raw| *raw != 0) {
                let host = raw & 0x00ff_ffff_ffff_fe00;
                let mut cluster = vec![0; g.cluster_size() as usize];
                let stored = !g.has_subclusters() && raw >> 62 & 1 == 0;
                if stored {
                    memory.read_at(&mut cluster, host).unwrap();
                }
                bytes.extend(raw.to_be_bytes());
                bytes.extend(cluster);
            }
        }
    }
    bytes
}

/// How much of what was not synced reached the disk.
#[derive(Debug, Clone, Copy)]
enum Survives {
    All,
    Nothing,
    SomeSectors,
    OnlyLast,
}

/// The disk after a cut. A sector that survives has the content of one moment, whole.
fn disk_after(
    durable: &Memory,
    pending: &[Event],
    survives: Survives,
    random: &mut Random,
) -> Memory {
    let (disk, live) = (durable.snapshot(), durable.snapshot());
    for (i, event) in pending.iter().enumerate() {
        apply(&live, event);
        let range = match event {
            Event::Write(at, data) => *at..at + data.len() as u64,
            Event::Garbage(at, len) => *at..(at + len).min(live.len().unwrap()),
            Event::Sync => continue,
        };
        for sector in range.start / SECTOR..range.end.div_ceil(SECTOR) {
            let survives = match survives {
                Survives::All => true,
                Survives::Nothing => false,
                Survives::SomeSectors => random.one_in(2),
                Survives::OnlyLast => i + 1 == pending.len(),
            };
            if survives {
                let mut bytes = [0; SECTOR as usize];
                live.read_at(&mut bytes, sector * SECTOR).unwrap();
                disk.write_at(&bytes, sector * SECTOR).unwrap();
            }
        }
    }
    disk
}

impl Story {
    /// Cuts the power at about `cuts` points and judges what is left.
    fn cut(&self, random: &mut Random, cuts: usize) {
        let snapshots = snapshot_bytes(&self.before);
        let stride = self.log.len().div_ceil(cuts).max(1);
        let durable = self.before.snapshot();
        let mut synced = 0;
        for cut in 0..=self.log.len() {
            if cut > 0 && matches!(self.log[cut - 1], Event::Sync) {
                self.log[synced..cut].iter().for_each(|e| apply(&durable, e));
                synced = cut;
            }
            if cut % stride != 0 && cut != self.log.len() {
                continue;
            }
            let pending = &self.log[synced..cut];
            let all = [Survives::All, Survives::Nothing, Survives::SomeSectors, Survives::OnlyLast];
            for survives in all {
                let disk = disk_after(&durable, pending, survives, random);
                let what = format!("cut before event {cut} of {}, {survives:?}", self.log.len());
                self.judge(&disk, cut, &what);
                assert!(snapshot_bytes(&disk) == snapshots, "{what}: a snapshot changed");
                if random.one_in(40) {
                    go_on(disk, &what);
                }
            }
        }
    }

    fn judge(&self, disk: &Memory, cut: usize, what: &str) {
        let file: Arc<dyn Storage> = Arc::new(disk.snapshot());
        let header = read_header(&*file).unwrap();
        let report = check(&file, &header).unwrap();
        assert!(!report.is_corrupt(), "{what}: {:?}", first_corruption(&report));
        let content = read_all(disk);
        let done_syncs = self.steps.iter().filter(|s| s.is_sync && s.events.end <= cut);
        let synced = done_syncs.map(|s| s.events.start).next_back();
        let mut kept = self.content.clone();
        let mut allowed: HashSet<(u64, &[u8])> = HashSet::new();
        for step in &self.steps {
            for (sector, bytes) in &step.sectors {
                if synced.is_some_and(|synced| step.events.end <= synced) {
                    kept[(sector * SECTOR) as usize..][..512].copy_from_slice(bytes);
                } else if step.events.start <= cut {
                    allowed.insert((*sector, bytes));
                }
            }
        }
        let sectors = content.chunks(512).zip(kept.chunks(512));
        for (sector, (found, old)) in (0u64..).zip(sectors) {
            let is_right = found == old || allowed.contains(&(sector, found));
            assert!(is_right, "{what}: sector {sector} holds {:x?}…", &found[..8]);
        }
    }
}

fn first_corruption(report: &CheckReport) -> Option<&Finding> {
    report.findings.iter().find(|f| f.kind != FindingKind::Leak)
}

fn in_place() -> EditorOptions {
    EditorOptions { is_in_place_copy: true, ..EditorOptions::default() }
}

/// What a cut left can be written to again, and then nothing is leaked.
fn go_on(disk: Memory, what: &str) {
    let file: Arc<dyn Storage> = Arc::new(disk);
    let editor = Editor::open(file.clone(), in_place()).unwrap();
    editor.write_at(&vec![9; 100_000], GuestOffset(70_000)).unwrap();
    editor.discard(GuestOffset(300_000), 400_000).unwrap();
    editor.close().unwrap();
    let report = check(&file, &read_header(&*file).unwrap()).unwrap();
    assert!(report.is_clean(), "{what}, written again: {:?}", report.findings.first());
}

#[test]
fn a_power_cut_leaks_at_worst() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let kinds: &[(&str, &[&str], bool)] = &[
        ("v2", &["compat=0.10"], true),
        ("v3", &["cluster_size=4k"], true),
        ("tiny", &["cluster_size=512,refcount_bits=64"], true),
        ("large", &["cluster_size=64k"], true),
        ("extended", &["extended_l2=on,cluster_size=16k"], false),
        ("one-bit", &["refcount_bits=1,cluster_size=1k"], false),
    ];
    for (name, options, has_snapshot) in kinds {
        let scratch = Scratch::new();
        let mut maker = image::make(&scratch, "image.qcow2", SIZE);
        for option in *options {
            maker = maker.option(*option);
        }
        maker = maker.write(0xaa, 0, 300_032);
        if *has_snapshot {
            maker = maker.io("write -c -P 0xab 512k 128k").snapshot("s").write(0xac, 65536, 4096);
        }
        let path = maker.done();
        qemu::check_is_clean(&path);
        let mut random = Random::new(seed(), name);
        let story = tell(&path, &mut random, 50);
        story.cut(&mut random, 45);
    }
}
