//! One bitmap of a running guest.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use format_spec::native::block::{BitmapShape, PIECE_BYTES};
use mig_core::bitmap::BitmapInfo;
use mig_core::dirty::{AtomicBits, CHUNK_BYTES};
use qcow2_file::bitmaps::Bits;

use crate::running_digest::read_chunk;

/// Granules of one piece.
const PIECE_BITS: u64 = PIECE_BYTES as u64 * 8;

/// A bitmap from its creation to its removal: one generation of its name.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) name: String,
    pub(super) granularity_bits: u8,
    pub(super) is_persistent: bool,
    pub(super) is_enabled: AtomicBool,
    pub(super) is_inconsistent: AtomicBool,
    pub(super) bits: AtomicBits,
}

impl Life {
    /// What its bits stand for.
    pub(super) fn shape(&self) -> BitmapShape {
        // Granularities have at most 31 bits; see `LiveBitmaps::check`.
        let granularity = 1u32.checked_shl(self.granularity_bits.into()).unwrap_or(0);
        BitmapShape { granularity, bits: self.bits.len() }
    }

    pub(super) fn info(&self) -> BitmapInfo {
        BitmapInfo {
            name: self.name.clone(),
            granularity: self.shape().granularity.into(),
            is_enabled: self.is_enabled.load(Ordering::Acquire),
            is_persistent: self.is_persistent,
            is_inconsistent: self.is_inconsistent.load(Ordering::Acquire),
        }
    }

    fn granules(&self, bytes: Range<u64>) -> Range<u64> {
        let end = bytes.end.saturating_sub(1) >> self.granularity_bits;
        (bytes.start >> self.granularity_bits)..end.saturating_add(1)
    }

    /// A copy of the bits.
    pub(super) fn snapshot(&self) -> Bits {
        let mut bits = Bits::new(self.bits.len());
        let mut bytes = Vec::new();
        for chunk in self.bits.chunks() {
            let offset = chunk.saturating_mul(CHUNK_BYTES);
            read_chunk(&self.bits, offset, &mut bytes);
            bits.write_bytes(offset, &bytes);
        }
        bits
    }
}

/// A life in its place among the bitmaps of its disk, with what others need to know of it now.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) life: Arc<Life>,
    /// While a migration runs: which pieces changed since they were last taken.
    pub(super) changed: Option<Arc<AtomicBits>>,
    /// While it is loading: what the guest wrote meanwhile. The transferred bits replace one
    /// another; these are added at the end.
    pub(super) successor: Option<Arc<AtomicBits>>,
}

impl Slot {
    pub(super) fn new(life: Life) -> Self {
        Self { life: Arc::new(life), changed: None, successor: None }
    }

    /// Marks what a change of the guest bytes `bytes`, not empty, touches.
    pub(super) fn record(&self, bytes: Range<u64>) {
        if self.life.is_enabled.load(Ordering::Acquire) {
            match &self.successor {
                Some(successor) => _ = successor.set_range(self.life.granules(bytes)),
                None => self.set(self.life.granules(bytes)),
            }
        }
    }

    /// Sets granules, then says so: whoever takes the piece afterwards sees them. Who finds them
    /// set need not say it: who set them does, before that write completes.
    pub(super) fn set(&self, granules: Range<u64>) {
        if self.life.bits.set_range(granules.clone()) {
            self.note(granules);
        }
    }

    /// Clears all granules, piece by piece.
    pub(super) fn clear(&self) {
        let mut from = 0;
        while let Some(set) = self.life.bits.next_run(from, 1) {
            let piece = set.start / PIECE_BITS;
            let granules = piece * PIECE_BITS..(piece + 1) * PIECE_BITS;
            from = granules.end;
            self.life.bits.clear_range(granules.clone());
            self.note(granules);
        }
    }

    /// Sets all granules that touch one that is set in `other`, of the same disk.
    pub(super) fn merge(&self, other: &Life) {
        let mut from = 0;
        while let Some(run) = other.bits.next_run(from, u64::MAX) {
            let bytes = (run.start << other.granularity_bits)..(run.end << other.granularity_bits);
            let granules = self.life.granules(bytes);
            // The rest of our last granule is set already: go on behind it.
            let covered = granules.end << self.life.granularity_bits >> other.granularity_bits;
            from = run.end.max(covered);
            self.set(granules);
        }
    }

    /// Begins to note changed pieces; those that may hold bits have changed since nothing was sent.
    /// Nobody may be marking meanwhile, so that no bit is looked at: a piece that turns out to be
    /// zero is not sent.
    pub(super) fn track(&mut self) -> Arc<AtomicBits> {
        let changed = Arc::new(AtomicBits::new(self.life.shape().piece_count()));
        for chunk in self.life.bits.chunks() {
            let first = chunk * CHUNK_BYTES / PIECE_BYTES as u64;
            changed.set_range(first..first + CHUNK_BYTES / PIECE_BYTES as u64);
        }
        self.changed = Some(changed.clone());
        changed
    }

    fn note(&self, granules: Range<u64>) {
        if let Some(changed) = &self.changed {
            changed.set_range(pieces(granules));
        }
    }
}

/// The pieces that a range of granules, not empty, touches.
fn pieces(granules: Range<u64>) -> Range<u64> {
    granules.start / PIECE_BITS..(granules.end.saturating_sub(1) / PIECE_BITS).saturating_add(1)
}
