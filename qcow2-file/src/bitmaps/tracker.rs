//! Which granules were written, marked from any thread.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::bits::{for_masks, granules};

/// Words of a chunk: 32 KiB, the bits of 16 GiB at a granularity of 64 KiB.
const CHUNK_WORDS: usize = 4096;

type Chunk = Box<[AtomicU64]>;

/// One bit per granule of a disk, set from any thread. Takes memory only where bits are set.
#[derive(Debug)]
pub(crate) struct Tracker {
    granularity_bits: u8,
    bits: u64,
    chunks: Box<[OnceLock<Chunk>]>,
}

impl Tracker {
    /// No granule of a disk of `size` bytes is marked yet.
    pub(crate) fn new(size: u64, granularity_bits: u8) -> Self {
        let bits = granules(size, granularity_bits);
        let chunks = bits.div_ceil(64 * CHUNK_WORDS as u64);
        Self { granularity_bits, bits, chunks: (0..chunks).map(|_| OnceLock::new()).collect() }
    }

    pub(crate) fn granularity_bits(&self) -> u8 {
        self.granularity_bits
    }

    /// Marks every granule that the guest bytes `range` touch.
    pub(crate) fn mark(&self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let last = (range.end - 1) >> self.granularity_bits;
        let touched = (range.start >> self.granularity_bits)..(last + 1).min(self.bits);
        for_masks(touched, |words, mask| {
            for index in words {
                self.set(index, mask);
            }
        });
    }

    fn set(&self, index: usize, mask: u64) {
        let Some(chunk) = self.chunks.get(index / CHUNK_WORDS) else { return };
        let words = chunk.get_or_init(|| (0..CHUNK_WORDS).map(|_| AtomicU64::new(0)).collect());
        let Some(word) = words.get(index % CHUNK_WORDS) else { return };
        // Most writes hit granules that are marked already: a load keeps the line shared.
        if word.load(Ordering::Relaxed) & mask != mask {
            word.fetch_or(mask, Ordering::Release);
        }
    }

    /// Whether no granule is marked.
    pub(crate) fn is_clean(&self) -> bool {
        self.chunks.iter().all(|chunk| chunk.get().is_none())
    }

    /// Adds the marks, as little-endian bytes from byte `offset` of the bitmap on, to `buf`;
    /// answers whether there were any. `offset` and the length are multiples of 8.
    pub(crate) fn add_to(&self, offset: u64, buf: &mut [u8]) -> bool {
        let mut any = false;
        let mut index = usize::try_from(offset / 8).unwrap_or(usize::MAX);
        let mut rest = buf;
        while !rest.is_empty() {
            let in_chunk = index % CHUNK_WORDS;
            let len = ((CHUNK_WORDS - in_chunk) * 8).min(rest.len());
            let (piece, tail) = rest.split_at_mut(len);
            if let Some(words) = self.chunks.get(index / CHUNK_WORDS).and_then(OnceLock::get) {
                let words = words.get(in_chunk..).unwrap_or_default();
                for (bytes, word) in piece.chunks_exact_mut(8).zip(words) {
                    let marks = word.load(Ordering::Acquire).to_le_bytes();
                    any |= marks != [0; 8];
                    bytes.iter_mut().zip(marks).for_each(|(byte, mark)| *byte |= mark);
                }
            }
            index = index.saturating_add(len / 8);
            rest = tail;
        }
        any
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::cast_possible_truncation)]

    use super::*;
    use crate::bitmaps::Bits;

    #[test]
    fn marks_what_a_write_touches_from_many_threads() {
        let size = (40 << 30) + 100;
        let tracker = Tracker::new(size, 16);
        assert!(tracker.is_clean());
        let writes = [(0u64, 1u64), (65535, 2), (17 << 30, 3 << 20), (40 << 30, 100), (5, 0)];
        std::thread::scope(|s| {
            for chunk in writes.chunks(2) {
                let tracker = &tracker;
                s.spawn(move || {
                    for &(at, len) in chunk {
                        tracker.mark(at..at + len);
                    }
                });
            }
        });
        let mut expected = Bits::for_disk(size, 16);
        for (at, len) in writes {
            if len > 0 {
                expected.set_range(at >> 16..((at + len - 1) >> 16) + 1);
            }
        }
        let mut bytes = vec![0; expected.byte_len() as usize];
        assert!(tracker.add_to(0, &mut bytes));
        let mut seen = Bits::for_disk(size, 16);
        seen.write_bytes(0, &bytes);
        assert_eq!(seen, expected);
        let mut tail = [0; 8];
        assert!(tracker.add_to(expected.byte_len() - 8, &mut tail));
        assert!(!tracker.add_to(8 * 100, &mut tail.clone()));
        assert!(!tracker.is_clean());
    }
}
