//! A storage that counts how often its parts were written, so that whoever has read a part can tell
//! later whether it still is what was read.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::{Run, Storage};
use crate::limits::{MAX_WATCHED_PARTS, WATCHED_PART_BITS};

/// How often each part of a file was written. Parts far apart may share a count.
#[derive(Debug)]
pub struct Writes {
    part_bits: u32,
    counts: Box<[AtomicU16]>,
}

impl Writes {
    /// Nothing was written yet to a file of about `len` bytes. What is written together is
    /// `1 << cluster_bits` bytes long, and so is a part, unless that is many or there are more
    /// parts than are counted.
    pub fn new(len: u64, cluster_bits: u32) -> Self {
        let mut part_bits = cluster_bits.min(WATCHED_PART_BITS);
        while len >> part_bits > MAX_WATCHED_PARTS {
            part_bits += 1;
        }
        let parts = (len >> part_bits).clamp(1, MAX_WATCHED_PARTS).next_power_of_two();
        Self { part_bits, counts: (0..parts).map(|_| AtomicU16::new(0)).collect() }
    }

    /// Adds the counts of the parts that `range` touches to `out`. `false` where one has been
    /// written so often that it is not counted any more.
    pub fn collect(&self, range: Range<u64>, out: &mut impl Extend<u16>) -> bool {
        let mut is_known = true;
        out.extend(self.touched(range).map(|count| {
            let count = count.load(Ordering::SeqCst);
            is_known &= count < u16::MAX;
            count
        }));
        is_known
    }

    /// Counts a change of `len` bytes. Comes after it: who read before it has an older count.
    fn note(&self, offset: u64, len: u64) {
        for count in self.touched(offset..offset.saturating_add(len)) {
            let add = |count: u16| count.checked_add(1);
            // At its end it stays.
            let _ = count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add);
        }
    }

    fn touched(&self, range: Range<u64>) -> impl Iterator<Item = &AtomicU16> {
        let all = self.counts.len() as u64;
        let first = range.start >> self.part_bits;
        let last = range.end.saturating_sub(1) >> self.part_bits;
        let count = if range.is_empty() { 0 } else { (last - first).saturating_add(1).min(all) };
        let index =
            move |n: u64| usize::try_from((first.wrapping_add(n)) % all).unwrap_or_default();
        (0..count).filter_map(move |n| self.counts.get(index(n)))
    }
}

/// A storage whose writes are counted.
#[derive(Debug)]
pub struct Watched {
    storage: Arc<dyn Storage>,
    writes: Arc<Writes>,
}

impl Watched {
    /// Counts in `writes` what is written to `storage` through this.
    pub fn new(storage: Arc<dyn Storage>, writes: Arc<Writes>) -> Self {
        Self { storage, writes }
    }

    /// What failed may have happened in part.
    fn noted<T>(&self, offset: u64, len: u64, done: io::Result<T>) -> io::Result<T> {
        self.writes.note(offset, len);
        done
    }
}

impl Storage for Watched {
    fn name(&self) -> Arc<str> {
        self.storage.name()
    }

    fn len(&self) -> io::Result<u64> {
        self.storage.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.storage.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.noted(offset, buf.len() as u64, self.storage.write_at(buf, offset))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.noted(offset, len, self.storage.write_zeroes(offset, len))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.noted(offset, len, self.storage.discard(offset, len))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        // What is cut off reads as zero later. What is added did before.
        let before = self.storage.len()?;
        self.noted(len, before.saturating_sub(len), self.storage.set_len(len))
    }

    fn run_at(&self, offset: u64, max_len: u64) -> io::Result<Run> {
        self.storage.run_at(offset, max_len)
    }

    fn sync(&self) -> io::Result<()> {
        self.storage.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;

    const PART: u64 = 1 << WATCHED_PART_BITS;

    fn counts(writes: &Writes, range: Range<u64>) -> Vec<u16> {
        let mut found = Vec::new();
        assert!(writes.collect(range, &mut found));
        found
    }

    #[test]
    fn every_change_counts_where_it_happens() {
        let writes = Arc::new(Writes::new(8 * PART, WATCHED_PART_BITS));
        let watched = Watched::new(Arc::new(Memory::new()), writes.clone());
        watched.write_at(&[1; 10], 5).unwrap();
        watched.write_at(&[1; 2], PART - 1).unwrap();
        watched.write_at(&[], 3 * PART).unwrap();
        watched.write_zeroes(3 * PART, PART).unwrap();
        watched.discard(4 * PART - 1, 2).unwrap();
        assert_eq!(counts(&writes, 0..8 * PART), [2, 1, 0, 2, 1, 0, 0, 0]);
        watched.set_len(7 * PART).unwrap();
        assert_eq!(counts(&writes, 4 * PART..8 * PART), [1, 0, 0, 0]);
        watched.set_len(5 * PART + 1).unwrap();
        assert_eq!(counts(&writes, 4 * PART..8 * PART), [1, 1, 1, 0]);
        assert_eq!(counts(&writes, PART..PART), [] as [u16; 0]);
        let mut buf = [0; 10];
        watched.read_at(&mut buf, 5).unwrap();
        assert_eq!(buf, [1; 10]);
    }

    #[test]
    fn a_part_that_is_written_without_end_is_not_known() {
        let writes = Writes::new(1, 9);
        for _ in 0..u16::MAX {
            writes.note(0, 1);
        }
        assert!(!writes.collect(0..1, &mut Vec::new()));
        writes.note(0, 1);
        assert!(!writes.collect(0..1, &mut Vec::new()), "it does not begin anew");
    }

    #[test]
    fn memory_does_not_follow_the_file() {
        let writes = Writes::new(1 << 50, 21);
        assert_eq!(writes.counts.len() as u64, MAX_WATCHED_PARTS);
        writes.note(0, u64::MAX);
        writes.note(1 << 60, 1);
        let mut found = Vec::new();
        writes.collect(0..1 << 50, &mut found);
        assert_eq!(found.iter().filter(|count| **count == 2).count(), 1);
        assert_eq!(found.len() as u64, MAX_WATCHED_PARTS);
    }
}
