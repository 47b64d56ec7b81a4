//! Where an existing image's new clusters come from: its refcounts.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::refcounts::Refcounts;
use crate::allocate::Allocate;
use crate::error::{Error, Result};
use crate::first_failure::FirstFailure;
use crate::layout::entry::OFFSET_MASK;
use crate::layout::geometry::Geometry;
use crate::layout::header::Header;
use crate::layout::units::HostOffset;
use crate::limits;
use crate::storage::{Storage, StorageExt};

/// Header field `refcount_table_offset`, followed by `refcount_table_clusters`.
const HEADER_REFCOUNT_TABLE: u64 = 48;

/// Allocates and frees host clusters of an existing image by its refcounts.
///
/// The order that keeps a crash harmless is the caller's duty, in four steps:
///
/// 1. [`allocate`](Allocate::allocate) clusters and write their content.
/// 2. [`flush`](Allocator::flush): content and increments are durable. A crash so far leaks.
/// 3. Write what points at them, and drop what pointed at clusters given to
///    [`free`](Allocate::free). Sync the file.
/// 4. [`release`](Allocator::release): decrements become durable and freed clusters may be reused.
///
/// An increment is in the cache at once; a decrement waits for `release`, however early `free` was
/// called. Nothing is flushed on drop: clusters allocated since the last `flush` are then not even
/// leaked, and freed ones are.
///
/// The refcount table may move. The header *in the file* is kept right by [`flush`](Self::flush);
/// whoever holds a decoded [`Header`] and writes it back calls [`update`](Self::update) first.
#[derive(Debug)]
pub struct Allocator {
    file: Arc<dyn Storage>,
    geometry: Geometry,
    refcounts: Refcounts,
    /// No cluster below is free.
    first_free: u64,
    /// Runs given to `free`, first cluster and count, in no order; one decrement per mention.
    pending: Vec<Range<u64>>,
    pending_clusters: u64,
    table: TableState,
    /// The table is being moved: whatever that needs must fit it already.
    is_growing: bool,
    first_failure: FirstFailure,
}

/// What of the refcount table is newer in memory than in the file.
#[derive(Debug, PartialEq, Eq)]
enum TableState {
    Clean,
    /// These entries changed.
    Changed(Range<u64>),
    /// The table has a new place, and the header does not know.
    Moved,
}

impl Allocator {
    /// Walks all metadata and refuses a corrupt image: an allocator that trusts wrong refcounts
    /// overwrites what is in use. Costs what [`check`](crate::check::check) costs; writes nothing.
    ///
    /// `file` must not be written by others while the allocator lives, apart from clusters that it
    /// handed out and header fields other than those of the refcount table.
    pub fn open(file: Arc<dyn Storage>, header: &Header) -> Result<Self> {
        crate::check::refuse_unless_writable(&file, header)?;
        Ok(Self {
            geometry: header.geometry(),
            refcounts: Refcounts::open(file.clone(), header)?,
            file,
            first_free: 1,
            pending: Vec::new(),
            pending_clusters: 0,
            table: TableState::Clean,
            is_growing: false,
            first_failure: FirstFailure::default(),
        })
    }

    /// Allocates up to `max` contiguous clusters, at least one: the run at the first free cluster.
    /// For data, which need not be contiguous as tables must be.
    pub fn allocate_run(&mut self, max: u64) -> Result<(HostOffset, u64)> {
        self.refuse_poisoned()?;
        let run = self.try_allocate_run(max);
        self.poison_on_failed_write(run)
    }

    fn try_allocate_run(&mut self, max: u64) -> Result<(HostOffset, u64)> {
        loop {
            let start = self.refcounts.next_free(self.first_free)?;
            let run = self.refcounts.free_run(start, max.max(1))?.max(1);
            if !self.cover(start..start + run)? {
                self.first_free = start;
                return Ok((self.take(start..start + run)?, run));
            }
        }
    }

    /// The refcount of the cluster at `at` as mappings see it: increments counted, frees that are
    /// not released yet not subtracted.
    pub fn refcount(&mut self, at: HostOffset) -> Result<u64> {
        self.refcounts.count(at.0 >> self.geometry.cluster_bits())
    }

    /// Clusters given back and not yet released. Whoever frees much calls
    /// [`release`](Self::release) before this reaches [`limits::MAX_PENDING_FREES`].
    pub fn pending_frees(&self) -> u64 {
        self.pending_clusters
    }

    /// Copies the place of the refcount table into a decoded header.
    pub fn update(&self, header: &mut Header) {
        header.refcount_table_offset = self.refcounts.table_at().0;
        header.refcount_table_clusters = self.table_clusters();
    }

    /// Whether [`flush`](Self::flush) would write anything.
    pub(crate) fn has_changes(&self) -> bool {
        self.table != TableState::Clean || self.refcounts.is_dirty()
    }

    /// Makes every increment, and everything else written to the file before, durable. Afterwards
    /// mappings may point at the clusters allocated so far.
    pub fn flush(&mut self) -> Result<()> {
        self.refuse_poisoned()?;
        let result = self.try_flush();
        self.poison_on_error(result)
    }

    fn try_flush(&mut self) -> Result<()> {
        self.refcounts.write_blocks()?;
        if self.table != TableState::Clean {
            // A table entry must not become durable before the block it points at.
            self.file.make_durable()?;
        }
        match std::mem::replace(&mut self.table, TableState::Clean) {
            TableState::Clean => {}
            TableState::Changed(entries) => {
                let bytes = self.refcounts.table_bytes(entries.start, entries.end);
                self.file.write(&bytes, self.refcounts.table_at().0 + entries.start * 8)?;
            }
            TableState::Moved => {
                let bytes = self.refcounts.table_bytes(0, self.refcounts.table_len());
                self.file.write(&bytes, self.refcounts.table_at().0)?;
                self.file.make_durable()?;
                let mut field = self.refcounts.table_at().0.to_be_bytes().to_vec();
                field.extend(self.table_clusters().to_be_bytes());
                self.file.write(&field, HEADER_REFCOUNT_TABLE)?;
            }
        }
        self.file.make_durable()
    }

    /// Makes the decrements of all frees so far durable; afterwards the clusters may be reused,
    /// and those that nothing refers to are given back to the file system. Everything that pointed
    /// at them must be durably gone. Flushes first where there is something to flush.
    pub fn release(&mut self) -> Result<()> {
        self.refuse_poisoned()?;
        if self.has_changes() {
            self.flush()?;
        }
        if self.pending.is_empty() {
            return Ok(());
        }
        let result = self.try_release();
        self.poison_on_error(result)
    }

    fn try_release(&mut self) -> Result<()> {
        let mut pending = std::mem::take(&mut self.pending);
        self.pending_clusters = 0;
        pending.sort_unstable_by_key(|run| run.start);
        // Runs of clusters that nothing refers to any more, by first cluster.
        let mut unused: BTreeMap<u64, u64> = BTreeMap::new();
        for cluster in pending.into_iter().flatten() {
            let count = self.refcounts.count(cluster)?;
            let Some(less) = count.checked_sub(1) else {
                return Err(self.refused(format!(
                    "the cluster at {:#x} was to be freed once more than it is referred to",
                    cluster << self.geometry.cluster_bits()
                )));
            };
            self.refcounts.set(cluster, less)?;
            if less == 0 {
                match unused.last_entry() {
                    Some(mut run) if *run.key() + *run.get() == cluster => *run.get_mut() += 1,
                    _ => drop(unused.insert(cluster, 1)),
                }
            }
        }
        self.refcounts.write_blocks()?;
        self.file.make_durable()?;
        for (start, count) in unused {
            self.first_free = self.first_free.min(start);
            let bits = self.geometry.cluster_bits();
            // Only a hint to the file system; the clusters are free whether it is taken or not.
            if let Err(error) = self.file.discard(start << bits, count << bits) {
                tracing::debug!(%error, "freed clusters could not be given back");
            }
        }
        Ok(())
    }

    /// Makes sure that refcount blocks cover the run. Answers whether it had to add one: the run
    /// may not be free any more then.
    fn cover(&mut self, run: Range<u64>) -> Result<bool> {
        let last = run.end.saturating_sub(1);
        if last > OFFSET_MASK >> self.geometry.cluster_bits() {
            return Err(self.refused("no host offset is left for a new cluster".into()));
        }
        let (first_block, _) = self.refcounts.position(run.start);
        let (last_block, _) = self.refcounts.position(last);
        if last_block >= self.refcounts.table_len() {
            self.grow_table(last_block + 1)?;
            return Ok(true);
        }
        for index in first_block..=last_block {
            if self.refcounts.block_in_file(index)?.is_none() {
                self.add_block(index)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Adds a refcount block: in a cluster that existing blocks cover, else as the first cluster
    /// of those it covers itself.
    fn add_block(&mut self, index: u64) -> Result<()> {
        let own = index * self.geometry.refcounts_per_block();
        let free = self.refcounts.next_free(self.first_free)?;
        let (covering, _) = self.refcounts.position(free);
        let is_covered = covering < self.refcounts.table_len()
            && self.refcounts.block_in_file(covering)?.is_some();
        let cluster = if is_covered { free } else { own };
        self.file.make_room(self.offset(cluster).0, self.geometry.cluster_size())?;
        self.refcounts.insert_block(index, self.offset(cluster))?;
        self.refcounts.set(cluster, 1)?;
        self.table = match std::mem::replace(&mut self.table, TableState::Moved) {
            TableState::Clean => TableState::Changed(index..index + 1),
            TableState::Changed(r) => TableState::Changed(r.start.min(index)..r.end.max(index + 1)),
            TableState::Moved => TableState::Moved,
        };
        Ok(())
    }

    /// Moves the refcount table to a longer place, with at least `entries` entries.
    fn grow_table(&mut self, entries: u64) -> Result<()> {
        let old_at = self.refcounts.table_at();
        let old_clusters = u64::from(self.table_clusters());
        let per_block = self.geometry.refcounts_per_block().max(1);
        let per_cluster = self.geometry.cluster_size() / 8;
        // Half as much again, so that moves stay rare; and room for the table's own clusters and
        // the blocks that count them, so that placing it does not make it grow.
        let wanted = entries + entries / 2;
        let own = wanted.div_ceil(per_cluster) + 1;
        let wanted = wanted + 2 * own.div_ceil(per_block) + 2;
        let clusters = wanted.div_ceil(per_cluster);
        if clusters << self.geometry.cluster_bits() > limits::MAX_REFCOUNT_TABLE_BYTES {
            return Err(self.refused("its refcount table cannot grow any further".into()));
        }
        if std::mem::replace(&mut self.is_growing, true) {
            return Err(self.refused("its refcount table has no room for itself".into()));
        }
        self.refcounts.lengthen_table(clusters * per_cluster);
        let placed = self.place(clusters);
        self.is_growing = false;
        let at = self.poison_on_error(placed)?;
        self.refcounts.move_table(at);
        self.table = TableState::Moved;
        self.push_free(old_at, old_clusters);
        Ok(())
    }

    /// Finds and takes `clusters` contiguous clusters.
    fn place(&mut self, clusters: u64) -> Result<HostOffset> {
        let mut start = self.refcounts.next_free(self.first_free)?;
        self.first_free = start;
        loop {
            let run = self.refcounts.free_run(start, clusters)?;
            if run < clusters {
                start = self.refcounts.next_free(start + run.max(1))?;
            } else if self.cover(start..start + clusters)? {
                start = self.refcounts.next_free(self.first_free)?;
            } else {
                return self.take(start..start + clusters);
            }
        }
    }

    /// Counts one reference to each cluster of a free, covered run.
    fn take(&mut self, run: Range<u64>) -> Result<HostOffset> {
        for cluster in run.clone() {
            if !self.refcounts.set(cluster, 1)? {
                return Err(self.refused("no refcount block covers a new cluster".into()));
            }
        }
        if self.first_free == run.start {
            self.first_free = run.end;
        }
        Ok(self.offset(run.start))
    }

    fn push_free(&mut self, at: HostOffset, clusters: u64) {
        let start = at.0 >> self.geometry.cluster_bits();
        self.pending_clusters += clusters;
        match self.pending.last_mut() {
            Some(last) if last.end == start => last.end += clusters,
            _ => self.pending.push(start..start + clusters),
        }
    }

    fn offset(&self, cluster: u64) -> HostOffset {
        HostOffset(cluster << self.geometry.cluster_bits())
    }

    fn table_clusters(&self) -> u32 {
        let bytes = self.refcounts.table_len() * 8;
        u32::try_from(self.geometry.clusters_for(bytes)).unwrap_or(u32::MAX)
    }

    fn refused(&self, reason: String) -> Error {
        Error::Refused { file: self.file.name(), reason }
    }

    fn refuse_poisoned(&self) -> Result<()> {
        self.first_failure.check(|| self.file.name(), super::POISONED)
    }

    /// An eviction writes a block wherever a cluster is looked for.
    fn poison_on_failed_write<T>(&mut self, result: Result<T>) -> Result<T> {
        result.inspect_err(|error| {
            if matches!(error, Error::Io { action: "write", .. }) {
                self.first_failure.note(error);
            }
        })
    }

    fn poison_on_error<T>(&mut self, result: Result<T>) -> Result<T> {
        result.inspect_err(|error| self.first_failure.note(error))
    }
}

impl Allocate for Allocator {
    fn allocate(&mut self, clusters: u64) -> Result<HostOffset> {
        self.refuse_poisoned()?;
        let at = self.place(clusters.max(1));
        self.poison_on_failed_write(at)
    }

    fn free(&mut self, at: HostOffset, clusters: u64) -> Result<()> {
        self.refuse_poisoned()?;
        if !self.geometry.is_cluster_aligned(at) || at.0 == 0 {
            return Err(self.refused(format!("{at} is not a cluster that can be freed")));
        }
        if clusters > 0 {
            self.push_free(at, clusters);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Allocator::flush(self)
    }

    fn release(&mut self) -> Result<()> {
        Allocator::release(self)
    }
}
