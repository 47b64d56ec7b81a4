//! Bits that threads mark while another one sweeps them.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering, fence};

/// Words of a chunk: 64 KiB, one leaf of a bitmap's digest (SPEC 2).
const CHUNK_WORDS: usize = 8192;
/// Bytes of a chunk in the little-endian form.
pub const CHUNK_BYTES: u64 = CHUNK_WORDS as u64 * 8;
const CHUNK_BITS: u64 = CHUNK_BYTES * 8;

type Chunk = Box<[AtomicU64]>;

/// A fixed number of bits, set and cleared from any thread. Takes memory only where bits were set:
/// [`CHUNK_BYTES`] at a time, and a few words per chunk that was not.
///
/// Bit `n` is bit `n % 64` of word `n / 64`; as little-endian bytes that is the layout of QEMU, of
/// qcow2 and of our wire. Positions beyond the end are absent: reading answers clear, setting does
/// nothing.
///
/// **Ordering.** Whoever changes something, then sets its bit, and whoever clears the bit, then
/// reads that something, never miss one another: the reader sees the change, or the bit is set
/// afterwards. That holds although setting a bit that is set writes nothing: both sides have a
/// full fence between their two steps.
#[derive(Debug)]
pub struct AtomicBits {
    len: u64,
    chunks: Box<[OnceLock<Chunk>]>,
    /// Set bits. Each change is counted by the thread that made it, a moment later: it may be wrong
    /// by what is under way, and even negative.
    count: AtomicI64,
    /// Bytes of the chunks that were made.
    held: AtomicU64,
}

impl AtomicBits {
    /// `len` clear bits. Takes 24 bytes for every [`CHUNK_BYTES`] that they would need.
    pub fn new(len: u64) -> Self {
        let chunks = (0..len.div_ceil(CHUNK_BITS)).map(|_| OnceLock::new()).collect();
        Self { len, chunks, count: AtomicI64::new(0), held: AtomicU64::new(0) }
    }

    /// Number of bits.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bits at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the little-endian form: whole 64-bit words.
    pub fn byte_len(&self) -> u64 {
        self.len.div_ceil(64).saturating_mul(8)
    }

    /// Number of set bits, in constant time. Exact when nobody is changing any.
    pub fn count(&self) -> u64 {
        u64::try_from(self.count.load(Ordering::Acquire)).unwrap_or(0)
    }

    /// Bytes of memory that hold bits.
    pub fn held_bytes(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether bit `index` is set.
    pub fn get(&self, index: u64) -> bool {
        index < self.len && self.word(index / 64) >> (index % 64) & 1 != 0
    }

    /// Sets the bits of `range`. Answers whether any of them was clear.
    pub fn set_range(&self, range: Range<u64>) -> bool {
        // See "Ordering" above: what was changed before is seen by whoever clears what we find set.
        fence(Ordering::SeqCst);
        let mut added = 0;
        for_masks(range.start..range.end.min(self.len), |index, mask| {
            let Some(word) = self.make_word(index) else { return };
            // Most writes hit what is marked already: a load keeps the line shared.
            if word.load(Ordering::Relaxed) & mask != mask {
                added += ones(mask & !word.fetch_or(mask, Ordering::AcqRel));
            }
        });
        self.counted(added);
        added != 0
    }

    /// Clears the bits of `range`. Answers whether any of them was set.
    pub fn clear_range(&self, range: Range<u64>) -> bool {
        let mut removed = 0;
        let mut at = range.start;
        let end = range.end.min(self.len);
        while at < end {
            let chunk_end = (at / CHUNK_BITS + 1).saturating_mul(CHUNK_BITS).min(end);
            if self.chunk(at / CHUNK_BITS).is_some() {
                for_masks(at..chunk_end, |index, mask| removed += self.clear_word(index, mask));
            }
            at = chunk_end;
        }
        self.counted(-removed);
        fence(Ordering::SeqCst);
        removed != 0
    }

    /// The first run of set bits at or behind `from`, cut at `max` bits.
    pub fn next_run(&self, from: u64, max: u64) -> Option<Range<u64>> {
        let start = self.next_set(from)?;
        let limit = start.saturating_add(max.max(1)).min(self.len);
        Some(start..self.next_clear(start, limit))
    }

    /// Takes the first run of set bits at or behind `from`, cut at `max` bits: they are clear
    /// afterwards, and whoever takes them has them alone. What they stand for is to be read after
    /// this returns.
    pub fn take_run(&self, from: u64, max: u64) -> Option<Range<u64>> {
        let mut from = from;
        loop {
            let found = self.next_run(from, max)?;
            let end = self.take_prefix(found.clone());
            if end > found.start {
                fence(Ordering::SeqCst);
                return Some(found.start..end);
            }
            // Somebody else took its first bit meanwhile.
            from = found.start;
        }
    }

    /// Sets every bit that is set in `other`. Bits beyond our end are left out.
    pub fn merge(&self, other: &Self) {
        let mut from = 0;
        while let Some(run) = other.next_run(from, u64::MAX) {
            from = run.end;
            self.set_range(run);
        }
    }

    /// Sets every set bit in `other`, then clears it here. Not to be called while others set bits
    /// here.
    pub fn move_to(&self, other: &Self) {
        let mut from = 0;
        while let Some(run) = self.next_run(from, u64::MAX) {
            from = run.end;
            other.set_range(run.clone());
            self.clear_range(run);
        }
    }

    /// Fills `buf` with the little-endian bytes from byte `offset` on, a multiple of 8; zeroes
    /// behind the end. Answers whether any is not zero.
    pub fn read_bytes(&self, offset: u64, buf: &mut [u8]) -> bool {
        let mut any = 0;
        let mut index = offset / 8;
        let mut rest = buf;
        while !rest.is_empty() {
            let within = usize::try_from(index % CHUNK_WORDS as u64).unwrap_or(CHUNK_WORDS);
            let len = ((CHUNK_WORDS - within) * 8).min(rest.len());
            let (head, tail) = rest.split_at_mut(len);
            let words = self.chunk(index / CHUNK_WORDS as u64);
            let words = words.and_then(|words| words.get(within..)).unwrap_or_default();
            let (whole, rest_of_word) = head.as_chunks_mut::<8>();
            let last = words.get(whole.len());
            let (there, absent) = whole.split_at_mut(words.len().min(whole.len()));
            absent.fill([0; 8]);
            for (bytes, word) in there.iter_mut().zip(words) {
                let word = word.load(Ordering::Relaxed);
                any |= word;
                *bytes = word.to_le_bytes();
            }
            if !rest_of_word.is_empty() {
                let word = last.map_or(0, |word| word.load(Ordering::Relaxed)).to_le_bytes();
                any |= u64::from(rest_of_word.iter().zip(word).any(|(_, byte)| byte != 0));
                rest_of_word.iter_mut().zip(word).for_each(|(to, from)| *to = from);
            }
            index += (len / 8) as u64;
            rest = tail;
        }
        // As if each word had been loaded so: one fence costs less than thousands of those.
        fence(Ordering::Acquire);
        any != 0
    }

    /// Replaces the little-endian bytes from byte `offset` on; both it and the length are multiples
    /// of 8. Bits beyond the last are dropped. Answers whether anything changed.
    pub fn write_bytes(&self, offset: u64, bytes: &[u8]) -> bool {
        let mut changed = false;
        for (index, bytes) in (offset / 8..).zip(bytes.chunks_exact(8)) {
            let new = bytes.try_into().map(u64::from_le_bytes).unwrap_or(0) & self.valid(index);
            if new == 0 && self.word(index) == 0 {
                continue;
            }
            let Some(word) = self.make_word(index) else { break };
            let old = word.swap(new, Ordering::AcqRel);
            changed |= old != new;
            self.counted(ones(new) - ones(old));
        }
        changed
    }

    /// The chunks that hold memory: position in units of [`CHUNK_BYTES`]. All others are clear.
    pub fn chunks(&self) -> impl Iterator<Item = u64> + '_ {
        (0..).zip(&self.chunks).filter(|(_, chunk)| chunk.get().is_some()).map(|(at, _)| at)
    }

    fn counted(&self, change: i64) {
        if change != 0 {
            self.count.fetch_add(change, Ordering::AcqRel);
        }
    }

    /// Takes bits of `range` as long as they are set, and says where that ended.
    fn take_prefix(&self, range: Range<u64>) -> u64 {
        let mut at = range.start;
        while at < range.end {
            let word_end = (at / 64 + 1).saturating_mul(64).min(range.end);
            let mut wanted = 0;
            for_masks(at..word_end, |_, mask| wanted = mask);
            let Some(word) = self.find_word(at / 64) else { break };
            let got = word.fetch_and(!wanted, Ordering::AcqRel) & wanted;
            let missed = u64::from((wanted & !got).trailing_zeros());
            let kept_end = word_end.min(at / 64 * 64 + missed.min(64));
            let mut kept = 0;
            for_masks(at..kept_end, |_, mask| kept = mask);
            self.counted(-ones(got & kept));
            if got & !kept != 0 {
                word.fetch_or(got & !kept, Ordering::AcqRel);
            }
            at = kept_end;
            if kept_end < word_end {
                break;
            }
        }
        at
    }

    fn clear_word(&self, index: u64, mask: u64) -> i64 {
        match self.find_word(index) {
            Some(word) if word.load(Ordering::Acquire) & mask != 0 => {
                ones(mask & word.fetch_and(!mask, Ordering::AcqRel))
            }
            _ => 0,
        }
    }

    fn next_set(&self, from: u64) -> Option<u64> {
        let mut at = from;
        while at < self.len {
            let chunk_end = (at / CHUNK_BITS + 1).saturating_mul(CHUNK_BITS);
            if let Some(chunk) = self.chunk(at / CHUNK_BITS) {
                let first = usize::try_from(at % CHUNK_BITS / 64).unwrap_or(CHUNK_WORDS);
                let mut mask = u64::MAX << (at % 64);
                for (index, word) in (at / 64..).zip(chunk.iter().skip(first)) {
                    let found = word.load(Ordering::Acquire) & mask;
                    if found != 0 {
                        return Some(index * 64 + u64::from(found.trailing_zeros()));
                    }
                    mask = u64::MAX;
                }
            }
            at = chunk_end;
        }
        None
    }

    /// The first clear bit behind `from`, or `limit`.
    fn next_clear(&self, from: u64, limit: u64) -> u64 {
        let mut mask = u64::MAX << (from % 64);
        let mut index = from / 64;
        while index.saturating_mul(64) < limit {
            let clear = !self.word(index) & mask;
            if clear != 0 {
                return limit.min(index * 64 + u64::from(clear.trailing_zeros()));
            }
            mask = u64::MAX;
            index += 1;
        }
        limit
    }

    fn chunk(&self, at: u64) -> Option<&Chunk> {
        usize::try_from(at).ok().and_then(|at| self.chunks.get(at)).and_then(OnceLock::get)
    }

    fn find_word(&self, index: u64) -> Option<&AtomicU64> {
        let within = usize::try_from(index % CHUNK_WORDS as u64).ok()?;
        self.chunk(index / CHUNK_WORDS as u64)?.get(within)
    }

    fn make_word(&self, index: u64) -> Option<&AtomicU64> {
        let chunk_at = index / CHUNK_WORDS as u64;
        let chunk = self.chunks.get(usize::try_from(chunk_at).ok()?)?;
        let words = chunk.get_or_init(|| {
            // The last chunk is as long as the bits need.
            let left = self.len.div_ceil(64) - chunk_at * CHUNK_WORDS as u64;
            let words = left.min(CHUNK_WORDS as u64);
            self.held.fetch_add(words * 8, Ordering::Relaxed);
            (0..words).map(|_| AtomicU64::new(0)).collect()
        });
        words.get(usize::try_from(index % CHUNK_WORDS as u64).ok()?)
    }

    fn word(&self, index: u64) -> u64 {
        self.find_word(index).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Which bits of a word exist.
    fn valid(&self, index: u64) -> u64 {
        match self.len.saturating_sub(index.saturating_mul(64)) {
            0 => 0,
            left @ 1..64 => (1 << left) - 1,
            _ => u64::MAX,
        }
    }
}

fn ones(word: u64) -> i64 {
    i64::from(word.count_ones())
}

/// Calls `change` with each word's position and the mask of bits of `range` in it.
fn for_masks(range: Range<u64>, mut change: impl FnMut(u64, u64)) {
    if range.start >= range.end {
        return;
    }
    let (first, last) = (range.start / 64, (range.end - 1) / 64);
    let head = u64::MAX << (range.start % 64);
    let tail = u64::MAX >> (63 - (range.end - 1) % 64);
    if first == last {
        return change(first, head & tail);
    }
    change(first, head);
    (first + 1..last).for_each(|index| change(index, u64::MAX));
    change(last, tail);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::cast_possible_truncation)]

    use proptest::prelude::*;

    use super::*;

    fn ranges() -> impl Strategy<Value = Vec<(u64, u64, bool)>> {
        proptest::collection::vec((0u64..2000, 0u64..300, any::<bool>()), 0..12)
    }

    fn model(len: u64, ops: &[(u64, u64, bool)]) -> (AtomicBits, Vec<bool>) {
        let bits = AtomicBits::new(len);
        let mut plain = vec![false; len as usize];
        for &(start, size, set) in ops {
            let range = start..start + size;
            let before = plain.clone();
            for i in range.clone() {
                if let Some(p) = plain.get_mut(i as usize) {
                    *p = set;
                }
            }
            let changed = if set { bits.set_range(range) } else { bits.clear_range(range) };
            assert_eq!(changed, before != plain);
        }
        (bits, plain)
    }

    proptest! {
        #[test]
        fn agrees_with_one_bool_per_bit(
            len in 0u64..1500, ops in ranges(), max in 1u64..200, words in 1usize..5,
        ) {
            let (bits, plain) = model(len, &ops);
            prop_assert_eq!(bits.count(), plain.iter().filter(|p| **p).count() as u64);
            for i in 0..len + 70 {
                prop_assert_eq!(bits.get(i), plain.get(i as usize).copied().unwrap_or(false));
            }
            let copy = AtomicBits::new(len);
            let mut buf = vec![0xaa; words * 8];
            for offset in (0..bits.byte_len()).step_by(buf.len()) {
                bits.read_bytes(offset, &mut buf);
                copy.write_bytes(offset, &buf);
            }
            prop_assert_eq!(copy.count(), bits.count());
            let merged = AtomicBits::new(len);
            merged.merge(&copy);
            let mut taken = vec![false; len as usize];
            let mut from = 0;
            while let Some(run) = merged.take_run(from, max) {
                prop_assert!(run.end - run.start <= max && run.start >= from);
                prop_assert_eq!(bits.next_run(run.start, max), Some(run.clone()));
                from = run.end;
                taken[run.start as usize..run.end as usize].fill(true);
            }
            prop_assert_eq!(taken, plain);
            prop_assert_eq!(merged.count(), 0);
        }
    }

    #[test]
    fn stray_tail_bits_are_dropped() {
        let bits = AtomicBits::new(70);
        assert!(bits.write_bytes(0, &[0xff; 24]));
        assert_eq!(bits.count(), 70);
        assert_eq!(bits.next_run(3, u64::MAX), Some(3..70));
        assert!(!bits.set_range(60..90));
    }

    #[test]
    fn an_empty_giant_takes_no_memory_and_is_searched_at_once() {
        let bits = AtomicBits::new(1 << 28);
        assert_eq!(bits.next_run(0, 1), None);
        assert!(!bits.clear_range(0..1 << 28));
        assert!(!bits.write_bytes(4096, &[0; 64]));
        assert_eq!(bits.chunks().count(), 0);
        bits.set_range((1 << 27) - 1..(1 << 27) + 1);
        assert_eq!(bits.chunks().collect::<Vec<_>>(), [255, 256]);
        assert_eq!(bits.take_run(0, 9), Some((1 << 27) - 1..(1 << 27) + 1));
    }

    /// Writers bump a cell, then set its bit; sweepers take bits, then read the cells. At the end
    /// nothing may be newer than what was read.
    #[test]
    fn no_change_is_missed() {
        const CELLS: u64 = 1000;
        let cells: Vec<_> = (0..CELLS).map(|_| AtomicU64::new(0)).collect();
        let seen: Vec<_> = (0..CELLS).map(|_| AtomicU64::new(0)).collect();
        let bits = AtomicBits::new(CELLS);
        let writers = AtomicU64::new(3);
        let sweep = |me: u64| {
            let mut from = 0;
            while let Some(run) = bits.take_run(from, 1 + me * 7) {
                from = run.end;
                for i in run {
                    let i = i as usize;
                    seen[i].fetch_max(cells[i].load(Ordering::Relaxed), Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|scope| {
            for seed in 1..=3u64 {
                let (cells, bits, writers) = (&cells, &bits, &writers);
                scope.spawn(move || {
                    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    for _ in 0..40_000 {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed);
                        let at = (state >> 33) % CELLS;
                        let end = (at + 1 + (state >> 60)).min(CELLS);
                        for cell in &cells[at as usize..end as usize] {
                            cell.fetch_add(1, Ordering::Relaxed);
                        }
                        bits.set_range(at..end);
                    }
                    writers.fetch_sub(1, Ordering::Release);
                });
            }
            for me in 1..=2 {
                let (sweep, writers) = (&sweep, &writers);
                scope.spawn(move || {
                    while writers.load(Ordering::Acquire) > 0 {
                        sweep(me);
                    }
                });
            }
        });
        sweep(1);
        assert_eq!(bits.count(), 0);
        for (cell, seen) in cells.iter().zip(&seen) {
            assert_eq!(cell.load(Ordering::Relaxed), seen.load(Ordering::Relaxed));
        }
    }
}
