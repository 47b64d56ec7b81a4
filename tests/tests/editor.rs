//! `qcow2_file::edit` against a shadow copy, `qemu-img check`, `compare` and snapshots.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bitferry_tests::peer::{Peer, require_all};
use bitferry_tests::random::{Random, seed};
use bitferry_tests::scratch::Scratch;
use bitferry_tests::{image, qemu};
use qcow2_file::edit::{Backing, Editor, EditorOptions, ZeroMode};
use qcow2_file::{Access, GuestOffset, HostFile, Opener, Storage};

/// Not a multiple of any cluster size.
const SIZE: u64 = (12 << 20) + 3 * 512;
const THREADS: u64 = 3;
/// Threads write neighbouring stripes, so that they meet in clusters.
const STRIPE: u64 = 3 * 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Below {
    Nothing,
    Backing,
    ShortBacking,
    RawDataFile,
    DataFile,
}

/// One kind of image.
#[derive(Debug, Clone, Copy)]
struct Kind {
    name: &'static str,
    options: &'static [&'static str],
    below: Below,
    has_snapshots: bool,
    has_compressed: bool,
}

const fn kind(name: &'static str, options: &'static [&'static str]) -> Kind {
    let below = Below::Nothing;
    Kind { name, options, below, has_snapshots: true, has_compressed: true }
}

const KINDS: &[Kind] = &[
    kind("v2", &["compat=0.10"]),
    Kind { below: Below::Backing, ..kind("v2-over", &["compat=0.10"]) },
    kind("v3", &[]),
    Kind { below: Below::Backing, ..kind("over", &[]) },
    Kind { below: Below::ShortBacking, ..kind("over-short", &["cluster_size=4k"]) },
    kind("tiny-clusters", &["cluster_size=512"]),
    kind("small-clusters", &["cluster_size=4k", "refcount_bits=64"]),
    kind("large-clusters", &["cluster_size=2M", "refcount_bits=32"]),
    kind("zstd", &["compression_type=zstd", "refcount_bits=8"]),
    kind("extended", &["extended_l2=on"]),
    Kind { below: Below::Backing, ..kind("extended-over", &["extended_l2=on,cluster_size=128k"]) },
    Kind { has_snapshots: false, has_compressed: false, ..kind("one-bit", &["refcount_bits=1"]) },
    Kind { has_compressed: false, ..kind("two-bits", &["refcount_bits=2,cluster_size=4k"]) },
    Kind {
        has_snapshots: false,
        has_compressed: false,
        ..kind("full", &["preallocation=metadata"])
    },
    Kind { below: Below::RawDataFile, ..kind("raw-data", &[]) },
    Kind { below: Below::DataFile, ..kind("data", &["cluster_size=4k"]) },
    Kind { below: Below::RawDataFile, ..kind("raw-extended", &["extended_l2=on"]) },
];

struct Made {
    scratch: Scratch,
    kind: Kind,
    path: PathBuf,
    data: Option<PathBuf>,
}

fn make(kind: Kind) -> Made {
    let scratch = Scratch::new();
    let mut maker = image::make(&scratch, "image.qcow2", SIZE);
    for option in kind.options {
        maker = maker.option(*option);
    }
    let mut data = None;
    match kind.below {
        Below::Nothing => {}
        Below::Backing | Below::ShortBacking => {
            let size = if kind.below == Below::Backing { SIZE } else { 5 << 20 };
            let size = size.next_multiple_of(65536);
            let backing = image::make(&scratch, "backing.qcow2", size).write(0xbb, 0, size);
            backing.io("write -z 1M 100k").done();
            maker = maker.backing("backing.qcow2", "qcow2");
        }
        Below::RawDataFile | Below::DataFile => {
            let path = scratch.path("data.raw");
            maker = maker.option(format!("data_file={}", path.display()));
            if kind.below == Below::RawDataFile {
                maker = maker.option("data_file_raw=on");
            }
            data = Some(path);
        }
    }
    maker = maker.write(1, 0, 2 << 20).write(2, 5 << 20, 99_840).io("write -z 3M 1M");
    if data.is_none() {
        if kind.has_compressed {
            maker = maker.io("write -c -P 5 6M 2M").io("write -c -P 6 10M 2M");
        }
        if kind.has_snapshots {
            maker = maker.snapshot("s1").write(3, 1 << 20, 1 << 20).snapshot("s2");
            maker = maker.write(4, 6 << 20, 70_144).write(7, 11 << 20, 5120);
        }
    }
    if !kind.name.starts_with("v2") {
        maker = maker.bitmap("b0", 65536).bitmap("b1", 512).disabled_bitmap("b2", 4096);
    }
    let path = maker.done();
    Made { scratch, kind, path, data }
}

fn open_file(path: &Path) -> Arc<dyn Storage> {
    Arc::new(HostFile::open(path, Access::ReadWrite).unwrap())
}

impl Made {
    fn options(&self) -> EditorOptions {
        let backing = matches!(self.kind.below, Below::Backing | Below::ShortBacking);
        EditorOptions {
            data: self.data.as_ref().map(|path| open_file(path)),
            backing: backing.then(|| -> Arc<dyn Backing> {
                Arc::new(Opener::new().open(&self.scratch.path("backing.qcow2")).unwrap())
            }),
            ..EditorOptions::default()
        }
    }

    fn open(&self) -> Editor {
        Editor::open(open_file(&self.path), self.options()).unwrap()
    }

    fn convert(&self, name: &str, options: &[&str]) -> Vec<u8> {
        let out = self.scratch.path(name);
        let run = qemu::qemu_img("convert").args(["-O", "raw"]).args(options);
        run.arg(&self.path).arg(&out).ok();
        std::fs::read(out).unwrap()
    }

    fn snapshots(&self) -> Vec<Vec<u8>> {
        let has = self.kind.has_snapshots && self.data.is_none();
        let names: &[&str] = if has { &["s1", "s2"] } else { &[] };
        let option = |name: &&str| format!("snapshot.name={name}");
        names.iter().map(|n| self.convert("snapshot.raw", &["-l", &option(n)])).collect()
    }

    /// What a discard of the range makes read as zero.
    fn discarded(&self, editor: &Editor, at: u64, end: u64) -> std::ops::Range<usize> {
        let cluster = editor.geometry().cluster_size();
        let keeps = self.kind.name == "v2-over";
        let first = at.next_multiple_of(cluster);
        let last = if end == SIZE { end } else { end - end % cluster };
        if keeps || first >= last { 0..0 } else { first as usize..last as usize }
    }
}

/// What one thread does to its part of the disk.
struct Worker<'a> {
    made: &'a Made,
    editor: &'a Editor,
    shadow: &'a Mutex<Vec<u8>>,
    random: Random,
    number: u64,
}

impl Worker<'_> {
    fn run(&mut self, rounds: u64) {
        for round in 0..rounds {
            let (at, len) = if self.random.one_in(2) { self.in_stripe() } else { self.in_share() };
            match self.random.below(10) {
                0..=4 => self.write(at, len, round),
                5 | 6 => self.zero(at, len),
                7 => self.discard(at, len),
                _ => self.verify(at, len),
            }
            if self.random.one_in(40) {
                self.editor.sync().unwrap();
            }
        }
    }

    /// A small range in the first half, where stripes of all threads alternate.
    fn in_stripe(&mut self) -> (u64, u64) {
        let stripes = SIZE / 2 / STRIPE / THREADS;
        let start = (self.random.below(stripes) * THREADS + self.number) * STRIPE;
        let into = self.random.below(STRIPE);
        let len = 1 + self.random.below(STRIPE - into);
        (start + into, if into.is_multiple_of(3) { STRIPE - into } else { len })
    }

    /// A range of any length in this thread's share of the second half.
    fn in_share(&mut self) -> (u64, u64) {
        let half = (SIZE / 2).next_multiple_of(2 << 20);
        let share = (SIZE - half).div_ceil(THREADS);
        // Discards reach to cluster boundaries only, so shares may share a cluster.
        let (start, end) = (half + share * self.number, SIZE.min(half + share * (self.number + 1)));
        let at = start + self.random.below(end - start);
        let len = match self.random.below(3) {
            0 => 1 + self.random.below(end - at),
            1 => 1 + self.random.below((end - at).min(70_000)),
            _ => end - at,
        };
        match self.random.below(3) {
            0 => (at, len),
            _ => {
                let at = (at & !4095).max(start);
                (at, (len.next_multiple_of(4096)).min(end - at))
            }
        }
    }

    fn write(&mut self, at: u64, len: u64, round: u64) {
        let fill = (round % 250 + 1) as u8;
        let data: Vec<u8> = (0..len).map(|i| fill ^ ((at + i) / 512) as u8).collect();
        self.editor.write_at(&data, GuestOffset(at)).unwrap();
        self.shadow.lock().unwrap()[at as usize..(at + len) as usize].copy_from_slice(&data);
    }

    fn zero(&mut self, at: u64, len: u64) {
        let mode = if self.random.one_in(2) { ZeroMode::Free } else { ZeroMode::Keep };
        self.editor.write_zeroes(GuestOffset(at), len, mode).unwrap();
        self.shadow.lock().unwrap()[at as usize..(at + len) as usize].fill(0);
    }

    fn discard(&mut self, at: u64, len: u64) {
        self.editor.discard(GuestOffset(at), len).unwrap();
        let range = self.made.discarded(self.editor, at, at + len);
        self.shadow.lock().unwrap()[range].fill(0);
    }

    fn verify(&mut self, at: u64, len: u64) {
        let mut buf = vec![0xee; len as usize];
        self.editor.read_at(&mut buf, GuestOffset(at)).unwrap();
        let shadow = self.shadow.lock().unwrap();
        let expected = &shadow[at as usize..(at + len) as usize];
        let first = buf.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!(first.map(|i| at + i as u64), None, "{}", self.made.kind.name);
    }
}

/// Random changes by several threads, then everything that must hold.
fn scramble(kind: Kind, rounds: u64) {
    let made = make(kind);
    let before = made.snapshots();
    let shadow = Mutex::new(made.convert("before.raw", &[]));
    for session in 0..2 {
        let editor = made.open();
        std::thread::scope(|scope| {
            for number in 0..THREADS {
                let purpose = format!("{} {session} {number}", kind.name);
                let random = Random::new(seed(), &purpose);
                let mut worker =
                    Worker { made: &made, editor: &editor, shadow: &shadow, random, number };
                scope.spawn(move || worker.run(rounds));
            }
        });
        Worker {
            made: &made,
            editor: &editor,
            shadow: &shadow,
            random: Random::new(0, ""),
            number: 0,
        }
        .verify(0, SIZE);
        editor.close().unwrap();
        qemu::check_is_clean(&made.path);
    }
    let raw = made.scratch.path("shadow.raw");
    std::fs::write(&raw, &*shadow.lock().unwrap()).unwrap();
    qemu::same_content((&made.path, "qcow2"), (&raw, "raw"));
    assert!(made.snapshots() == before, "{}: a snapshot changed", kind.name);
    if kind.below == Below::RawDataFile {
        let data = std::fs::read(made.data.as_ref().unwrap()).unwrap();
        let shadow = shadow.lock().unwrap();
        let differs = data.iter().zip(shadow.iter()).position(|(a, b)| a != b);
        // QEMU made it a whole number of units long.
        assert_eq!(differs, None, "{}", kind.name);
        assert!((shadow.len()..shadow.len() + 65536).contains(&data.len()), "{}", data.len());
    }
}

#[test]
fn random_changes_by_several_threads() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    for kind in KINDS {
        scramble(*kind, 60);
    }
}
