//! What many bitmaps add to the pause of a live migration: 64 of a disk of 16 TiB at 64 KiB, mostly
//! empty, against none. The disk reads as zero, whatever is written, so that bitmaps are all there
//! is to be sent; both sides run in this process.
//!
//! Measured is the time from the call that pauses the guest until the destination has held every
//! bitmap in its memory against its seal. `cargo run --release --example many_bitmaps [DIR]`; with
//! a directory the whole pause is measured too, where the bitmaps go into a new image there. With
//! TRACE in the environment it says what the pause consists of.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bitferry::berth::{DiskPlace, FileOptions, Files};
use bitferry::copy::{Format, TargetOptions};
use bitferry::incoming::{self, Destination, IncomingOptions, Place, Sealed, SessionId, Wanted};
use bitferry::live::Outgoing;
use bitferry::{DiskProof, Renames};
use bitmap_mig::LiveBitmaps;
use block_mig::{Landing, TrackedDisk, Unwatched};
use format_spec::native::block::PIECE_BYTES;
use format_spec::native::hello::SessionState;
use mig_core::Result;
use mig_core::bitmap::BitmapInfo;
use mig_core::block::{BlockSink, BlockSource, Extent, ExtentKind};
use mig_core::guest::{Guest, GuestError};
use mig_core::section::{Fate, Registry};
use mig_core::stream;
use mig_core::transport::{Connection, Listen as _, Single};

const SIZE: u64 = 16 << 40;
const BITMAPS: usize = 64;
const PAIRS: usize = 11;

/// Zeroes.
struct Void;

impl BlockSource for Void {
    fn size(&self) -> u64 {
        SIZE
    }

    fn extent(&self, _offset: u64, max_len: u64) -> Result<Extent> {
        Ok(Extent { len: max_len, kind: ExtentKind::Hole, host: None })
    }

    fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        buf.fill(0);
        Ok(())
    }
}

impl BlockSink for Void {
    fn size(&self) -> u64 {
        SIZE
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn reads_as_zero(&self, _offset: u64, _len: u64) -> bool {
        true
    }

    fn allocation_unit(&self) -> u64 {
        65536
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

/// A destination that notes when everything was sealed, and believes it.
#[derive(Default)]
struct Other {
    sealed: Mutex<Option<Instant>>,
    bits: Mutex<u64>,
}

impl Landing for Other {
    fn sink(&self) -> &dyn BlockSink {
        &Void
    }
}

impl Place for Other {
    fn prepare(&self, sealed: &Sealed) -> stream::Result<Option<DiskProof>> {
        *self.sealed.lock().unwrap() = Some(Instant::now());
        let mut bitmaps = Vec::new();
        for bitmap in &sealed.bitmaps {
            *self.bits.lock().unwrap() += bitmap.bits.count();
            bitmaps.push(bitmap.digest().map_err(bitferry::Error::from)?);
        }
        Ok(sealed.content.map(|content| DiskProof { content: Some(content), bitmaps }))
    }
}

struct Places(Arc<Other>);

const IMAGE: &str = "many_bitmaps.qcow2";

/// A destination that makes an image.
fn image(dir: &Path) -> Files {
    let place = DiskPlace {
        name: "vda".to_owned(),
        path: dir.join(IMAGE),
        format: Format::Qcow2,
        target: TargetOptions::default(),
        base: None,
        renames: Renames::default(),
    };
    Files::new(vec![place], FileOptions { keeps_nothing: true, ..FileOptions::default() })
}

impl Destination for Places {
    fn begin(&self, _session: SessionId) -> stream::Result<SessionState> {
        Ok(SessionState::Fresh)
    }

    fn place(&self, _wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        Ok(self.0.clone())
    }

    fn commit(&self) -> stream::Result<()> {
        Ok(())
    }

    fn abort(&self, _fate: Fate) {}
}

/// A guest that writes a sector now and then, here and there.
struct Writer<'a> {
    disk: &'a TrackedDisk<Void>,
    is_stopped: &'a AtomicBool,
    paused: Option<Instant>,
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 16
}

/// A sector in one of twenty parts of the disk, of 64 GiB each.
fn place(state: &mut u64) -> u64 {
    random(state) % 20 * (SIZE / 20) / 512 * 512 + random(state) % (64 << 30) / 512 * 512
}

fn write(disk: &TrackedDisk<Void>, is_stopped: &AtomicBool) {
    let mut state = 7;
    while !is_stopped.load(Ordering::Acquire) {
        if disk.write(&[1; 512], place(&mut state)).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

impl Guest for Writer<'_> {
    fn pause(&mut self) -> std::result::Result<(), GuestError> {
        // So that the final pass has something to send of every bitmap.
        self.disk.write(&[1; 512], SIZE / 2).unwrap();
        self.paused = Some(Instant::now());
        self.is_stopped.store(true, Ordering::Release);
        Ok(())
    }

    fn resume(&mut self) -> std::result::Result<(), GuestError> {
        unreachable!("it does not fail")
    }
}

/// What one migration took.
struct Taken {
    /// From the pause to the last seal.
    sealed: Duration,
    /// The whole pause. Most of it is this destination's, which hashes all bits once more.
    downtime: Duration,
    /// Bytes that were sent.
    wire: u64,
    /// Bytes of pieces with bits in them.
    pieces: u64,
}

/// The bitmaps stay in memory, or go into a qcow2 image in `dir`.
fn migrate(count: usize, dir: Option<&Path>) -> Taken {
    let bitmaps = Arc::new(LiveBitmaps::new(SIZE));
    let disk = Arc::new(TrackedDisk::new(Void, bitmaps.clone()));
    for n in 0..count {
        let info = BitmapInfo {
            name: format!("backup-{n}"),
            granularity: 65536,
            is_enabled: true,
            is_persistent: true,
            is_inconsistent: false,
        };
        bitmaps.add(&info).unwrap();
    }
    let mut state = 99;
    for _ in 0..500 {
        disk.write(&[1; 512], place(&mut state)).unwrap();
    }
    let other = Arc::new(Other::default());
    let (here, there) = UnixStream::pair().unwrap();
    let is_stopped = AtomicBool::new(false);
    let (paused, downtime, wire) = std::thread::scope(|scope| {
        scope.spawn(|| write(&disk, &is_stopped));
        let places: Arc<dyn Destination> = match dir {
            None => Arc::new(Places(other.clone())),
            Some(dir) => Arc::new(image(dir)),
        };
        scope.spawn(move || {
            let single = Single::new(Connection::from_unix(there, "source").unwrap());
            let main = single.accept(None).unwrap();
            let options = IncomingOptions::new(&Unwatched);
            incoming::receive(main, &single, places, Registry::new(), &options).unwrap();
        });
        let dial = Single::new(Connection::from_unix(here, "destination").unwrap());
        let mut guest = Writer { disk: &disk, is_stopped: &is_stopped, paused: None };
        let outgoing = Outgoing::builder().disk("vda", disk.clone(), bitmaps.clone());
        let report = outgoing.build().unwrap().run(&dial, &mut guest).unwrap();
        (guest.paused.unwrap(), report.downtime, report.sent.wire_bytes)
    });
    if let Some(dir) = dir {
        std::fs::remove_file(dir.join(IMAGE)).unwrap();
        return Taken { sealed: downtime, downtime, wire, pieces: 0 };
    }
    let (mut here, mut pieces) = (0, 0);
    for bitmap in bitmaps.all() {
        let bits = bitmaps.snapshot(&bitmap.name).unwrap();
        here += bits.count();
        pieces += (bits.blocks(PIECE_BYTES as u64 * 8).count() * PIECE_BYTES) as u64;
    }
    assert_eq!(here, *other.bits.lock().unwrap());
    let sealed = other.sealed.lock().unwrap().unwrap().duration_since(paused);
    Taken { sealed, downtime, wire, pieces }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn main() {
    let (mut added, mut with, mut without) = (Vec::new(), Vec::new(), Vec::new());
    if std::env::var_os("TRACE").is_some() {
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).init();
    }
    migrate(BITMAPS, None);
    for _ in 0..PAIRS {
        let none = migrate(0, None).sealed;
        let Taken { sealed, downtime, wire, pieces } = migrate(BITMAPS, None);
        println!(
            "none: {none:?}; {BITMAPS}: {sealed:?}, pause {downtime:?}, wire {wire} bytes, \
             {pieces} of pieces with bits"
        );
        added.push(sealed.saturating_sub(none));
        with.push(sealed);
        without.push(none);
    }
    println!("pause until sealed, median of {PAIRS}: {:?} without bitmaps", median(without));
    println!("with {BITMAPS} of {SIZE} bytes at 65536: {:?}", median(with));
    println!("added, median of pairs: {:?}", median(added));
    println!("{}", peak());
    if let Some(dir) = std::env::args_os().nth(1) {
        let pause = |count| {
            let pauses = (0..PAIRS / 2).map(|_| migrate(count, Some(Path::new(&dir))).downtime);
            median(pauses.collect())
        };
        println!("whole pause into qcow2: {:?}, {:?} without bitmaps", pause(BITMAPS), pause(0));
    }
}

/// The most memory that this process had at a time, both sides with all bits of source and
/// destination.
fn peak() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("no VmHWM").to_owned()
}
