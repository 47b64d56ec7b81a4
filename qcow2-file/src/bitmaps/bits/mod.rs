//! The bits of one bitmap in memory.
//!
//! Bit `n` stands for granule `n` and lives in word `n / 64`, least significant first; written as
//! little-endian bytes that is the layout of QEMU, of the qcow2 file and of the wire. Bits behind
//! the last granule are always clear.

mod pages;
#[cfg(test)]
mod tests;

use std::ops::Range;

use bitvec::order::Lsb0;
use bitvec::slice::BitSlice;

use self::pages::{PAGE_BITS, PAGE_BYTES, Page, Pages};
use crate::in_memory;
use crate::zeroes::is_zero;

/// A fixed number of bits. All methods treat positions beyond [`len`](Self::len) as absent: reading
/// answers clear, setting does nothing.
///
/// Memory is taken only where bits were set, 4 KiB at a time, and a word for each 4 KiB where none
/// was. A clone shares that memory until one of the two is changed there.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Bits {
    len: u64,
    pages: Pages,
}

impl std::fmt::Debug for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bits, set ", self.len)?;
        f.debug_list().entries(self.runs()).finish()
    }
}

impl Bits {
    /// `len` clear bits. Takes `len / 4096` bytes: who reads `len` from an image has checked it.
    pub fn new(len: u64) -> Self {
        Self { len, pages: Pages::new(len.div_ceil(PAGE_BITS)) }
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
        self.len.div_ceil(64).saturating_mul(8)
    }

    /// Bytes of memory that hold bits, those that are shared with clones included. Constant time.
    pub fn held_bytes(&self) -> u64 {
        self.pages.held().saturating_mul(PAGE_BYTES as u64)
    }

    /// Views for `bitvec`'s operations: the parts that take memory, in order, each with the
    /// position of its first bit. All other bits are clear.
    pub fn parts(&self) -> impl Iterator<Item = (u64, &BitSlice<u64, Lsb0>)> {
        self.pages.iter().map(|(index, page)| {
            let first = index.saturating_mul(PAGE_BITS);
            let all = BitSlice::<u64, Lsb0>::from_slice(page);
            let len = usize::try_from(self.len.saturating_sub(first)).unwrap_or(usize::MAX);
            (first, all.get(..len).unwrap_or(all))
        })
    }

    /// Whether bit `index` is set.
    pub fn get(&self, index: u64) -> bool {
        index < self.len && self.pages.word(index / 64) >> (index % 64) & 1 != 0
    }

    /// Sets the bits of `range`.
    pub fn set_range(&mut self, range: Range<u64>) {
        for (page, within) in pages_of(range.start..range.end.min(self.len)) {
            let Some(words) = self.pages.make(page) else { return };
            change(words, within, |word, mask| *word |= mask);
        }
    }

    /// Clears the bits of `range`.
    pub fn clear_range(&mut self, range: Range<u64>) {
        for (page, within) in pages_of(range.start..range.end.min(self.len)) {
            if within == (0..PAGE_BITS) {
                self.pages.drop(page);
            } else if self.pages.get(page).is_some()
                && let Some(words) = self.pages.make(page)
            {
                change(words, within, |word, mask| *word &= !mask);
            }
        }
    }

    /// Clears all bits.
    pub fn clear_all(&mut self) {
        *self = Self::new(self.len);
    }

    /// Number of set bits.
    pub fn count(&self) -> u64 {
        self.pages.iter().map(|(_, page)| count_ones(page)).sum()
    }

    /// The first set bit at or behind `from`.
    pub fn next_set(&self, from: u64) -> Option<u64> {
        let (mut page, mut within) = (from / PAGE_BITS, from % PAGE_BITS);
        while let Some((found, words)) = self.pages.next(page) {
            let from = if found == page { within } else { 0 };
            if let Some(bit) = first_other(words, from, 0) {
                return Some(found * PAGE_BITS + bit).filter(|bit| *bit < self.len);
            }
            (page, within) = (found + 1, 0);
        }
        None
    }

    /// The first clear bit at or behind `from`, if it is one of ours.
    pub fn next_clear(&self, from: u64) -> Option<u64> {
        let mut from = from;
        while from < self.len {
            let page = from / PAGE_BITS;
            let found = match self.pages.get(page) {
                Some(words) => first_other(words, from % PAGE_BITS, u64::MAX),
                None => Some(from % PAGE_BITS),
            };
            if let Some(bit) = found {
                return Some(page * PAGE_BITS + bit).filter(|bit| *bit < self.len);
            }
            from = (page + 1) * PAGE_BITS;
        }
        None
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

    /// The blocks of `block` bits each, at least one, that have a set bit: their positions in units
    /// of a block, in order. Costs what is held.
    pub fn blocks(&self, block: u64) -> impl Iterator<Item = u64> + '_ {
        let block = block.max(1);
        let mut from = 0;
        std::iter::from_fn(move || {
            let found = self.next_set(from)? / block;
            from = found.saturating_add(1).saturating_mul(block);
            Some(found)
        })
    }

    /// Sets every bit that is set in `other`. `false`, and nothing changed, when the lengths
    /// differ.
    #[must_use]
    pub fn merge(&mut self, other: &Self) -> bool {
        if self.len != other.len {
            return false;
        }
        self.pages.merge(&other.pages);
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
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let within = in_memory(at % PAGE_BYTES as u64);
            let (head, tail) = rest.split_at_mut(rest.len().min(PAGE_BYTES - within));
            match self.pages.get(at / PAGE_BYTES as u64) {
                Some(page) => pages::read(page, within, head),
                None => head.fill(0),
            }
            at = at.saturating_add(head.len() as u64);
            rest = tail;
        }
    }

    /// Replaces the little-endian bytes from byte `offset` on. Bits behind the last granule are
    /// dropped. Zeroes take no memory where there is none.
    pub fn write_bytes(&mut self, offset: u64, bytes: &[u8]) {
        let room = self.byte_len().saturating_sub(offset);
        let kept = usize::try_from(room).ok().and_then(|room| bytes.get(..room)).unwrap_or(bytes);
        let (mut at, mut rest) = (offset, kept);
        while !rest.is_empty() {
            let within = in_memory(at % PAGE_BYTES as u64);
            let (head, tail) = rest.split_at(rest.len().min(PAGE_BYTES - within));
            let page = at / PAGE_BYTES as u64;
            let changes = self.pages.get(page).is_some() || !is_zero(head);
            if changes && let Some(page) = self.pages.make(page) {
                pages::write(page, within, head);
            }
            at = at.saturating_add(head.len() as u64);
            rest = tail;
        }
        if at.saturating_mul(8) > self.len {
            self.clear_tail();
        }
    }

    fn clear_tail(&mut self) {
        let (page, used) = (self.len / PAGE_BITS, self.len % PAGE_BITS);
        let end = used.next_multiple_of(64);
        if used < end
            && self.pages.get(page).is_some()
            && let Some(words) = self.pages.make(page)
        {
            change(words, used..end, |word, mask| *word &= !mask);
        }
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

/// The pages that `range` touches, each with what it touches of it.
fn pages_of(range: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let page = at / PAGE_BITS;
        let start = page * PAGE_BITS;
        let within = (at - start)..range.end.saturating_sub(start).min(PAGE_BITS);
        at = start.saturating_add(PAGE_BITS);
        (within.start < within.end).then_some((page, within))
    })
}

/// Calls `change` with each word of a page that has bits of `range`, and their mask.
fn change(page: &mut Page, range: Range<u64>, change: impl Fn(&mut u64, u64)) {
    for_masks(range, |words, mask| {
        let words = page.get_mut(words).unwrap_or_default();
        words.iter_mut().for_each(|word| change(word, mask));
    });
}

/// The first bit at or behind `from` of a page in a word that is not `plain`, where it differs from
/// it.
fn first_other(page: &Page, from: u64, plain: u64) -> Option<u64> {
    let first = usize::try_from(from / 64).ok()?;
    let differing = (page.get(first)? ^ plain) & (u64::MAX << (from % 64));
    let (index, word) = if differing != 0 {
        (first, differing)
    } else {
        let behind = page.get(first + 1..)?;
        let skipped = behind.iter().position(|word| *word != plain)?;
        (first + 1 + skipped, behind.get(skipped)? ^ plain)
    };
    Some(index as u64 * 64 + u64::from(word.trailing_zeros()))
}
