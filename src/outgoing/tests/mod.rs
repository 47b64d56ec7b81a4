//! A source and a destination in one process, over socket pairs that can be cut.

mod bitmap_lies;
mod cuts;
mod guest;
mod lies;
mod net;
mod pause;
mod whole;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use bitmap_mig::{Bitmap, SaveBitmap, SaveBitmaps};
use block_mig::{Landing, SaveBlocks, SaveDisk, SaveOptions, Unwatched};
use format_spec::content_hash::{LEDGER_HEIGHT, subtree};
use format_spec::native::answer::{Published, PublishedBitmap};
use format_spec::native::block::DiskId;
use format_spec::native::hello::SessionState;
use mig_core::block::{BlockSink, BlockSource, Extent, ExtentKind, is_zero};
use mig_core::section::{Fate, Have, Registry, SaveHandler};
use mig_core::stream::{self, Compression};
use mig_core::transport::{Connection, Dial, Listen, Nature};
use qcow2_file::bitmaps::Bits;

use self::net::{Fault, Net};
use super::*;
use crate::DiskProof;
use crate::incoming::{Destination, IncomingOptions, Place, Received, Sealed, Wanted, receive};

const SESSION: SessionId = [7; 16];
const UNIT: u64 = 1 << 20;

/// Bytes in memory as a disk: both ends.
#[derive(Default)]
struct MemoryDisk(Mutex<Vec<u8>>);

impl MemoryDisk {
    fn new(bytes: Vec<u8>) -> Self {
        Self(Mutex::new(bytes))
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }

    fn with<T>(&self, offset: u64, len: usize, look: impl FnOnce(&mut [u8]) -> T) -> T {
        let start = usize::try_from(offset).unwrap();
        look(&mut self.0.lock().unwrap()[start..start + len])
    }

    fn hash(&self) -> format_spec::content_hash::ContentHash {
        block_mig::content_hash(self, 1, &Unwatched).unwrap()
    }
}

impl BlockSource for MemoryDisk {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn extent(&self, offset: u64, max_len: u64) -> mig_core::Result<Extent> {
        let len = max_len.min(4096 - offset % 4096);
        let zero = self.with(offset, usize::try_from(len).unwrap(), |bytes| is_zero(bytes));
        let kind = if zero { ExtentKind::Hole } else { ExtentKind::Data };
        Ok(Extent { len, kind, host: None })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> mig_core::Result<()> {
        self.with(offset, buf.len(), |bytes| buf.copy_from_slice(bytes));
        Ok(())
    }
}

impl BlockSink for MemoryDisk {
    fn size(&self) -> u64 {
        BlockSource::size(self)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> mig_core::Result<()> {
        self.with(offset, buf.len(), |bytes| bytes.copy_from_slice(buf));
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> mig_core::Result<()> {
        self.with(offset, usize::try_from(len).unwrap(), |bytes| bytes.fill(0));
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> mig_core::Result<()> {
        Ok(())
    }

    fn reads_as_zero(&self, _offset: u64, _len: u64) -> bool {
        false
    }

    fn allocation_unit(&self) -> u64 {
        4096
    }

    fn flush(&self) -> mig_core::Result<()> {
        Ok(())
    }

    fn sync(&self) -> mig_core::Result<()> {
        Ok(())
    }
}

/// A destination in memory that survives its attempts, as files with journals would.
#[derive(Default)]
struct Shelf(Mutex<ShelfState>);

#[derive(Default)]
struct ShelfState {
    places: BTreeMap<String, Arc<ShelfPlace>>,
    is_committed: bool,
    /// How often something was published.
    commits: usize,
    /// Storage that returns other bytes than were written.
    is_rotten: bool,
    /// Bitmaps of attempts that failed.
    kept: Arc<crate::incoming::KeptSession>,
}

#[derive(Default)]
struct ShelfPlace {
    disk: MemoryDisk,
    /// Which units arrived.
    arrived: Mutex<Vec<bool>>,
    prepared: Mutex<Option<DiskProof>>,
    bitmaps: Mutex<Vec<Bitmap>>,
    is_rotten: bool,
}

impl Destination for Shelf {
    fn begin(&self, session: SessionId) -> stream::Result<SessionState> {
        assert_eq!(session, SESSION);
        let state = self.0.lock().unwrap();
        let is_prepared = |p: &Arc<ShelfPlace>| p.prepared.lock().unwrap().is_some();
        Ok(match &*state {
            s if s.is_committed => SessionState::Committed,
            s if s.places.is_empty() => SessionState::Fresh,
            s if s.places.values().all(is_prepared) => SessionState::Ready,
            _ => SessionState::Resumable,
        })
    }

    fn published(&self) -> stream::Result<Vec<Published>> {
        let state = self.0.lock().unwrap();
        Ok(state.places.iter().map(|(name, place)| place.published(name)).collect())
    }

    fn place(&self, wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        if wanted.name == "nowhere" {
            return Err(crate::Error::Usage { reason: "no such place".into() }.into());
        }
        let mut state = self.0.lock().unwrap();
        let is_rotten = state.is_rotten;
        let units = usize::try_from(wanted.size.div_ceil(UNIT)).unwrap();
        let fresh = || {
            Arc::new(ShelfPlace {
                disk: MemoryDisk::new(vec![0xee; usize::try_from(wanted.size).unwrap()]),
                arrived: Mutex::new(vec![false; units]),
                is_rotten,
                ..ShelfPlace::default()
            })
        };
        Ok(state.places.entry(wanted.name.to_owned()).or_insert_with(fresh).clone())
    }

    fn commit(&self) -> stream::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.is_committed = true;
        state.commits += 1;
        Ok(())
    }

    fn abort(&self, fate: Fate) {
        if fate == Fate::Dropped {
            self.0.lock().unwrap().places.clear();
        }
    }
}

impl ShelfPlace {
    fn published(&self, disk: &str) -> Published {
        let bitmap = |b: &Bitmap| PublishedBitmap {
            name: b.name.clone(),
            sent_as: b.name.clone(),
            digest: b.digest().unwrap(),
        };
        Published {
            name: disk.to_owned(),
            size: BlockSource::size(&self.disk),
            content: Some(self.disk.hash()),
            is_unchanged: true,
            is_bitmaps_alone: false,
            bitmaps: self.bitmaps.lock().unwrap().iter().map(bitmap).collect(),
        }
    }

    fn unit(&self, unit: u64) -> Vec<u8> {
        let start = unit * UNIT;
        let len = UNIT.min(BlockSource::size(&self.disk) - start);
        self.disk.with(start, usize::try_from(len).unwrap(), |bytes| bytes.to_vec())
    }
}

impl Landing for ShelfPlace {
    fn sink(&self) -> &dyn BlockSink {
        &self.disk
    }

    fn have(&self, tell: &mut dyn FnMut(Have) -> stream::Result<()>) -> stream::Result<()> {
        let arrived = self.arrived.lock().unwrap().clone();
        for (unit, _) in (0..).zip(arrived).filter(|(_, is_there)| *is_there) {
            let bytes = self.unit(unit);
            tell(match is_zero(&bytes) {
                true => Have::Zeroes(unit, 1),
                false => Have::Units(unit, vec![subtree(LEDGER_HEIGHT, &bytes, &is_zero)]),
            })?;
        }
        Ok(())
    }

    fn wants_nodes(&self) -> bool {
        true
    }

    fn arrived(
        &self,
        range: std::ops::Range<u64>,
        first: u64,
        nodes: &[format_spec::content_hash::Node],
    ) -> stream::Result<()> {
        let mut arrived = self.arrived.lock().unwrap();
        for (unit, node) in (first..).zip(nodes) {
            assert_eq!(*node, subtree(LEDGER_HEIGHT, &self.unit(unit), &is_zero), "{range:?}");
            arrived[usize::try_from(unit).unwrap()] = true;
        }
        Ok(())
    }

    fn arrived_zeroes(&self, range: std::ops::Range<u64>) -> stream::Result<()> {
        let mut arrived = self.arrived.lock().unwrap();
        let end = if range.end == BlockSource::size(&self.disk) {
            range.end.div_ceil(UNIT)
        } else {
            range.end / UNIT
        };
        (range.start.div_ceil(UNIT)..end)
            .for_each(|unit| arrived[usize::try_from(unit).unwrap()] = true);
        Ok(())
    }
}

impl Place for ShelfPlace {
    fn prepare(&self, sealed: &Sealed) -> stream::Result<Option<DiskProof>> {
        if self.is_rotten {
            self.disk.with(0, 1, |bytes| bytes[0] ^= 1);
        }
        let digests = sealed.bitmaps.iter().map(|b| b.digest().unwrap()).collect();
        let proof = DiskProof { content: Some(self.disk.hash()), bitmaps: digests };
        if let Some(prepared) = &*self.prepared.lock().unwrap() {
            assert_eq!(*prepared, proof);
        }
        if sealed.content.is_some_and(|said| Some(said) != proof.content) {
            return Ok(Some(proof));
        }
        *self.bitmaps.lock().unwrap() = sealed.bitmaps.clone();
        *self.prepared.lock().unwrap() = Some(proof.clone());
        Ok(sealed.content.map(|_| proof))
    }
}

/// What is sent.
struct Cargo {
    disks: Vec<(String, MemoryDisk)>,
    bitmaps: Vec<(usize, Bitmap)>,
}

fn pattern(size: usize, runs: &[(usize, usize, u8)]) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for (at, len, seed) in runs {
        for (i, byte) in bytes[*at..at + len].iter_mut().enumerate() {
            *byte = u8::try_from((i * 7 + usize::from(*seed)) % 251).unwrap() | 1;
        }
    }
    bytes
}

impl Cargo {
    /// Two small disks, one with something at its start, in its middle and in its last sector, and
    /// one without any byte.
    fn small() -> Self {
        let size = (3 << 20) + 512;
        let runs = [(0, 4096, 1), (1_500_000, 100_000, 2), (size - 512, 512, 3)];
        let disk = MemoryDisk::new(pattern(size, &runs));
        let mut fine = Bits::for_disk(size as u64, 9);
        fine.set_range(0..1);
        fine.set_range(5000..5193);
        let named = |name: &str, granularity_bits, bits| Bitmap {
            name: name.to_owned(),
            granularity_bits,
            is_enabled: name != "stopped",
            bits,
        };
        let empty = |bits| Bits::for_disk(size as u64, bits);
        let bitmaps = vec![
            (0, named("fine", 9, fine)),
            (0, named("empty", 16, empty(16))),
            (1, named("fine", 16, Bits::for_disk(0, 16))),
            (0, named("stopped", 31, empty(31))),
        ];
        let disks = vec![("vda".to_owned(), disk), ("vdb".to_owned(), MemoryDisk::default())];
        Self { disks, bitmaps }
    }

    fn handlers(&self, hashes: bool) -> Vec<Box<dyn SaveHandler + '_>> {
        let disks = (0..).zip(&self.disks).map(|(id, (name, disk))| SaveDisk {
            id: DiskId(id),
            name: name.clone(),
            source: disk,
            dirty: None,
        });
        let options = SaveOptions { hashes, workers: 2, monitor: &Unwatched };
        let blocks = SaveBlocks::new(disks.collect(), options).unwrap();
        let saved = self.bitmaps.iter().map(|(at, bitmap)| SaveBitmap {
            disk: DiskId(u32::try_from(*at).unwrap()),
            disk_size: BlockSource::size(&self.disks[*at].1),
            bitmap,
        });
        let bitmaps = SaveBitmaps::new(saved.collect(), hashes).unwrap();
        vec![Box::new(blocks), Box::new(bitmaps)]
    }

    /// All that is known of it.
    fn expected(&self) -> Vec<ExpectedDisk> {
        let of = |(at, (name, disk)): (usize, &(String, MemoryDisk))| {
            let mine = self.bitmaps.iter().filter(|(of, _)| *of == at);
            ExpectedDisk {
                name: name.clone(),
                size: BlockSource::size(disk),
                content: Some(disk.hash()),
                bitmaps: Some(mine.map(|(_, b)| (b.name.clone(), b.digest().unwrap())).collect()),
            }
        };
        self.disks.iter().enumerate().map(of).collect()
    }

    /// Whether a shelf holds just this.
    fn is_on(&self, shelf: &Shelf) -> bool {
        let state = shelf.0.lock().unwrap();
        let holds = |(at, (name, disk)): (usize, &(String, MemoryDisk))| {
            let Some(place) = state.places.get(name) else { return false };
            let mine = self.bitmaps.iter().filter(|(of, _)| *of == at).map(|(_, b)| b);
            place.disk.bytes() == disk.bytes() && mine.eq(place.bitmaps.lock().unwrap().iter())
        };
        state.is_committed && self.disks.iter().enumerate().all(holds)
    }
}

/// How a test sends.
#[derive(Clone, Copy)]
struct Way {
    channels: u16,
    compression: Option<Compression>,
    hashes: bool,
    resumes: bool,
}

const PLAIN: Way = Way { channels: 1, compression: None, hashes: true, resumes: true };

fn timing() -> Timing {
    let quick = Duration::from_millis(20);
    let patient = Duration::from_secs(10);
    Timing { keepalive: quick, hello: patient, join: patient, linger: patient }
}

/// One attempt.
fn attempt(
    cargo: &Cargo,
    shelf: &Arc<Shelf>,
    net: &Net,
    way: Way,
) -> (Result<Sent>, Result<Received>) {
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let main = net.accept(None).map_err(Error::Connect)?;
            let kept = shelf.0.lock().unwrap().kept.clone();
            let options =
                IncomingOptions { timing: timing(), kept, ..IncomingOptions::new(&Unwatched) };
            receive(main, net, shelf.clone(), Registry::new(), &options)
        });
        let options = OutgoingOptions {
            channels: way.channels,
            compression: way.compression,
            resumes: way.resumes,
            timing: timing(),
            expected: cargo.expected(),
            ..OutgoingOptions::new(SESSION, &Unwatched)
        };
        let handlers = cargo.handlers(way.hashes);
        let sent = send(net, handlers, &mut (), &mut AtRest, &options);
        net.close();
        (sent, destination.join().unwrap())
    })
}
