//! Bitmaps on their way in, in the section of their disks (SPEC 6). They are held in memory until
//! their disk is complete.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use format_spec::content_hash::{BitmapDigest, HashError, Node};
use format_spec::native::block::{
    BitmapCreate, BitmapSeal, BitmapShape, BitmapUpdate, BitmapVersion, DiskId, PIECE_BYTES, Piece,
    Run,
};
use mig_core::block::is_zero;
use mig_core::stream::{Arrival, Error, Result};
use qcow2_file::bitmaps::Bits;
use qcow2_file::limits::MAX_BITMAP_BYTES;

use crate::Bitmap;
use crate::running_digest::RunningDigest;

/// Most bitmaps in one session: so many fit the record that says how they read back.
pub const MAX_BITMAPS: usize = 50_000;
/// Most memory that the bits of one session's bitmaps take: that of 64 bitmaps of a 16 TiB disk at
/// 64 KiB that have bits everywhere.
const MAX_HELD_BYTES: u64 = 2 << 30;
/// Most bytes that the bitmaps of one session would have if all their bits were set: 256 bitmaps
/// of a 16 TiB disk at 64 KiB. What finds those that are takes a fraction of a thousandth of it.
const MAX_SHAPE_BYTES: u64 = 8 << 30;

/// A bitmap that arrived whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArrivedBitmap {
    /// Its number and generation.
    pub version: BitmapVersion,
    /// What the source says that it hashes to, equal to what arrived.
    pub digest: Option<BitmapDigest>,
    /// It.
    pub bitmap: Bitmap,
}

/// What an attempt that failed leaves of its bitmaps, for the next one of the same session.
#[derive(Debug, Default)]
pub struct KeptBitmaps(BTreeMap<(DiskId, String), Kept>);

/// The bits of one.
#[derive(Debug)]
struct Kept {
    shape: BitmapShape,
    bits: Bits,
    digest: RunningDigest,
}

/// Receives bitmaps.
#[derive(Debug, Default)]
pub struct LoadBitmaps(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By number. A removed one stays, to know its generation.
    bitmaps: BTreeMap<u32, Arriving>,
    /// Of those that are here.
    names: BTreeSet<(DiskId, String)>,
    /// Of an earlier attempt, and not created again so far.
    kept: BTreeMap<(DiskId, String), Kept>,
    /// By shape.
    bytes: u64,
    held: u64,
    /// Of bitmaps that were taken. To give their memory back takes longer than all else that a
    /// paused guest waits for here.
    done_with: Vec<RunningDigest>,
}

#[derive(Debug)]
struct Arriving {
    disk: DiskId,
    /// What it is called in messages, with its disk.
    label: String,
    generation: u32,
    /// `None` once it was removed.
    bitmap: Option<Held>,
    shape: BitmapShape,
    seal: Option<Option<BitmapDigest>>,
}

/// A bitmap in memory, as whoever stores it takes it: a guest may be paused then.
#[derive(Debug)]
struct Held {
    name: String,
    granularity_bits: u8,
    is_enabled: bool,
    bits: Bits,
    digest: RunningDigest,
}

impl Held {
    fn hash(&mut self) -> Result<()> {
        let bits = &self.bits;
        self.digest.hash(|offset, bytes| bits.read_bytes(offset, bytes)).map_err(unhashable)
    }

    fn put(&mut self, index: u64, new: &[u8]) {
        let offset = index.saturating_mul(PIECE_BYTES as u64);
        let mut old = [0; PIECE_BYTES];
        self.bits.read_bytes(offset, &mut old);
        // Zeroes over zeroes are nothing to be hashed.
        if !(is_zero(new) && is_zero(&old)) {
            self.bits.write_bytes(offset, new);
            self.digest.touch(index);
        }
    }

    fn into_parts(self) -> (Bitmap, RunningDigest) {
        let Self { name, granularity_bits, is_enabled, bits, digest } = self;
        (Bitmap { name, granularity_bits, is_enabled, bits }, digest)
    }
}

impl LoadBitmaps {
    /// No bitmap yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// No bitmap yet; those that are created again begin as they were kept.
    pub fn resumed(kept: KeptBitmaps) -> Self {
        Self(Mutex::new(State { kept: kept.0, ..State::default() }))
    }

    /// Takes what has arrived, for the next attempt.
    pub fn keep(&self) -> KeptBitmaps {
        let mut state = self.lock();
        let arriving = std::mem::take(&mut *state).bitmaps.into_values();
        let kept = arriving.filter_map(|Arriving { disk, bitmap, shape, .. }| {
            let Held { name, bits, digest, .. } = bitmap?;
            Some(((disk, name), Kept { shape, bits, digest }))
        });
        KeptBitmaps(kept.collect())
    }

    /// Drops what was kept and not created again: all that is there now was created now.
    pub fn drop_kept(&self) {
        self.lock().kept.clear();
    }

    /// The leaves of a bitmap that are not zero, in rising order.
    pub fn leaves(&self, version: BitmapVersion) -> Result<Vec<(u64, Node)>> {
        let mut state = self.lock();
        let found = state.bitmaps.get_mut(&version.bitmap).and_then(|found| found.bitmap.as_mut());
        let Some(held) = found else { return Ok(Vec::new()) };
        held.hash()?;
        Ok(held.digest.leaves())
    }

    /// A bitmap of a disk of this name and size in bytes is created, all bits clear or as they were
    /// kept.
    pub fn create(&self, create: &BitmapCreate<'_>, disk: (&str, u64), at: &Arrival) -> Result<()> {
        self.lock().create(create, disk, at)
    }

    /// The pieces in a run.
    pub fn pieces(&self, run: &Run<'_>, at: &Arrival) -> Result<()> {
        if run.pieces.is_empty() {
            return Ok(());
        }
        let mut state = self.lock();
        run.pieces.iter().try_for_each(|piece| state.piece(run.disk, &piece, at))
    }

    /// A bitmap's flags are replaced.
    pub fn update(&self, update: &BitmapUpdate, at: &Arrival) -> Result<()> {
        let mut state = self.lock();
        let Some(found) = state.live(update.version, at)? else { return Ok(()) };
        match &mut found.bitmap {
            Some(bitmap) if found.seal.is_none() && update.is_persistent => {
                bitmap.is_enabled = update.is_enabled;
                Ok(())
            }
            _ => {
                let label = &found.label;
                let reason =
                    format!("flags of {label} change after its seal, or to what a file has not");
                Err(at.protocol(reason))
            }
        }
    }

    /// A bitmap is gone at the source.
    pub fn remove(&self, version: BitmapVersion, at: &Arrival) -> Result<()> {
        let mut state = self.lock();
        let Some(found) = state.live(version, at)? else { return Ok(()) };
        let (disk, freed, held) = (found.disk, found.shape.byte_len(), found.bitmap.take());
        state.bytes = state.bytes.saturating_sub(freed);
        if let Some(Held { name, bits, .. }) = held {
            state.held = state.held.saturating_sub(bits.held_bytes());
            state.names.remove(&(disk, name));
        }
        Ok(())
    }

    /// A bitmap is complete, and must be what the source says.
    pub fn seal(&self, seal: &BitmapSeal, at: &Arrival) -> Result<()> {
        let mut state = self.lock();
        let Some(found) = state.live(seal.version, at)? else { return Ok(()) };
        let Some(bitmap) = found.bitmap.as_mut().filter(|_| found.seal.is_none()) else {
            return Err(at.protocol(format!("{} is sealed twice", found.label)));
        };
        if let Some(said) = seal.digest {
            bitmap.hash()?;
            let digest = bitmap.digest.digest();
            if said != digest {
                let label = &found.label;
                let reason = format!("{label} is {digest} here and {said} at the source");
                return Err(at.protocol(reason));
            }
        }
        found.seal = Some(seal.digest);
        Ok(())
    }

    /// Hashes what has arrived, so that little is left to do for the seals.
    pub fn hash(&self) -> Result<()> {
        let mut state = self.lock();
        let mut held = state.bitmaps.values_mut().filter_map(|found| found.bitmap.as_mut());
        held.try_for_each(Held::hash)
    }

    /// Takes the bitmaps of a disk, in the order of their numbers. `Err` with one that was not
    /// sealed: what it is called in messages.
    pub fn take(&self, disk: DiskId) -> Result<Vec<ArrivedBitmap>, String> {
        let State { bitmaps, names, done_with, .. } = &mut *self.lock();
        let mut arrived = Vec::new();
        for (number, found) in bitmaps.iter_mut().filter(|(_, found)| found.disk == disk) {
            if found.bitmap.is_none() {
                continue;
            }
            let digest = found.seal.ok_or_else(|| found.label.clone())?;
            let version = BitmapVersion { bitmap: *number, generation: found.generation };
            let Some((bitmap, running)) = found.bitmap.take().map(Held::into_parts) else {
                continue;
            };
            names.remove(&(disk, bitmap.name.clone()));
            done_with.push(running);
            arrived.push(ArrivedBitmap { version, digest, bitmap });
        }
        Ok(arrived)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unhashable(error: HashError) -> Error {
    Error::handler(format_spec::Blame::Bytes, error)
}

impl State {
    fn create(
        &mut self,
        create: &BitmapCreate<'_>,
        (disk, size): (&str, u64),
        at: &Arrival,
    ) -> Result<()> {
        let name = create.name;
        let label = format!("bitmap {name:?} of disk {disk:?}");
        self.check_new(create, (&label, size), at)?;
        let granularity = create.shape.granularity;
        let Ok(granularity_bits) = u8::try_from(granularity.trailing_zeros()) else {
            return Err(at.protocol(format!("{label} has granularity {granularity}")));
        };
        self.bytes = self.bytes.saturating_add(create.shape.byte_len());
        let kept = self.kept.remove(&(create.disk, name.to_owned()));
        let (bits, digest) = match kept.filter(|kept| kept.shape == create.shape) {
            Some(kept) => (kept.bits, kept.digest),
            None => {
                let digest = RunningDigest::new(create.shape).map_err(unhashable)?;
                (Bits::new(create.shape.bits), digest)
            }
        };
        self.held = self.held.saturating_add(bits.held_bytes());
        let bitmap = Held {
            name: name.to_owned(),
            granularity_bits,
            is_enabled: create.is_enabled,
            bits,
            digest,
        };
        let arriving = Arriving {
            disk: create.disk,
            label,
            generation: create.version.generation,
            bitmap: Some(bitmap),
            shape: create.shape,
            seal: None,
        };
        self.names.insert((create.disk, name.to_owned()));
        self.bitmaps.insert(create.version.bitmap, arriving);
        Ok(())
    }

    /// Whether a bitmap may be created now.
    fn check_new(
        &self,
        create: &BitmapCreate<'_>,
        (label, size): (&str, u64),
        at: &Arrival,
    ) -> Result<()> {
        let name = create.name;
        let BitmapShape { granularity, bits } = create.shape;
        if create.check(size).is_err() {
            let expected = BitmapShape::of_disk(size, granularity).bits;
            return Err(at.protocol(format!(
                "{label} has {bits} bits of granularity {granularity}, a disk of {size} bytes has \
                 {expected}"
            )));
        }
        if !create.is_persistent {
            return Err(at.protocol(format!("{label} is not kept, and a file has no other")));
        }
        let is_taken = self.names.contains(&(create.disk, name.to_owned()));
        let expected = match self.bitmaps.get(&create.version.bitmap) {
            Some(old) if old.bitmap.is_some() || old.disk != create.disk => None,
            Some(old) => old.generation.checked_add(1),
            None => Some(1),
        };
        let BitmapVersion { bitmap: number, generation } = create.version;
        let Some(expected) = expected.filter(|_| !is_taken) else {
            let reason = format!("{label} exists, or another one has its number, {number}");
            return Err(at.protocol(reason));
        };
        if generation != expected {
            let reason = format!("{label} begins as generation {generation}, {expected} is next");
            return Err(at.protocol(reason));
        }
        let len = create.shape.byte_len();
        let bytes = self.bytes.saturating_add(len);
        let is_too_long = len > MAX_BITMAP_BYTES || bytes > MAX_SHAPE_BYTES;
        if self.bitmaps.len() >= MAX_BITMAPS || is_too_long {
            return Err(at.protocol(format!(
                "{label} of {len} bytes is more than this side holds: {MAX_BITMAP_BYTES} in one, \
                 {MAX_SHAPE_BYTES} in all, {MAX_BITMAPS} bitmaps"
            )));
        }
        Ok(())
    }

    fn piece(&mut self, disk: DiskId, piece: &Piece<'_>, at: &Arrival) -> Result<()> {
        let Some(found) = self.live(piece.version, at)? else { return Ok(()) };
        let (label, index) = (&found.label, piece.index);
        if found.disk != disk {
            let (of, with) = (found.disk.0, disk.0);
            let reason = format!("a piece of {label}, which is disk {of}, comes with disk {with}");
            return Err(at.protocol(reason));
        }
        if found.seal.is_some() {
            return Err(at.protocol(format!("piece {index} of {label} comes after its seal")));
        }
        if found.shape.check(piece).is_err() {
            let (len, count) = (piece.bits.len(), found.shape.piece_count());
            let wrong = found.shape.piece_len(index).map_or_else(
                || format!("is outside: it has {count} pieces"),
                |expected| format!("has {len} bytes, not {expected}"),
            );
            return Err(at.protocol(format!("piece {index} of {label} {wrong}")));
        }
        let len = found.shape.piece_len(piece.index).unwrap_or(0);
        let zeroes = [0; PIECE_BYTES];
        let bits = if piece.bits.is_empty() { zeroes.get(..len) } else { Some(piece.bits) };
        let Some(bitmap) = &mut found.bitmap else { return Ok(()) };
        let before = bitmap.bits.held_bytes();
        bitmap.put(piece.index, bits.unwrap_or_default());
        let more = bitmap.bits.held_bytes().saturating_sub(before);
        self.held = self.held.saturating_add(more);
        if self.held > MAX_HELD_BYTES {
            return Err(at.protocol("the bitmaps have more bits than this side holds"));
        }
        Ok(())
    }

    /// The bitmap of that number and generation; `None` for an older generation, whose records may
    /// come late and are ignored.
    fn live(&mut self, version: BitmapVersion, at: &Arrival) -> Result<Option<&mut Arriving>> {
        let BitmapVersion { bitmap, generation } = version;
        match self.bitmaps.get_mut(&bitmap) {
            Some(found) if generation < found.generation => Ok(None),
            Some(found) if generation == found.generation && found.bitmap.is_some() => {
                Ok(Some(found))
            }
            Some(found) => {
                let (label, last) = (&found.label, found.generation);
                let state = if found.bitmap.is_some() { "has" } else { "was removed as" };
                let reason = format!(
                    "{label} {state} generation {last}; generation {generation} does not exist"
                );
                Err(at.protocol(reason))
            }
            None => Err(at.protocol(format!("bitmap number {bitmap} does not exist"))),
        }
    }
}
