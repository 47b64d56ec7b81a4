//! Going on with an image that was not finished: what its file holds is taken for what it may be
//! after a crash, or after somebody else's hands.
//!
//! After a power failure any part of what was not synced may be there. So an L2 table may be
//! missing though the L1 table names it (then it reads as an empty one), and an entry may point
//! behind the end of the file (then what it pointed to is lost, and so is the entry). What nothing
//! points to is cut off, so that new clusters read as zero.

use std::ops::Range;

use super::map::Map;
use super::refcounts::Refcounts;
use super::step::Rules;
use super::{NewImage, in_memory, zero_out};
use crate::error::{Error, Result};
use crate::layout::entry::{L2Entry, OFFSET_MASK};
use crate::layout::geometry::Geometry;
use crate::storage::{Storage, StorageExt};
use crate::zeroes::is_zero;

/// Bytes of a table that are looked at together.
const PIECE_BYTES: u64 = 256 << 10;

impl NewImage {
    /// Reads the map from the file's own tables. Nothing has been written through this image yet.
    pub(super) fn recover(&self) -> Result<()> {
        let g = self.geometry;
        let file = self.file.as_ref();
        // An image that was finished, but not published, has a header.
        let mut header = vec![0; in_memory(g.cluster_size())];
        file.read(&mut header, 0)?;
        if !is_zero(&header) {
            zero_out(file, 0, g.cluster_size())?;
        }
        if self.is_one_to_one {
            return file.make_durable();
        }
        let len = file.length()?;
        self.load_l1(len)?;
        let mut walk = Walk {
            file,
            map: &self.map,
            geometry: g,
            rules: self.rules,
            has_data_file: self.data.is_some(),
            clusters: g.clusters_for(self.header.size),
            tables: self.map.tables().filter(|table| *table != 0).collect(),
            data: self.first_cluster() << g.cluster_bits(),
            len,
            end: self.first_cluster() << g.cluster_bits(),
        };
        walk.tables.sort_unstable();
        walk.run()?;
        let end = walk.end.next_multiple_of(g.cluster_size());
        self.space.begin_at(end >> g.cluster_bits());
        if len > end {
            file.set_len(end).map_err(|e| file.io_error("set the length to", end, e))?;
        }
        self.map.write_homes()?;
        file.make_durable()?;
        let taken = std::iter::once(0..self.first_cluster()).collect();
        Refcounts::new(file, (g, self.data.is_some()), &self.map, taken)
            .verify(end >> g.cluster_bits())
    }

    fn load_l1(&self, len: u64) -> Result<()> {
        let g = self.geometry;
        let (file, entries) = (self.file.as_ref(), self.map.l1_len());
        let first = self.first_cluster() << g.cluster_bits();
        let mut bytes = vec![0; in_memory(PIECE_BYTES.min(entries * 8))];
        let mut index = 0;
        while index < entries {
            let count = (bytes.len() as u64 / 8).min(entries - index);
            let piece = bytes.get_mut(..in_memory(count * 8)).unwrap_or_default();
            file.read(piece, self.map.l1_at() + index * 8)?;
            for (i, word) in (index..).zip(piece.as_chunks::<8>().0) {
                let home = u64::from_be_bytes(*word) & OFFSET_MASK;
                if home == 0 || home >= len {
                    continue;
                }
                if g.in_cluster(home) != 0 || home < first {
                    return Err(self.unusable(format!("its L1 entry {i} points to {home:#x}")));
                }
                self.map.set_home(i, home);
            }
            index += count;
        }
        Ok(())
    }

    fn unusable(&self, what: String) -> Error {
        unusable(self.file.as_ref(), &what)
    }
}

/// An unfinished file that cannot be gone on with.
fn unusable(file: &dyn Storage, what: &str) -> Error {
    let reason = format!("the unfinished image cannot be gone on with: {what}");
    Error::Refused { file: file.name(), reason }
}

/// Looks at every entry of every table.
struct Walk<'a> {
    file: &'a dyn Storage,
    map: &'a Map,
    geometry: Geometry,
    rules: Rules,
    has_data_file: bool,
    /// Guest clusters of the disk.
    clusters: u64,
    /// Where tables are, ascending.
    tables: Vec<u64>,
    /// Where data may begin.
    data: u64,
    /// Length of the file.
    len: u64,
    /// Behind the last byte that something points to.
    end: u64,
}

impl Walk<'_> {
    fn run(&mut self) -> Result<()> {
        let g = self.geometry;
        if self.tables.array_windows().any(|[a, b]| a == b) {
            return Err(unusable(self.file, "two L1 entries point to one table"));
        }
        let mut piece = vec![0; in_memory(g.cluster_size().min(PIECE_BYTES))];
        for l1_index in 0..self.map.l1_len() {
            let table = self.map.table(l1_index);
            if table == 0 {
                continue;
            }
            self.end = self.end.max(table + g.cluster_size());
            let step = piece.len() as u64;
            for start in (0..g.cluster_size() / step).map(|i| i * step) {
                self.file.read(&mut piece, table + start)?;
                if is_zero(&piece) {
                    continue;
                }
                let first = l1_index * g.l2_entries() + start / g.l2_entry_size();
                if self.heal(&mut piece, table + start, first)? {
                    self.file.write(&piece, table + start)?;
                }
            }
        }
        Ok(())
    }

    /// Takes the entries out that point to what is not there; whether there were any. The piece
    /// stands at file offset `at` and maps guest clusters from `first` on.
    fn heal(&mut self, piece: &mut [u8], at: u64, first: u64) -> Result<bool> {
        let size = in_memory(self.geometry.l2_entry_size());
        let mut is_changed = false;
        for (i, entry) in (0u64..).zip(piece.chunks_exact_mut(size)) {
            if is_zero(entry) {
                continue;
            }
            let keeps = self.keeps(entry, at + i * size as u64, first + i)?;
            if !keeps {
                entry.fill(0);
                is_changed = true;
            }
        }
        Ok(is_changed)
    }

    /// Whether an entry, which is not empty, stays.
    fn keeps(&mut self, entry: &[u8], at: u64, cluster: u64) -> Result<bool> {
        let words = entry.as_chunks::<8>().0;
        let word = |i: usize| words.get(i).map_or(0, |b| u64::from_be_bytes(*b));
        let decoded = L2Entry::decode(word(0), word(1), self.geometry, self.has_data_file, at)
            .map_err(|what| self.file.malformed(what))?;
        if cluster >= self.clusters {
            return Err(unusable(self.file, "a cluster behind the end of the disk is mapped"));
        }
        let place = match decoded {
            L2Entry::Standard(s) => {
                if s.subclusters.zero != 0 && !self.rules.has_zero_flag {
                    return Err(unusable(self.file, "version 2 knows no zero clusters"));
                }
                if s.is_copied != s.cluster.is_some() {
                    return Err(unusable(self.file, "an entry is not as this writer writes it"));
                }
                let Some(host) = s.cluster else { return Ok(true) };
                if self.has_data_file {
                    let is_own = host.0 == cluster << self.geometry.cluster_bits();
                    let what = "a cluster of the data file is not at its place";
                    return if is_own { Ok(true) } else { Err(unusable(self.file, what)) };
                }
                host.0..host.0 + self.geometry.cluster_size()
            }
            L2Entry::Compressed(_) if self.has_data_file => {
                return Err(unusable(self.file, "a data file holds no compressed clusters"));
            }
            L2Entry::Compressed(c) => c.offset.0..c.offset.0.saturating_add(c.max_bytes()),
        };
        if place.start < self.data || self.meets_table(&place) {
            return Err(unusable(self.file, "a cluster is mapped onto a table"));
        }
        if place.start >= self.len {
            return Ok(false);
        }
        // The end of the last cluster may be a hole that the file does not reach.
        self.end =
            self.end.max(place.end.min(self.len.next_multiple_of(self.geometry.cluster_size())));
        Ok(true)
    }

    fn meets_table(&self, place: &Range<u64>) -> bool {
        let before = self.tables.partition_point(|table| *table < place.end);
        let last = before.checked_sub(1).and_then(|i| self.tables.get(i));
        last.is_some_and(|table| table + self.geometry.cluster_size() > place.start)
    }
}
