//! One pass over everything that refers to host clusters.

use format_spec::Problem;

use super::counts::{Counts, Referrer, Use};
use super::roots::{Area, Roots, Table};
use super::{FindingKind, Image};
use crate::error::Result;
use crate::in_memory;
use crate::layout::bitmap_directory::TableEntry;
use crate::layout::entry::{CompressedEntry, L2Entry, StandardEntry};

/// Bytes of a bitmap table read at a time.
const BITMAP_PIECE_BYTES: u64 = 64 << 10;

/// Counts every reference. Structures come first, so that a data reference into one is the
/// culprit. Findings other than overlaps are made in the first pass only.
pub(super) fn count_references(
    image: &mut Image<'_>,
    roots: &Roots,
    counts: &mut Counts,
    is_first: bool,
) -> Result<()> {
    let bits = image.geometry.cluster_bits();
    for area in &roots.areas {
        claim_bytes(image, counts, (area.start, area.bytes), area.by);
    }
    for (at, by) in &roots.refcount_blocks {
        claim_bytes(image, counts, (*at, 1), *by);
    }
    for (at, table) in &roots.tables {
        let cluster = at >> bits;
        counts.claim(cluster..cluster + 1, table.weight, Use::Metadata, table.by);
    }
    for table in &roots.bitmap_tables {
        bitmap_table(image, counts, *table, is_first)?;
    }
    let mut buf = vec![0; in_memory(image.geometry.cluster_size())];
    for (at, table) in &roots.tables {
        if image.read_unless_hole(&mut buf, *at)? {
            let mut walk = TableWalk { image: &mut *image, counts: &mut *counts, is_first };
            walk.l2_table(&buf, *at, *table)?;
        }
    }
    Ok(())
}

fn claim_bytes(image: &Image<'_>, counts: &mut Counts, (start, bytes): (u64, u64), by: Referrer) {
    let bits = image.geometry.cluster_bits();
    let last = start.saturating_add(bytes.max(1) - 1) >> bits;
    counts.claim(start >> bits..last + 1, 1, Use::Metadata, by);
}

fn bitmap_table(
    image: &mut Image<'_>,
    counts: &mut Counts,
    table: Area,
    is_first: bool,
) -> Result<()> {
    let g = image.geometry;
    let mut piece = Vec::new();
    let mut done = 0;
    while done < table.bytes {
        piece.resize(in_memory((table.bytes - done).min(BITMAP_PIECE_BYTES)), 0);
        if image.read_unless_hole(&mut piece, table.start + done)? {
            let (entries, _) = piece.as_chunks::<8>();
            for (i, raw) in entries.iter().enumerate() {
                let at = table.start + done + i as u64 * 8;
                let by = Referrer { at, field: "bitmap table entry" };
                match TableEntry::decode(u64::from_be_bytes(*raw), g, at) {
                    Ok(TableEntry::Data(host)) if image.is_inside(host.0, 1) => {
                        claim_bytes(image, counts, (host.0, 1), by);
                    }
                    Ok(TableEntry::Data(host)) if is_first => {
                        image.expect_inside(host.0, 1, by);
                    }
                    Err(what) if is_first => image.report.add(FindingKind::Bitmaps, what),
                    _ => {}
                }
            }
        }
        done += piece.len() as u64;
    }
    Ok(())
}

struct TableWalk<'w, 'a> {
    image: &'w mut Image<'a>,
    counts: &'w mut Counts,
    is_first: bool,
}

impl TableWalk<'_, '_> {
    fn l2_table(&mut self, bytes: &[u8], at: u64, table: Table) -> Result<()> {
        let g = self.image.geometry;
        let has_data_file = self.image.header.has_data_file();
        let width = g.l2_entry_size();
        for (i, raw) in bytes.chunks_exact(in_memory(width)).enumerate() {
            let (first, rest) = raw.split_at_checked(8).unwrap_or_default();
            let word = |b: &[u8]| b.try_into().map_or(0, u64::from_be_bytes);
            let (raw, bitmap) = (word(first), word(rest));
            if raw == 0 && bitmap == 0 {
                continue;
            }
            let index = i as u64;
            let by = Referrer { at: at + index * width, field: "l2_entry" };
            match L2Entry::decode(raw, bitmap, g, has_data_file, by.at) {
                Ok(L2Entry::Standard(entry)) if has_data_file => {
                    self.external(entry, (table, index), by);
                }
                Ok(L2Entry::Standard(entry)) => self.standard(entry, table, by)?,
                Ok(L2Entry::Compressed(entry)) => self.compressed(entry, table, by),
                Err(what) if self.is_first => {
                    self.image.report.add(FindingKind::Structure, what);
                }
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn standard(&mut self, entry: StandardEntry, table: Table, by: Referrer) -> Result<()> {
        if self.is_first && self.image.header.version < 3 && entry.subclusters.zero != 0 {
            let problem = Problem::Other("reads as zero, which version 2 does not know");
            self.image.find(FindingKind::Structure, by, problem);
        }
        let Some(host) = entry.cluster else { return Ok(()) };
        let cluster = host.0 >> self.image.geometry.cluster_bits();
        if self.image.is_inside(host.0, 1) {
            self.counts.claim(cluster..cluster + 1, table.weight, Use::Data, by);
        } else if self.is_first {
            self.image.expect_inside(host.0, 1, by);
        }
        if self.is_first && table.active_index.is_some() {
            self.image.expect_copied(host.0, entry.is_copied, by)?;
        }
        Ok(())
    }

    fn compressed(&mut self, entry: CompressedEntry, table: Table, by: Referrer) {
        let bits = self.image.geometry.cluster_bits();
        let (start, bytes) = (entry.offset.0, entry.max_bytes());
        if self.is_first && self.image.header.has_data_file() {
            let problem = Problem::Other("is compressed in an image with an external data file");
            self.image.find(FindingKind::Structure, by, problem);
        }
        if self.image.is_inside(start, bytes) {
            let last = (start + bytes.max(1) - 1) >> bits;
            self.counts.claim(start >> bits..last + 1, table.weight, Use::Data, by);
        } else if self.is_first {
            self.image.expect_inside(start, bytes, by);
        }
    }

    /// A cluster of an external data file is not counted; it stands where the guest sees it.
    fn external(&mut self, entry: StandardEntry, (table, index): (Table, u64), by: Referrer) {
        let (Some(host), true) = (entry.cluster, self.is_first) else { return };
        let g = self.image.geometry;
        if !entry.is_copied {
            let problem = Problem::Other("lacks the COPIED flag of an external data file");
            self.image.find(FindingKind::CopiedFlag, by, problem);
        }
        if let Some(l1_index) = table.active_index {
            let expected = l1_index.saturating_mul(g.l2_span()) + (index << g.cluster_bits());
            if host.0 != expected {
                let problem = Problem::Mismatch { value: host.0, expected };
                self.image.find(FindingKind::Structure, by, problem);
            }
        }
    }
}
