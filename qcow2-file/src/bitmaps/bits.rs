//! The bits of one bitmap in memory.
//!
//! Bit `n` stands for granule `n` and lives in word `n / 64`, least significant first; written as
//! little-endian bytes that is the layout of QEMU, of the qcow2 file and of the wire. Bits behind
//! the last granule are always clear.

use std::ops::Range;

use bitvec::order::Lsb0;
use bitvec::slice::BitSlice;

/// Words that are tested together when looking for the next bit: wide enough for vector registers.
const STRIDE: usize = 8;

/// A fixed number of bits. All methods treat positions beyond [`len`](Self::len) as absent: reading
/// answers clear, setting does nothing.
#[derive(Debug, PartialEq, Eq, Default)]
pub struct Bits {
    len: u64,
    words: Vec<u64>,
}

/// Words that are copied together: those of one page.
const PAGE: usize = 512;

impl Clone for Bits {
    /// Where the original has no bits, the copy takes no memory that was not touched: fresh zeroes
    /// are the system's until somebody writes to them.
    fn clone(&self) -> Self {
        let mut words = vec![0; self.words.len()];
        for (to, from) in words.chunks_mut(PAGE).zip(self.words.chunks(PAGE)) {
            if from.iter().any(|word| *word != 0) {
                to.copy_from_slice(from);
            }
        }
        Self { len: self.len, words }
    }
}

impl Bits {
    /// `len` clear bits. Takes `len / 8` bytes: whoever reads `len` from an image has checked it.
    pub fn new(len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(64)).unwrap_or(usize::MAX);
        Self { len, words: vec![0; words] }
    }

    /// Clear bits for a disk of `size` bytes at a granularity of `1 << granularity_bits` bytes.
    pub fn for_disk(size: u64, granularity_bits: u8) -> Self {
        Self::new(granules(size, granularity_bits))
    }

    /// Number of bits.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bits at all, as on an empty disk.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the little-endian form: whole 64-bit words.
    pub fn byte_len(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    /// The words.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// A view for `bitvec`'s operations.
    pub fn as_bitslice(&self) -> &BitSlice<u64, Lsb0> {
        let all = BitSlice::<u64, Lsb0>::from_slice(&self.words);
        let len = usize::try_from(self.len).unwrap_or(usize::MAX);
        all.get(..len).unwrap_or(all)
    }

    /// Whether bit `index` is set.
    pub fn get(&self, index: u64) -> bool {
        index < self.len && self.word(index / 64) >> (index % 64) & 1 != 0
    }

    /// Sets the bits of `range`.
    pub fn set_range(&mut self, range: Range<u64>) {
        self.change_range(range, |word, mask| *word |= mask);
    }

    /// Clears the bits of `range`.
    pub fn clear_range(&mut self, range: Range<u64>) {
        self.change_range(range, |word, mask| *word &= !mask);
    }

    /// Clears all bits.
    pub fn clear_all(&mut self) {
        self.words.fill(0);
    }

    /// Number of set bits.
    pub fn count(&self) -> u64 {
        count_ones(&self.words)
    }

    /// The first set bit at or behind `from`.
    pub fn next_set(&self, from: u64) -> Option<u64> {
        self.next_where(from, 0)
    }

    /// The first clear bit at or behind `from`, if it is one of ours.
    pub fn next_clear(&self, from: u64) -> Option<u64> {
        self.next_where(from, u64::MAX)
    }

    /// The first run of set bits at or behind `from`.
    pub fn next_run(&self, from: u64) -> Option<Range<u64>> {
        let start = self.next_set(from)?;
        Some(start..self.next_clear(start).unwrap_or(self.len))
    }

    /// All runs of set bits, in order.
    pub fn runs(&self) -> Runs<'_> {
        Runs { bits: self, from: 0 }
    }

    /// Sets every bit that is set in `other`. `false`, and nothing changed, when the lengths
    /// differ.
    #[must_use]
    pub fn merge(&mut self, other: &Self) -> bool {
        if self.len != other.len {
            return false;
        }
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        true
    }

    /// Sets every bit whose granule touches a set granule of `other`, whose bits stand for
    /// `1 << theirs` bytes where ours stand for `1 << ours`. Both cover the same disk of `size`
    /// bytes; `false`, and nothing changed, when the lengths say otherwise.
    #[must_use]
    pub fn merge_scaled(&mut self, ours: u8, other: &Self, theirs: u8, size: u64) -> bool {
        if self.len != granules(size, ours) || other.len != granules(size, theirs) {
            return false;
        }
        if ours == theirs {
            return self.merge(other);
        }
        if let Some(shift) = ours.checked_sub(theirs) {
            let mut from = 0;
            while let Some(run) = other.next_run(from) {
                let granules = (run.start >> shift)..((run.end - 1) >> shift) + 1;
                // The rest of our last granule is set already: go on behind it.
                from = (granules.end << shift).max(run.end);
                self.set_range(granules);
            }
        } else {
            let shift = theirs - ours;
            for run in other.runs() {
                self.set_range((run.start << shift)..(run.end << shift));
            }
        }
        true
    }

    /// Fills `buf` with the little-endian bytes from byte `offset` on; zeroes behind the end.
    pub fn read_bytes(&self, offset: u64, buf: &mut [u8]) {
        let (head_len, first) = split_at_word(offset, buf.len());
        let (head, whole) = buf.split_at_mut(head_len);
        let word = self.word(offset / 8).to_le_bytes();
        let skip = (offset % 8) as usize;
        head.iter_mut().zip(word.iter().skip(skip)).for_each(|(to, from)| *to = *from);
        let words = self.words.get(first..).unwrap_or_default();
        let stored = words.len().min(whole.len() / 8);
        let (middle, tail) = whole.split_at_mut(stored * 8);
        for (bytes, word) in middle.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        tail.fill(0);
        let word = words.get(stored).copied().unwrap_or(0).to_le_bytes();
        tail.iter_mut().zip(word).for_each(|(to, from)| *to = from);
    }

    /// Replaces the little-endian bytes from byte `offset` on. Bits behind the last granule are
    /// dropped.
    pub fn write_bytes(&mut self, offset: u64, bytes: &[u8]) {
        let (head_len, first) = split_at_word(offset, bytes.len());
        let (head, whole) = bytes.split_at(head_len);
        self.write_in_word(offset / 8, (offset % 8) as usize, head);
        let chunks = whole.chunks_exact(8);
        let tail = chunks.remainder();
        let words = self.words.get_mut(first..).unwrap_or_default();
        let count = chunks.len();
        for (word, bytes) in words.iter_mut().zip(chunks) {
            *word = bytes.try_into().map(u64::from_le_bytes).unwrap_or_default();
        }
        self.write_in_word(first.saturating_add(count) as u64, 0, tail);
        self.clear_tail();
    }

    fn write_in_word(&mut self, index: u64, skip: usize, bytes: &[u8]) {
        let word = usize::try_from(index).ok().and_then(|i| self.words.get_mut(i));
        let Some(word) = word.filter(|_| !bytes.is_empty()) else { return };
        let mut value = word.to_le_bytes();
        value.iter_mut().skip(skip).zip(bytes).for_each(|(to, from)| *to = *from);
        *word = u64::from_le_bytes(value);
    }

    fn word(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|i| self.words.get(i)).copied().unwrap_or(0)
    }

    fn clear_tail(&mut self) {
        let used = self.len % 64;
        if let (1.., Some(last)) = (used, self.words.last_mut()) {
            *last &= (1 << used) - 1;
        }
    }

    fn change_range(&mut self, range: Range<u64>, change: impl Fn(&mut u64, u64)) {
        for_masks(range.start..range.end.min(self.len), |words, mask| {
            let words = self.words.get_mut(words).unwrap_or_default();
            words.iter_mut().for_each(|word| change(word, mask));
        });
    }

    /// The first bit at or behind `from` in a word that is not `plain`, where it differs from it.
    fn next_where(&self, from: u64, plain: u64) -> Option<u64> {
        if from >= self.len {
            return None;
        }
        let first = usize::try_from(from / 64).ok()?;
        let differing = (self.word(from / 64) ^ plain) & (u64::MAX << (from % 64));
        let (index, word) = if differing != 0 {
            (first, differing)
        } else {
            let behind = self.words.get(first + 1..)?;
            let skipped = first_other_word(behind, plain)?;
            (first + 1 + skipped, behind.get(skipped)? ^ plain)
        };
        let found = index as u64 * 64 + u64::from(word.trailing_zeros());
        (found < self.len).then_some(found)
    }
}

/// Runs of set bits, in order. See [`Bits::runs`].
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    bits: &'a Bits,
    from: u64,
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let run = self.bits.next_run(self.from)?;
        self.from = run.end;
        Some(run)
    }
}

/// Granules of a disk of `size` bytes at `1 << granularity_bits` bytes each.
pub fn granules(size: u64, granularity_bits: u8) -> u64 {
    size.div_ceil(1u64.checked_shl(u32::from(granularity_bits)).unwrap_or(u64::MAX))
}

/// Number of set bits in `words`.
pub(crate) fn count_ones(words: &[u64]) -> u64 {
    words.iter().map(|w| u64::from(w.count_ones())).sum()
}

/// How many of `len` bytes from byte `offset` on stand before the next whole word, and which word
/// that is.
fn split_at_word(offset: u64, len: usize) -> (usize, usize) {
    let head = (offset.wrapping_neg() % 8) as usize;
    (head.min(len), usize::try_from(offset.div_ceil(8)).unwrap_or(usize::MAX))
}

/// Calls `change` with ranges of word positions and the mask of bits of `range` in each of them.
pub(crate) fn for_masks(range: Range<u64>, mut change: impl FnMut(Range<usize>, u64)) {
    if range.start >= range.end {
        return;
    }
    let (first, last) = (range.start / 64, (range.end - 1) / 64);
    let (Ok(first), Ok(last)) = (usize::try_from(first), usize::try_from(last)) else { return };
    let head = u64::MAX << (range.start % 64);
    let tail = u64::MAX >> (63 - (range.end - 1) % 64);
    if first == last {
        return change(first..first + 1, head & tail);
    }
    change(first..first + 1, head);
    change(first + 1..last, u64::MAX);
    change(last..last + 1, tail);
}

fn first_other_word(words: &[u64], plain: u64) -> Option<usize> {
    // Short runs are found at once.
    if words.first().is_some_and(|word| *word != plain) {
        return Some(0);
    }
    let mut chunks = words.chunks_exact(STRIDE);
    let mut base = 0;
    for chunk in &mut chunks {
        if chunk.iter().fold(0, |all, word| all | (word ^ plain)) != 0 {
            return chunk.iter().position(|word| *word != plain).map(|i| base + i);
        }
        base += STRIDE;
    }
    chunks.remainder().iter().position(|word| *word != plain).map(|i| base + i)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::cast_possible_truncation)]

    use proptest::prelude::*;

    use super::*;

    /// The same operations on one `bool` per bit.
    fn model(len: u64, ranges: &[(u64, u64, bool)]) -> (Bits, Vec<bool>) {
        let mut bits = Bits::new(len);
        let mut plain = vec![false; len as usize];
        for &(start, size, set) in ranges {
            let range = start..start + size;
            if set {
                bits.set_range(range.clone());
            } else {
                bits.clear_range(range.clone());
            }
            for i in range {
                if let Some(p) = plain.get_mut(i as usize) {
                    *p = set;
                }
            }
        }
        (bits, plain)
    }

    fn ranges() -> impl Strategy<Value = Vec<(u64, u64, bool)>> {
        proptest::collection::vec((0u64..2000, 0u64..300, any::<bool>()), 0..12)
    }

    proptest! {
        #[test]
        fn agrees_with_one_bool_per_bit(len in 0u64..1500, ops in ranges()) {
            let (bits, plain) = model(len, &ops);
            prop_assert_eq!(bits.count(), plain.iter().filter(|p| **p).count() as u64);
            for i in 0..len + 70 {
                let expected = plain.get(i as usize).copied().unwrap_or(false);
                prop_assert_eq!(bits.get(i), expected);
                let find = |wanted| plain.iter().skip(i as usize).position(|p| *p == wanted)
                    .map(|n| n as u64 + i);
                prop_assert_eq!(bits.next_set(i), find(true));
                prop_assert_eq!(bits.next_clear(i), find(false));
            }
            let mut from_runs = vec![false; len as usize];
            bits.runs().for_each(|r| from_runs[r.start as usize..r.end as usize].fill(true));
            prop_assert_eq!(&from_runs, &plain);
            prop_assert!(bits.as_bitslice().iter().by_vals().eq(plain.iter().copied()));
        }

        #[test]
        fn bytes_go_in_and_out_by_any_piece(
            len in 0u64..1500, ops in ranges(), piece in 1usize..40,
        ) {
            let (bits, plain) = model(len, &ops);
            let total = bits.byte_len() as usize;
            let mut all = vec![0xaa; total + 9];
            bits.read_bytes(0, &mut all);
            for i in 0..(total + 9) * 8 {
                let bit = all[i / 8] >> (i % 8) & 1 != 0;
                prop_assert_eq!(bit, plain.get(i).copied().unwrap_or(false));
            }
            let mut copy = Bits::new(len);
            for (n, chunk) in all.chunks(piece).enumerate() {
                let mut again = vec![0x55; chunk.len()];
                bits.read_bytes((n * piece) as u64, &mut again);
                prop_assert_eq!(&again, chunk);
                copy.write_bytes((n * piece) as u64, chunk);
            }
            prop_assert_eq!(copy, bits);
        }

        #[test]
        fn merging_covers_what_either_covers(
            size in 1u64..(1 << 20), ours in 9u8..16, theirs in 9u8..16, ops in ranges(),
        ) {
            let (other, _) = model(granules(size, theirs), &ops);
            let mut mine = Bits::for_disk(size, ours);
            prop_assert!(mine.merge_scaled(ours, &other, theirs, size));
            for i in 0..mine.len() {
                let bytes = (i << ours)..((i + 1) << ours).min(size);
                let last = (bytes.end - 1) >> theirs;
                let expected = (bytes.start >> theirs..=last).any(|g| other.get(g));
                prop_assert_eq!(mine.get(i), expected);
            }
        }
    }

    #[test]
    fn stray_tail_bits_are_dropped() {
        let mut bits = Bits::new(70);
        bits.write_bytes(8, &[0xff; 8]);
        assert_eq!(bits.count(), 6);
        assert_eq!(bits.next_clear(64), None);
        let mut other = Bits::new(71);
        assert!(!other.merge(&bits));
    }
}
