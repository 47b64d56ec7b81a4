//! Guest ranges to extents. qcow2 spec, "Cluster mapping".

use format_spec::{Malformed, Problem};

use super::Image;
use super::cache::Slice;
use crate::error::Result;
use crate::layout::entry::{CompressedEntry, L1Entry, L2Entry, StandardEntry};
use crate::layout::geometry::Geometry;
use crate::layout::units::{GuestOffset, HostOffset};
use crate::limits;
use crate::preflight::words;
use crate::storage::StorageExt;

/// How a stretch of one layer reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// Stored content.
    Data,
    /// Reads as zero because this layer says so, or because its file has a hole there.
    Zero,
    /// Stored compressed.
    Compressed,
    /// Not in this layer: what is below shows.
    Unallocated,
}

/// A stretch of one layer of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerExtent {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// How it reads.
    pub kind: LayerKind,
    /// Where it stands in the file that holds guest data, contiguously: data, and zeroes that have
    /// room allocated.
    pub host: Option<HostOffset>,
}

impl LayerExtent {
    /// Whether `next`, which follows in the guest, continues this extent.
    pub(crate) fn joins(&self, next: &Self) -> bool {
        let follows = self.host.map(|h| h.0.saturating_add(self.len)) == next.host.map(|h| h.0);
        self.kind == next.kind && follows
    }
}

/// A stretch that grows while what follows is of the same kind.
struct Run {
    extent: Option<LayerExtent>,
}

impl Run {
    /// Adds what follows; `false` when it does not belong to the run any more.
    fn push(&mut self, next: LayerExtent) -> bool {
        match &mut self.extent {
            None => self.extent = Some(next),
            Some(extent) if extent.joins(&next) => extent.len = extent.len.saturating_add(next.len),
            Some(_) => return false,
        }
        true
    }
}

/// Where in a table an entry stands, for error messages and for the next one.
#[derive(Clone, Copy)]
struct Position {
    table: HostOffset,
    index: u64,
}

impl Image {
    /// The extent that starts at `at`, at most `max_len` bytes (which must not be zero), merged
    /// over clusters and L2 tables as far as it goes; a limit on tables read per call may end it
    /// sooner. Beyond the end of the disk everything is unallocated.
    ///
    /// An entry that breaks the format is an error for the range that starts in it; what comes
    /// before it in the range asked for is answered first.
    pub fn extent(&self, at: GuestOffset, max_len: u64) -> Result<LayerExtent> {
        let found = self.mapped(at, max_len)?;
        let (LayerKind::Data, Some(host)) = (found.kind, found.host) else { return Ok(found) };
        // Preallocated clusters are mapped before they are written: the file knows better.
        let run = self.data_file()?.run(host.0, found.len)?;
        let kind = if run.is_hole { LayerKind::Zero } else { LayerKind::Data };
        Ok(LayerExtent { len: run.len, kind, ..found })
    }

    /// [`extent`](Self::extent) by the tables alone.
    pub(crate) fn mapped(&self, at: GuestOffset, max_len: u64) -> Result<LayerExtent> {
        let end = at.0.saturating_add(max_len).min(self.virtual_size());
        if at.0 >= end {
            return Ok(LayerExtent { len: max_len, kind: LayerKind::Unallocated, host: None });
        }
        let (mut run, mut pos, mut slices) = (Run { extent: None }, at.0, 0);
        while pos < end && slices < limits::MAX_SLICES_PER_EXTENT {
            match self.extend_run(&mut run, pos, end) {
                Ok(Step::Ended) => break,
                Ok(Step::Empty { reached }) => pos = reached,
                Ok(Step::Slice { reached }) => {
                    pos = reached;
                    slices += 1;
                }
                Err(_) if run.extent.is_some() => break,
                Err(e) => return Err(e),
            }
        }
        let none = LayerExtent { len: end - at.0, kind: LayerKind::Unallocated, host: None };
        Ok(run.extent.unwrap_or(none))
    }

    /// Adds to `run` what one L1 entry without a table, or one slice of a table, maps from `pos`
    /// on.
    fn extend_run(&self, run: &mut Run, pos: u64, end: u64) -> Result<Step> {
        let g = self.geometry;
        let span = g.l2_span();
        let span_end = (pos / span).saturating_add(1).saturating_mul(span).min(end);
        let Some(table) = self.table_of(GuestOffset(pos))? else {
            let (kind, host) = (LayerKind::Unallocated, None);
            let is_same = run.push(LayerExtent { len: span_end - pos, kind, host });
            return Ok(if is_same { Step::Empty { reached: span_end } } else { Step::Ended });
        };
        let first = g.l2_index(GuestOffset(pos));
        let (slice, slice_start) = self.slice_of(table, first)?;
        let slice_left = slice_entries(g).saturating_sub(first - slice_start);
        let slice_end = (g.cluster_start(pos)).saturating_add(slice_left << g.cluster_bits());
        let stop = slice_end.min(span_end);
        let mut pos = pos;
        while pos < stop {
            let position = Position { table, index: g.l2_index(GuestOffset(pos)) };
            let entry = self.entry_in(&slice, slice_start, position)?;
            let piece = piece_at(&entry, g, g.in_cluster(pos));
            self.check_inside(&entry, piece.kind, position)?;
            let more = self.alike(&slice, slice_start, position, piece.kind) << g.cluster_bits();
            let len = piece.len.saturating_add(more).min(stop - pos);
            let piece = LayerExtent { len, ..piece };
            if !run.push(piece) {
                return Ok(Step::Ended);
            }
            pos = pos.saturating_add(piece.len);
        }
        Ok(Step::Slice { reached: stop })
    }

    /// How many entries right behind `position` map on as it does: nothing, or one host cluster
    /// after the other. Long runs are nearly all of most tables, so they are compared word by word;
    /// the last entry is then checked for all, since offsets only grow on the way to it.
    fn alike(&self, slice: &[u64], slice_start: u64, position: Position, kind: LayerKind) -> u64 {
        let step = match kind {
            LayerKind::Data => self.geometry.cluster_size(),
            LayerKind::Unallocated => 0,
            LayerKind::Zero | LayerKind::Compressed => return 0,
        };
        let first = usize::try_from(position.index - slice_start).unwrap_or(usize::MAX);
        let Some([head, rest @ ..]) = slice.get(first..) else { return 0 };
        if self.geometry.has_subclusters() || (step == 0 && *head != 0) {
            return 0;
        }
        let steps = (1..).map(|n: u64| head.wrapping_add(n.wrapping_mul(step)));
        let count = rest.iter().zip(steps).take_while(|(word, expected)| *word == expected).count();
        let last = Position { index: position.index.saturating_add(count as u64), ..position };
        let check = |entry| self.check_inside(&entry, kind, last);
        match self.entry_in(slice, slice_start, last).and_then(check) {
            Ok(()) => count as u64,
            Err(_) => 0,
        }
    }

    /// The compressed cluster that holds `at`, where it is one.
    pub(super) fn compressed_at(&self, at: GuestOffset) -> Result<Option<CompressedEntry>> {
        let Some(table) = self.table_of(at)? else { return Ok(None) };
        let position = Position { table, index: self.geometry.l2_index(at) };
        let (slice, slice_start) = self.slice_of(table, position.index)?;
        let entry = self.entry_in(&slice, slice_start, position)?;
        Ok(match entry {
            L2Entry::Compressed(compressed) => {
                self.check_inside(&entry, LayerKind::Compressed, position)?;
                Some(compressed)
            }
            L2Entry::Standard(_) => None,
        })
    }

    /// The L2 table that maps `at`.
    fn table_of(&self, at: GuestOffset) -> Result<Option<HostOffset>> {
        let index = self.geometry.l1_index(at);
        let raw = usize::try_from(index).ok().and_then(|i| self.l1.get(i)).copied().unwrap_or(0);
        if raw == 0 {
            return Ok(None);
        }
        let entry_at = self.header.l1_table_offset.saturating_add(index.saturating_mul(8));
        let malformed = |what| self.file.malformed(what);
        let table = L1Entry::decode(raw, self.geometry, entry_at).map_err(malformed)?.table;
        if let Some(HostOffset(offset)) = table
            && !self.file_end.holds(&*self.file, offset)?
        {
            let max = self.file.length()?.saturating_sub(1);
            let problem = Problem::OutOfRange { value: offset, min: 0, max };
            return Err(malformed(Malformed::new(entry_at, "l1_entry", problem)));
        }
        Ok(table)
    }

    /// The slice of `table` that holds entry `index`, and the index of its first entry. Entries
    /// beyond the end of the file are missing from it.
    fn slice_of(&self, table: HostOffset, index: u64) -> Result<(Slice, u64)> {
        let g = self.geometry;
        let start = index - index % slice_entries(g);
        let at = table.0.saturating_add(start.saturating_mul(g.l2_entry_size()));
        if let Some(slice) = self.shared.tables.find(self.layer, at) {
            return Ok((slice, start));
        }
        let len = slice_entries(g).saturating_mul(g.l2_entry_size());
        let inside = self.file.length()?.saturating_sub(at).min(len);
        let mut raw = vec![0; usize::try_from(inside).unwrap_or(0)];
        self.file.read(&mut raw, at)?;
        let slice: Slice = words(&raw).collect();
        self.shared.tables.keep(self.layer, at, slice.clone());
        Ok((slice, start))
    }

    fn entry_in(&self, slice: &[u64], slice_start: u64, position: Position) -> Result<L2Entry> {
        let g = self.geometry;
        let words_per_entry = if g.has_subclusters() { 2 } else { 1 };
        let first = usize::try_from(position.index - slice_start).unwrap_or(usize::MAX);
        let first = first.saturating_mul(words_per_entry);
        let raw = slice.get(first).copied();
        let bitmap = if g.has_subclusters() { slice.get(first + 1).copied() } else { Some(0) };
        let at = self.entry_offset(position);
        let (Some(raw), Some(bitmap)) = (raw, bitmap) else {
            let problem = Problem::Truncated { needed: g.l2_entry_size(), left: 0 };
            return Err(self.file.malformed(Malformed::new(at, "l2_entry", problem)));
        };
        if raw == 0 && bitmap == 0 {
            return Ok(L2Entry::UNALLOCATED);
        }
        L2Entry::decode(raw, bitmap, g, self.has_data_file(), at)
            .map_err(|what| self.file.malformed(what))
    }

    fn entry_offset(&self, Position { table, index }: Position) -> u64 {
        table.0.saturating_add(index.saturating_mul(self.geometry.l2_entry_size()))
    }

    /// An entry's host cluster must start inside the file and behind the header: what is cut off is
    /// an error and not zeroes. The tail of the last cluster may be missing, and reads as zero.
    fn check_inside(&self, entry: &L2Entry, kind: LayerKind, position: Position) -> Result<()> {
        let wrong = |problem| {
            Err(self.file.malformed(Malformed::new(
                self.entry_offset(position),
                "l2_entry",
                problem,
            )))
        };
        let (offset, min) = match (entry, kind) {
            (L2Entry::Compressed(_), _) if self.has_data_file() => {
                return wrong(Problem::Other("is compressed in an image with a data file"));
            }
            (L2Entry::Compressed(c), _) => (c.offset.0, self.geometry.cluster_size()),
            (L2Entry::Standard(_), LayerKind::Zero) if self.header.version < 3 => {
                return wrong(Problem::Other("reads as zero, which version 2 does not know"));
            }
            (L2Entry::Standard(StandardEntry { cluster: Some(host), .. }), LayerKind::Data) => {
                (host.0, 0)
            }
            _ => return Ok(()),
        };
        let (file, end) = match (self.data(), self.has_data_file()) {
            (Some(data), true) => (data, &self.data_end),
            (_, false) => (&self.file, &self.file_end),
            // Metadata can be looked at without the data file; reads say that it is missing.
            (None, true) => return Ok(()),
        };
        if offset >= min && end.holds(&**file, offset)? {
            return Ok(());
        }
        let max = file.length()?.saturating_sub(1);
        wrong(Problem::OutOfRange { value: offset, min, max })
    }
}

/// What one step along the tables came to.
enum Step {
    /// What follows is of another kind.
    Ended,
    /// No table here.
    Empty { reached: u64 },
    /// One slice was read through.
    Slice { reached: u64 },
}

/// Entries in a slice: a whole table where clusters are small.
fn slice_entries(g: Geometry) -> u64 {
    g.cluster_size().min(limits::L2_SLICE_BYTES) / g.l2_entry_size().max(1)
}

/// What an entry maps from `into` its cluster on, as long as it is of one kind.
pub(crate) fn piece_at(entry: &L2Entry, g: Geometry, into: u64) -> LayerExtent {
    let left = g.cluster_size().saturating_sub(into);
    match entry {
        L2Entry::Compressed(_) => {
            LayerExtent { len: left, kind: LayerKind::Compressed, host: None }
        }
        L2Entry::Standard(standard) => {
            let (kind, same) = kind_at(standard, into / g.subcluster_size().max(1));
            let run = u64::from(same.trailing_ones()).max(1);
            let first = into / g.subcluster_size().max(1);
            let run_end = first.saturating_add(run).saturating_mul(g.subcluster_size());
            let host = match kind {
                LayerKind::Unallocated => None,
                _ => standard.cluster.map(|c| HostOffset(c.0.saturating_add(into))),
            };
            LayerExtent { len: run_end.saturating_sub(into).min(left), kind, host }
        }
    }
}

/// The kind of a subcluster, and a mask of the subclusters from it on that are of the same kind.
fn kind_at(standard: &StandardEntry, subcluster: u64) -> (LayerKind, u32) {
    let masks = standard.subclusters;
    let shift = u32::try_from(subcluster).unwrap_or(0).min(31);
    let from_here = |mask: u32| mask >> shift;
    if from_here(masks.zero) & 1 == 1 {
        (LayerKind::Zero, from_here(masks.zero))
    } else if from_here(masks.allocated) & 1 == 1 {
        (LayerKind::Data, from_here(masks.allocated))
    } else {
        (LayerKind::Unallocated, from_here(!(masks.zero | masks.allocated)))
    }
}
