//! Writing guest data.

use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::cow::Composed;
use super::entries::{Target, after_write, target, units_touched};
use super::ranges::Mode;
use super::tables::{Table, lock};
use super::{Editor, POISONED};
use crate::allocate::Allocate;
use crate::error::{Error, Result};
use crate::in_memory;
use crate::layout::entry::L2Entry;
use crate::layout::units::{GuestOffset, HostOffset};
use crate::limits;
use crate::storage::StorageExt;

/// Consecutive clusters that are written by one call.
#[derive(Debug)]
struct Run {
    /// Position of the first one in its L2 table, and their number.
    first: u64,
    count: u64,
    host: HostOffset,
    /// Units of each that get content.
    written: u32,
    is_new: bool,
}

impl Editor {
    /// Writes all of `buf` at `at`, any alignment; the range must lie inside the disk. Not durable
    /// before the next [`sync`](Self::sync).
    ///
    /// An error leaves each sector of the range as it was or as written. When it came from the
    /// image's metadata, the editor refuses everything from then on; a failed write of data (no
    /// space, say) may be tried again.
    pub fn write_at(&self, buf: &[u8], at: GuestOffset) -> Result<()> {
        let range = self.inside(at, buf.len() as u64)?;
        self.change(range, |range| self.write_range(buf, range))
    }

    /// Runs a change of guest data with what must come before and after it.
    pub(super) fn change(
        &self,
        range: Range<u64>,
        work: impl FnOnce(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.refuse_poisoned()?;
        self.poison_on_error(self.mark.set(&*self.file))?;
        let (at, len) = (GuestOffset(range.start), range.end - range.start);
        let result = work(range);
        self.observe(at, len);
        result
    }

    /// Writes in steps that stay inside one L2 table.
    pub(super) fn write_range(&self, mut buf: &[u8], range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = self.step_end(at, range.end);
            let Some((step, rest)) = buf.split_at_checked(in_memory(end - at)) else { break };
            self.flush_if_due()?;
            let done = self.write_in_place(step, at)?;
            if let Some(left) = step.get(done..).filter(|left| !left.is_empty()) {
                self.write_mapping(left, at + done as u64)?;
            }
            (buf, at) = (rest, end);
        }
        Ok(())
    }

    /// Where a step from `at` towards `end` stops.
    pub(super) fn step_end(&self, at: u64, end: u64) -> u64 {
        let span = self.geometry.l2_span().max(1);
        let table_end = (at / span + 1).saturating_mul(span);
        // On a boundary, so that no sector is written in two pieces.
        let step_end = (at / limits::EDITOR_STEP_BYTES + 1) * limits::EDITOR_STEP_BYTES;
        end.min(table_end).min(step_end)
    }

    /// Writes what needs no change of the mapping, from the start of `buf` on. Answers how much.
    fn write_in_place(&self, buf: &[u8], at: u64) -> Result<usize> {
        let range = at..at.saturating_add(buf.len() as u64);
        let table = self.table(GuestOffset(at))?;
        let _range = self.ranges.lock(self.clusters_around(&range), Mode::Shared);
        let (first, entries) = self.entries_of(&table, &range)?;
        let mut done = 0;
        for run in self.runs(&entries, (first, &range)) {
            let (Target::InPlace(host), part) = run else { break };
            let bytes = in_memory(part.start - at)..in_memory(part.end - at);
            let into = self.geometry.in_cluster(part.start);
            self.data.write(buf.get(bytes.clone()).unwrap_or_default(), host.0 + into)?;
            done = bytes.end;
        }
        Ok(done)
    }

    /// Writes with changes of the mapping, under an exclusive lock.
    fn write_mapping(&self, buf: &[u8], at: u64) -> Result<()> {
        let range = at..at.saturating_add(buf.len() as u64);
        let table = self.table(GuestOffset(at))?;
        let _range = self.ranges.lock(self.clusters_around(&range), Mode::Exclusive);
        let (first, entries) = self.entries_of(&table, &range)?;
        for (target, part) in self.runs(&entries, (first, &range)) {
            let bytes = in_memory(part.start - at)..in_memory(part.end - at);
            let data = buf.get(bytes).unwrap_or_default();
            let into = self.geometry.in_cluster(part.start);
            let is_whole = into == 0 && self.geometry.in_cluster(part.end) == 0;
            match target {
                Target::InPlace(host) => self.data.write(data, host.0 + into)?,
                target if is_whole => self.write_whole(&table, data, (part.start, target))?,
                target => {
                    let index = in_memory(self.geometry.l2_index(GuestOffset(part.start)) - first);
                    let entry = entries.get(index).unwrap_or(&L2Entry::UNALLOCATED);
                    self.write_part((&table, entry), data, (part.start, target))?;
                }
            }
        }
        Ok(())
    }

    /// The entries that map a range inside one table, and the position of the first.
    pub(super) fn entries_of(
        &self,
        table: &Table,
        range: &Range<u64>,
    ) -> Result<(u64, Vec<L2Entry>)> {
        let first = self.geometry.l2_index(GuestOffset(range.start));
        let clusters = self.clusters_around(range);
        let count = (clusters.end - clusters.start) >> self.geometry.cluster_bits();
        Ok((first, self.tables.entries(table, first, count)?))
    }

    /// Cuts a range into runs that one write serves: clusters whose data goes to contiguous places
    /// in the same manner, or a single cluster that is written in part.
    fn runs(
        &self,
        entries: &[L2Entry],
        (first, range): (u64, &Range<u64>),
    ) -> Vec<(Target, Range<u64>)> {
        let g = self.geometry;
        let mut runs: Vec<(Target, Range<u64>)> = Vec::new();
        let base = g.cluster_start(range.start);
        debug_assert_eq!(g.l2_index(GuestOffset(base)), first);
        for (i, entry) in entries.iter().enumerate() {
            let cluster = base + ((i as u64) << g.cluster_bits());
            let start = range.start.max(cluster);
            let end = range.end.min(cluster + g.cluster_size());
            let found = target(entry, units_touched(g, start - cluster, end - cluster));
            if let Some((target, run)) = runs.last_mut()
                && self.joins((*target, run), found, end - start)
            {
                run.end = end;
            } else {
                runs.push((found, start..end));
            }
        }
        runs
    }

    fn joins(&self, (run, range): (Target, &Range<u64>), next: Target, next_len: u64) -> bool {
        let g = self.geometry;
        let distance = range.end - g.cluster_start(range.start);
        let is_whole = g.in_cluster(range.start) == 0 && next_len == g.cluster_size();
        match (run, next) {
            (Target::InPlace(a), Target::InPlace(b)) => a.0 + distance == b.0,
            (Target::SameHost(a), Target::SameHost(b)) => is_whole && a.0 + distance == b.0,
            (Target::NewHost, Target::NewHost) => is_whole,
            _ => false,
        }
    }

    /// Writes whole clusters, then maps them.
    fn write_whole(&self, table: &Table, buf: &[u8], (at, target): (u64, Target)) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let (mut buf, mut at) = (buf, at);
        while !buf.is_empty() {
            let wanted = buf.len() as u64 >> bits;
            let (host, count, is_new) = self.place(at, target, wanted)?;
            let (data, rest) = buf.split_at(in_memory(count << bits).min(buf.len()));
            let first = self.geometry.l2_index(GuestOffset(at));
            let run = Run { first, count, host, written: u32::MAX, is_new };
            let written = self.data.write(data, host.0);
            self.finish_run(table, run, written)?;
            (buf, at) = (rest, at + data.len() as u64);
        }
        Ok(())
    }

    /// Writes a part of a cluster together with what must stand around it, then maps it.
    fn write_part(
        &self,
        (table, entry): (&Table, &L2Entry),
        data: &[u8],
        (at, target): (u64, Target),
    ) -> Result<()> {
        let g = self.geometry;
        let cluster = GuestOffset(g.cluster_start(at));
        let moves = target == Target::NewHost;
        let composed = self.compose((cluster, entry), (g.in_cluster(at), data), moves)?;
        let (host, count, is_new) = self.place(cluster.0, target, 1)?;
        let Composed { units, .. } = composed;
        let run = Run { first: g.l2_index(cluster), count, host, written: units, is_new };
        let written = self.write_composed(&composed, host.0);
        self.finish_run(table, run, written)
    }

    /// Where up to `wanted` clusters from guest offset `at` on are written: the place, how many
    /// fit there, and whether it was allocated for them.
    fn place(&self, at: u64, target: Target, wanted: u64) -> Result<(HostOffset, u64, bool)> {
        match target {
            Target::InPlace(host) | Target::SameHost(host) => Ok((host, wanted, false)),
            // An external data file holds every cluster where the guest sees it.
            Target::NewHost if self.has_data_file() => Ok((HostOffset(at), wanted, false)),
            Target::NewHost => {
                let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
                let run = lock(&self.allocator).allocate_run(wanted);
                let (host, count) = self.poison_on_failed_write(run)?;
                Ok((host, count, true))
            }
        }
    }

    /// Maps a run whose data was written, or gives its clusters back where that failed.
    fn finish_run(&self, table: &Table, run: Run, written: Result<()>) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let mapped = written.and_then(|()| {
            self.remap(table, (run.first, run.count), |i, old| {
                after_write(&old, HostOffset(run.host.0 + (i << bits)), run.written)
            })
        });
        if mapped.is_err() && run.is_new {
            // A failure here leaks the clusters, which is allowed.
            let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
            let _ = lock(&self.allocator).free(run.host, run.count);
        }
        mapped
    }

    /// Changes entries of a table and gives back what they do not refer to any more, as one change
    /// that a flush sees whole or not at all.
    pub(super) fn remap(
        &self,
        table: &Table,
        (first, count): (u64, u64),
        change: impl Fn(u64, L2Entry) -> L2Entry,
    ) -> Result<()> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let updated = self.tables.update(table, (first, count), &self.allocator, change);
        let is_due = lock(&self.allocator).pending_frees() >= limits::MAX_PENDING_FREES;
        self.is_release_due.fetch_or(is_due, Ordering::Relaxed);
        self.poison_on_failed_write(updated)
    }

    pub(super) fn refuse_poisoned(&self) -> Result<()> {
        self.first_failure.check(|| self.file.name(), POISONED)
    }

    pub(super) fn poison_on_error<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|error| self.first_failure.note(error))
    }

    /// For metadata work that mostly reads: only a failed write makes the file unknown.
    pub(super) fn poison_on_failed_write<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|error| {
            if matches!(error, Error::Io { action: "write", .. }) {
                self.first_failure.note(error);
            }
        })
    }
}
