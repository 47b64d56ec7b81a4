//! A program that embeds the library as a VMM would: a disk of its own, bitmaps that backup jobs
//! use, a device whose state it sends itself, and a guest that writes until the destination has it.
//!
//! Both sides run in this process, at the ends of a socket pair: `cargo run --example embed`.
// An example may end where a product would not.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::time::Duration;

use bitferry::DiskProof;
use bitferry::incoming::{self, Destination, IncomingOptions, Place, Sealed, SessionId, Wanted};
use bitferry::live::Outgoing;
use bitmap_mig::LiveBitmaps;
use block_mig::{Landing, TrackedDisk, Unwatched, content_hash};
use format_spec::native::answer::Ready;
use format_spec::native::frame;
use format_spec::native::hello::SessionState;
use mig_core::bitmap::BitmapInfo;
use mig_core::block::{BlockSink, BlockSource, Extent, ExtentKind};
use mig_core::channels::Outlet;
use mig_core::guest::{Guest, GuestError};
use mig_core::section::{
    Fate, LoadContext, LoadHandler, Pass, Pending, Registry, SaveHandler, SectionKey, Stage,
};
use mig_core::stream::{self, Arrival};
use mig_core::transport::{Connection, Single};

const DISK_BYTES: usize = 64 << 20;

/// The disk of this VMM: bytes in memory.
struct Ram(RwLock<Vec<u8>>);

impl Ram {
    fn new() -> Self {
        Self(RwLock::new(vec![0; DISK_BYTES]))
    }
}

impl BlockSource for Ram {
    fn size(&self) -> u64 {
        DISK_BYTES as u64
    }

    fn extent(&self, _offset: u64, max_len: u64) -> mig_core::Result<Extent> {
        Ok(Extent { len: max_len, kind: ExtentKind::Data, host: None })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> mig_core::Result<()> {
        let at = offset as usize;
        buf.copy_from_slice(&self.0.read().unwrap()[at..at + buf.len()]);
        Ok(())
    }
}

impl BlockSink for Ram {
    fn size(&self) -> u64 {
        DISK_BYTES as u64
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> mig_core::Result<()> {
        let at = offset as usize;
        self.0.write().unwrap()[at..at + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> mig_core::Result<()> {
        self.0.write().unwrap()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> mig_core::Result<()> {
        Ok(())
    }

    fn reads_as_zero(&self, _offset: u64, _len: u64) -> bool {
        false
    }

    fn allocation_unit(&self) -> u64 {
        512
    }

    fn flush(&self) -> mig_core::Result<()> {
        Ok(())
    }

    fn sync(&self) -> mig_core::Result<()> {
        Ok(())
    }
}

/// A device of this VMM: one register, which counts the guest's writes.
type Register = Arc<AtomicU64>;

const DEVICE: SectionKey = SectionKey { name: "my-device", instance: 0, version: 1 };
/// The device's only record: the register, big-endian.
const REGISTER: u16 = 1;

struct SaveDevice(Register);

impl SaveHandler for SaveDevice {
    fn section(&self) -> SectionKey {
        DEVICE
    }

    fn setup(&mut self, _out: &Outlet<'_>) -> stream::Result<()> {
        Ok(())
    }

    fn iterate(&mut self, _out: &Outlet<'_>, _budget: u64) -> stream::Result<Pass> {
        Ok(Pass::Done)
    }

    fn pending(&self) -> Pending {
        Pending { must_precopy: 8, ..Pending::default() }
    }

    fn complete(&mut self, stage: Stage, out: &Outlet<'_>) -> stream::Result<()> {
        if stage == Stage::Seal {
            return Ok(());
        }
        let register = self.0.load(Ordering::Acquire).to_be_bytes();
        out.record(|bytes| frame::encode(REGISTER, &[&register], bytes))
    }

    fn expect(&self, _ready: &mut Ready) {}
}

struct LoadDevice(Register);

impl LoadHandler for LoadDevice {
    fn load(&self, arrival: Arrival, _context: LoadContext<'_>) -> stream::Result<()> {
        let record = arrival.record();
        if record.header.is_end() {
            return Ok(());
        }
        match (record.header.kind, <[u8; 8]>::try_from(record.body)) {
            (REGISTER, Ok(bytes)) => self.0.store(u64::from_be_bytes(bytes), Ordering::Release),
            _ => return Err(arrival.protocol("the device has one record of eight bytes")),
        }
        Ok(())
    }

    fn barrier(&self, _is_durable: bool) -> stream::Result<()> {
        Ok(())
    }

    fn prepare(&self, _proves_all: bool, _ready: &mut Ready) -> stream::Result<()> {
        Ok(())
    }

    fn commit(&self) -> stream::Result<()> {
        Ok(())
    }

    fn abort(&self, _fate: Fate) {}
}

/// The other VMM: one disk, for which there is a place already, and its bitmaps.
struct OtherVmm {
    disk: Ram,
    bitmaps: LiveBitmaps,
}

impl Landing for OtherVmm {
    fn sink(&self) -> &dyn BlockSink {
        &self.disk
    }
}

impl Place for OtherVmm {
    fn prepare(&self, sealed: &Sealed) -> stream::Result<Option<DiskProof>> {
        let content = content_hash(&self.disk, 1, &Unwatched)?;
        let mut bitmaps = Vec::new();
        for bitmap in &sealed.bitmaps {
            let failed = |error| stream::Error::handler(bitferry::Blame::Caller, error);
            self.bitmaps.add_loaded(bitmap).map_err(failed)?;
            bitmaps.push(bitmap.digest().map_err(bitferry::Error::from)?);
        }
        Ok(Some(DiskProof { content: Some(content), bitmaps }))
    }
}

/// What there is at the destination, by the names on the wire.
struct Places(Arc<OtherVmm>);

impl Destination for Places {
    fn begin(&self, _session: SessionId) -> stream::Result<SessionState> {
        Ok(SessionState::Fresh)
    }

    fn place(&self, wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        match wanted.name {
            "vda" => Ok(self.0.clone()),
            other => {
                let reason = format!("this VMM has no disk {other:?}");
                Err(stream::Error::handler(bitferry::Blame::Caller, reason))
            }
        }
    }

    fn commit(&self) -> stream::Result<()> {
        Ok(())
    }

    fn abort(&self, _fate: Fate) {}
}

/// What the guest's processor does.
#[derive(PartialEq)]
enum Power {
    On,
    Paused,
    Off,
}

/// The guest: a processor that writes all over its disk.
struct Processor {
    power: Mutex<Power>,
    changed: Condvar,
}

impl Processor {
    fn run(&self, disk: &TrackedDisk<Ram>, register: &Register) {
        for n in 1u64.. {
            let power = self.power.lock().unwrap();
            let power = self.changed.wait_while(power, |p| *p == Power::Paused).unwrap();
            if *power == Power::Off {
                return;
            }
            let at = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (DISK_BYTES as u64 / 4096) * 4096;
            disk.write(&n.to_le_bytes().repeat(512), at).unwrap();
            register.store(n, Ordering::Release);
            drop(power);
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn switch(&self, to: Power) {
        *self.power.lock().unwrap() = to;
        self.changed.notify_all();
    }
}

impl Guest for &Processor {
    fn pause(&mut self) -> Result<(), GuestError> {
        self.switch(Power::Paused);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.switch(Power::On);
        Ok(())
    }
}

/// The other VMM's side of the move.
fn receive(line: UnixStream, other: Arc<OtherVmm>, register: Register) -> incoming::Received {
    let connection = Connection::from_unix(line, "the first VMM").unwrap();
    let single = Single::new(connection);
    let main = mig_core::transport::Listen::accept(&single, None).unwrap();
    let mut devices = Registry::new();
    devices.add(DEVICE, Arc::new(LoadDevice(register)));
    let options = IncomingOptions::new(&Unwatched);
    incoming::receive(main, &single, Arc::new(Places(other)), devices, &options).unwrap()
}

fn main() {
    let bitmaps = Arc::new(LiveBitmaps::new(DISK_BYTES as u64));
    let disk = Arc::new(TrackedDisk::new(Ram::new(), bitmaps.clone()));
    let nightly = BitmapInfo {
        name: "nightly".to_owned(),
        granularity: 65536,
        is_enabled: true,
        is_persistent: true,
        is_inconsistent: false,
    };
    bitmaps.add(&nightly).unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    let size = DISK_BYTES as u64;
    let other = Arc::new(OtherVmm { disk: Ram::new(), bitmaps: LiveBitmaps::new(size) });
    let (register, moved) = (Register::default(), Register::default());

    let processor = Processor { power: Mutex::new(Power::On), changed: Condvar::new() };

    let report = std::thread::scope(|scope| {
        scope.spawn(|| processor.run(&disk, &register));
        let receiving = scope.spawn(|| receive(there, other.clone(), moved.clone()));
        let dial = Single::new(Connection::from_unix(here, "the second VMM").unwrap());
        let report = Outgoing::builder()
            .disk("vda", disk.clone(), bitmaps.clone())
            .state(|| Box::new(SaveDevice(register.clone())))
            .build()
            .and_then(|outgoing| outgoing.run(&dial, &mut &processor))
            .unwrap();
        processor.switch(Power::Off);
        receiving.join().unwrap();
        report
    });

    let (here, there) =
        (bitmaps.count("nightly").unwrap(), other.bitmaps.count("nightly").unwrap());
    println!("{:?} after {} rounds", report.sent.outcome, report.passes);
    println!("the guest was paused for {:?}", report.downtime);
    println!(
        "writes: {} counted here, {} there",
        register.load(Ordering::Acquire),
        moved.load(Ordering::Acquire)
    );
    println!("bitmap nightly: {here} granules here, {there} there");
    assert_eq!(*disk.inner().0.read().unwrap(), *other.disk.0.read().unwrap());
    assert_eq!(here, there);
    assert_eq!(register.load(Ordering::Acquire), moved.load(Ordering::Acquire));
}
