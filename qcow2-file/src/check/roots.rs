//! What an image hangs from: L1 tables, snapshot table, bitmaps. Collected once; the passes of a
//! check walk down from here.

use std::collections::{BTreeMap, HashMap, HashSet};

use format_spec::{Malformed, Problem};

use super::counts::Referrer;
use super::{FindingKind, Image};
use crate::error::Result;
use crate::in_memory;
use crate::layout::bitmap_directory::{self, ImageFacts};
use crate::layout::entry::L1Entry;
use crate::layout::header::autoclear;
use crate::layout::snapshot::{self, SnapshotHead};
use crate::layout::units::HostOffset;
use crate::limits;
use crate::storage::StorageExt;

/// Bytes of an L1 table read at a time.
const L1_PIECE_BYTES: u64 = 64 << 10;

/// A stretch of the file that holds one structure.
#[derive(Debug, Clone, Copy)]
pub(super) struct Area {
    pub(super) start: u64,
    pub(super) bytes: u64,
    pub(super) by: Referrer,
}

/// An L2 table and who needs it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    /// L1 entries that point at it, of all L1 tables.
    pub(super) weight: u64,
    /// One of them.
    pub(super) by: Referrer,
    /// Position in the active L1 table, where the active image uses it.
    pub(super) active_index: Option<u64>,
}

/// What an image hangs from.
#[derive(Debug, Default)]
pub(super) struct Roots {
    /// Structures with a fixed place: header, tables, directory.
    pub(super) areas: Vec<Area>,
    /// Refcount blocks and the table entries that point at them.
    pub(super) refcount_blocks: Vec<(u64, Referrer)>,
    /// L2 tables by host offset.
    pub(super) tables: BTreeMap<u64, Table>,
    /// Bitmap tables.
    pub(super) bitmap_tables: Vec<Area>,
}

#[derive(Debug, Clone, Copy)]
struct L1Table {
    start: u64,
    entries: u64,
    weight: u64,
    is_active: bool,
}

impl Roots {
    pub(super) fn collect(image: &mut Image<'_>) -> Result<Self> {
        let mut roots = Self::default();
        let h = image.header;
        let cluster = image.geometry.cluster_size();
        roots.area(image, 0, cluster, Referrer { at: 0, field: "header" });
        let refcount_table = u64::from(h.refcount_table_clusters) * cluster;
        let by = Referrer { at: 48, field: "refcount_table_offset" };
        roots.area(image, h.refcount_table_offset, refcount_table, by);
        roots.refcount_blocks(image)?;
        let active = L1Table {
            start: h.l1_table_offset,
            entries: u64::from(h.l1_size),
            weight: 1,
            is_active: true,
        };
        roots.l1_table(image, active, Referrer { at: 40, field: "l1_table_offset" })?;
        roots.snapshots(image)?;
        if h.autoclear_features & autoclear::BITMAPS != 0 {
            roots.bitmaps(image)?;
        }
        Ok(roots)
    }

    /// Enters an area. `false`, and a finding, where it is not in the file.
    fn area(&mut self, image: &mut Image<'_>, start: u64, bytes: u64, by: Referrer) -> bool {
        let is_inside = bytes > 0 && image.expect_inside(start, bytes, by);
        if is_inside {
            self.areas.push(Area { start, bytes, by });
        }
        is_inside
    }

    /// Collects refcount blocks. What cannot be read as one, is a hole, or was there before, has
    /// no counts for the rest of the check: so a small file cannot make it read for hours.
    fn refcount_blocks(&mut self, image: &mut Image<'_>) -> Result<()> {
        let mut known = HashSet::new();
        for index in 0..image.refcounts.table_len() {
            let at = image.refcounts.table_at().0 + index * 8;
            let by = Referrer { at, field: "refcount_table_entry" };
            let block = match image.refcounts.block_at(index) {
                Ok(None) => continue,
                Ok(Some(block)) => block.0,
                Err(what) => {
                    image.report.add(FindingKind::Structure, what);
                    image.refcounts.forget_block(index);
                    continue;
                }
            };
            let is_inside = image.expect_inside(block, 1, by);
            if is_inside {
                self.refcount_blocks.push((block, by));
            }
            if !is_inside || !known.insert(block) || image.is_hole(block)? {
                image.refcounts.forget_block(index);
            }
        }
        Ok(())
    }

    fn l1_table(&mut self, image: &mut Image<'_>, table: L1Table, by: Referrer) -> Result<()> {
        if !self.area(image, table.start, table.entries * 8, by) {
            return Ok(());
        }
        let mut piece = Vec::new();
        let mut done = 0;
        while done < table.entries * 8 {
            let at = table.start + done;
            piece.resize(in_memory((table.entries * 8 - done).min(L1_PIECE_BYTES)), 0);
            if image.read_unless_hole(&mut piece, at)? {
                let (entries, _) = piece.as_chunks::<8>();
                for (i, raw) in entries.iter().enumerate().filter(|(_, raw)| **raw != [0; 8]) {
                    let index = done / 8 + i as u64;
                    self.l1_entry(image, table, (index, u64::from_be_bytes(*raw)))?;
                }
            }
            done += piece.len() as u64;
        }
        Ok(())
    }

    fn l1_entry(
        &mut self,
        image: &mut Image<'_>,
        table: L1Table,
        (index, raw): (u64, u64),
    ) -> Result<()> {
        let g = image.geometry;
        let by = Referrer { at: table.start + index * 8, field: "l1_entry" };
        let entry = match L1Entry::decode(raw, g, by.at) {
            Ok(entry) => entry,
            Err(what) => {
                image.report.add(FindingKind::Structure, what);
                return Ok(());
            }
        };
        let Some(HostOffset(at)) = entry.table else { return Ok(()) };
        if !image.expect_inside(at, g.cluster_size(), by) {
            return Ok(());
        }
        if table.is_active {
            image.expect_copied(at, entry.is_copied, by)?;
        }
        if self.tables.len() >= limits::MAX_CHECK_TABLES && !self.tables.contains_key(&at) {
            return Err(image.unsupported("so many L2 tables"));
        }
        let known = self.tables.entry(at).or_insert(Table { weight: 0, by, active_index: None });
        known.weight = known.weight.saturating_add(table.weight);
        if table.is_active {
            known.active_index.get_or_insert(index);
        }
        Ok(())
    }

    /// Walks the snapshot table. Snapshots that claim the very same L1 table are counted, not read
    /// again; others do not overlap in a sound image, so together they are no longer than the
    /// file.
    fn snapshots(&mut self, image: &mut Image<'_>) -> Result<()> {
        let start = image.header.snapshots_offset;
        let by = Referrer { at: 64, field: "snapshots_offset" };
        let mut at = start;
        let mut l1_tables: HashMap<(u64, u64), (u64, Referrer)> = HashMap::new();
        for _ in 0..image.header.nb_snapshots {
            if !image.expect_inside(at, snapshot::HEAD_BYTES as u64, by) {
                break;
            }
            let mut head = [0; snapshot::HEAD_BYTES];
            image.file.read(&mut head, at)?;
            let head = match SnapshotHead::decode(&head, at, image.geometry) {
                Ok(head) => head,
                Err(what) => {
                    // Where the next entry starts is not known either.
                    image.report.add(FindingKind::Structure, what);
                    break;
                }
            };
            let by = Referrer { at, field: "snapshot l1_table_offset" };
            let key = (head.l1_table_offset, u64::from(head.l1_size));
            l1_tables.entry(key).or_insert((0, by)).0 += 1;
            at += head.entry_len();
        }
        let len = at - start;
        if len > limits::MAX_SNAPSHOT_TABLE_BYTES {
            let (value, max) = (len, limits::MAX_SNAPSHOT_TABLE_BYTES);
            let problem = Problem::OutOfRange { value, min: 0, max };
            image.find(FindingKind::Structure, by, problem);
        } else if len > 0 {
            self.area(image, start, len, by);
        }
        self.snapshot_l1_tables(image, l1_tables)
    }

    fn snapshot_l1_tables(
        &mut self,
        image: &mut Image<'_>,
        tables: HashMap<(u64, u64), (u64, Referrer)>,
    ) -> Result<()> {
        let mut tables: Vec<_> = tables.into_iter().collect();
        tables.sort_unstable_by_key(|(key, _)| *key);
        let mut clusters = 0;
        for ((start, entries), (weight, by)) in tables {
            clusters += image.geometry.clusters_for(entries * 8);
            if clusters > image.file_clusters || weight > 1 && entries > 0 {
                let problem = Problem::Other("overlaps another snapshot's L1 table");
                image.find(FindingKind::Overlap, by, problem);
            }
            if clusters > image.file_clusters {
                break;
            }
            let table = L1Table { start, entries, weight, is_active: false };
            self.l1_table(image, table, by)?;
        }
        Ok(())
    }

    fn bitmaps(&mut self, image: &mut Image<'_>) -> Result<()> {
        let Some(extension) = image.header.bitmaps() else { return Ok(()) };
        let facts = ImageFacts {
            geometry: image.geometry,
            size: image.header.size & !511,
            file_len: image.file_clusters << image.geometry.cluster_bits(),
        };
        let at = crate::bitmaps::header::extension_at(&**image.file, image.geometry)?;
        if let Err(what) = bitmap_directory::check_place(extension, at, facts) {
            image.report.add(FindingKind::Bitmaps, what);
            return Ok(());
        }
        let start = extension.directory_offset;
        let by = Referrer { at: 0, field: "bitmap_directory_offset" };
        self.area(image, start, extension.directory_size, by);
        let mut bytes = vec![0; in_memory(extension.directory_size)];
        image.file.read(&mut bytes, start)?;
        let entries = match bitmap_directory::decode_directory(&bytes, start, extension.count) {
            Ok(entries) => entries,
            Err(what) => {
                image.report.add(FindingKind::Bitmaps, what);
                return Ok(());
            }
        };
        let mut broken = bitmap_directory::broken_set_rules(extension, &entries, image.geometry);
        for located in entries {
            let rules = located.entry.broken_rules(located.at, facts);
            let is_placed = rules.iter().all(|what: &Malformed| what.offset != located.at);
            broken.extend(rules);
            let by = Referrer { at: located.at, field: "bitmap_table_offset" };
            let (start, bytes) =
                (located.entry.table.0, u64::from(located.entry.table_entries) * 8);
            if is_placed && self.area(image, start, bytes, by) {
                self.bitmap_tables.push(Area { start, bytes, by });
            }
        }
        broken.into_iter().for_each(|what| image.report.add(FindingKind::Bitmaps, what));
        Ok(())
    }
}

impl Image<'_> {
    /// Finds a COPIED flag of the active image that does not agree with the stored refcount.
    pub(super) fn expect_copied(&mut self, host: u64, flag: bool, by: Referrer) -> Result<()> {
        let cluster = host >> self.geometry.cluster_bits();
        let count = self.refcounts.count(cluster)?;
        if !flag {
            self.report.note_uncopied(cluster);
        }
        if (count == 1) != flag {
            let problem = match flag {
                true => Problem::Other("has the COPIED flag, but the refcount is not one"),
                false => Problem::Other("lacks the COPIED flag, but the refcount is one"),
            };
            self.find(FindingKind::CopiedFlag, by, problem);
        }
        Ok(())
    }
}
