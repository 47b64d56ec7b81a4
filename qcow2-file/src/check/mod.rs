//! A walk over every reference in an image, held against its refcounts.
//!
//! What it finds: leaked clusters, references without a count, metadata that overlaps something,
//! wrong COPIED flags, references past the end of the file, and structures that break the format.
//! It agrees with `qemu-img check` on whether an image is clean, leaking or corrupt, and is
//! stricter where metadata overlaps with counts that match. It does not repair, and does not read
//! guest data. [`reclaim`] gives leaked clusters back.
//!
//! Cost: each table is read once per pass. One pass covers [`limits::CHECK_COUNTS_BYTES`] of
//! counts, 2^26 clusters, so a full disk of 16 TiB at 64 KiB clusters takes five passes over 2 GiB
//! of tables. Besides the counts it holds one entry per L2 table, the refcount table, a cache of
//! [`limits::REFCOUNT_CACHE_BYTES`], and the bitmap directory. Tables in holes of the file are not
//! read.

mod compare;
mod counts;
mod reclaim;
mod roots;
mod walk;

use std::ops::Range;
use std::sync::Arc;

use format_spec::{Malformed, Problem};

use crate::bitmaps::header::refuse_marked;
use crate::edit::Refcounts;
use crate::error::{Error, Result};
use crate::layout::geometry::Geometry;
use crate::layout::header::Header;
use crate::limits;
use crate::storage::{Storage, StorageExt};
use counts::{Counts, Referrer};
use roots::Roots;

pub use reclaim::reclaim;

/// What kind of mistake a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FindingKind {
    /// A cluster is counted more often than it is referred to. Wastes space, endangers nothing.
    Leak,
    /// A cluster is counted less often than it is referred to: it would be handed out again.
    Refcount,
    /// A structure shares a cluster with something else.
    Overlap,
    /// A reference points past the end of the file.
    PastEnd,
    /// A COPIED flag does not agree with the refcount: a write would change a snapshot, or not.
    CopiedFlag,
    /// A field breaks the format.
    Structure,
    /// The bitmap directory or a bitmap table breaks the format. What it would have referred to
    /// shows as leaked, so clusters can still be allocated safely.
    Bitmaps,
}

/// One mistake: which field of the file is wrong, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What kind it is.
    pub kind: FindingKind,
    /// The field, its offset in the file, and what is wrong with it.
    pub what: Malformed,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// The findings, at most [`limits::MAX_CHECK_FINDINGS`] leaks and as many others.
    pub findings: Vec<Finding>,
    /// Clusters that are leaked.
    pub leaks: u64,
    /// Findings that are not leaks.
    pub corruptions: u64,
    /// The most telling finding of those that make writing dangerous.
    unsafe_finding: Option<(FindingKind, Malformed)>,
    /// Clusters that are counted and that nobody refers to, as far as there was room.
    unreferenced: Vec<Range<u64>>,
    /// Clusters that are counted more often than they are referred to, and how often that is; as
    /// far as there was room.
    overcounted: Vec<(u64, u64)>,
    /// Clusters that the active image refers to without the COPIED flag, in no order.
    uncopied: Vec<Range<u64>>,
    /// Whether there was no room for all of those.
    has_more_uncopied: bool,
}

impl CheckReport {
    /// Whether nothing was found at all.
    pub fn is_clean(&self) -> bool {
        self.leaks == 0 && self.corruptions == 0
    }

    /// Whether anything but leaks was found.
    pub fn is_corrupt(&self) -> bool {
        self.corruptions > 0
    }

    fn note_overcounted(&mut self, cluster: u64, references: u64) {
        if references == 0 {
            note(&mut self.unreferenced, cluster);
        } else if self.overcounted.len() < limits::MAX_UNREFERENCED_RUNS {
            self.overcounted.push((cluster, references));
        }
    }

    fn note_uncopied(&mut self, cluster: u64) {
        self.has_more_uncopied |= !note(&mut self.uncopied, cluster);
    }

    /// The counts that can be lowered to what was found: all but those that would become one where
    /// the active image does not say so by a flag.
    fn lowered(&mut self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.uncopied.sort_unstable_by_key(|run| run.start);
        let this = &*self;
        let stays = move |cluster: u64| {
            let behind = this.uncopied.partition_point(|run| run.start <= cluster);
            let run = behind.checked_sub(1).and_then(|last| this.uncopied.get(last));
            this.has_more_uncopied || run.is_some_and(|run| cluster < run.end)
        };
        let unreferenced = this.unreferenced.iter().cloned().flatten().map(|cluster| (cluster, 0));
        let overcounted = this.overcounted.iter().copied();
        unreferenced.chain(overcounted.filter(move |(at, count)| *count != 1 || !stays(*at)))
    }

    fn add(&mut self, kind: FindingKind, what: Malformed) {
        let count = match kind {
            FindingKind::Leak => &mut self.leaks,
            _ => &mut self.corruptions,
        };
        *count += 1;
        let is_described = *count <= limits::MAX_CHECK_FINDINGS as u64;
        // A wrong flag is mostly the consequence of a wrong count, which then says more.
        let is_told = match &self.unsafe_finding {
            None => false,
            Some((told, _)) => *told != FindingKind::CopiedFlag || kind == *told,
        };
        if !is_told && !matches!(kind, FindingKind::Leak | FindingKind::Bitmaps) {
            self.unsafe_finding = Some((kind, what.clone()));
        }
        if is_described {
            self.findings.push(Finding { kind, what });
        }
    }
}

/// Adds a cluster to runs that are bounded. Answers whether there was room.
fn note(runs: &mut Vec<Range<u64>>, cluster: u64) -> bool {
    let has_room = runs.len() < limits::MAX_UNREFERENCED_RUNS;
    match runs.last_mut() {
        Some(last) if last.end == cluster => last.end += 1,
        _ if has_room => runs.push(cluster..cluster + 1),
        _ => return false,
    }
    true
}

/// Walks all metadata of the image whose decoded header is `header`. Writes nothing. The file must
/// not change meanwhile. Fails only where the file cannot be read or the walk would go beyond its
/// bounds; mistakes of the image are findings.
pub fn check(file: &Arc<dyn Storage>, header: &Header) -> Result<CheckReport> {
    let mut image = Image {
        refcounts: Refcounts::open(file.clone(), header)?,
        geometry: header.geometry(),
        file_clusters: header.geometry().clusters_for(file.length()?),
        report: CheckReport::default(),
        file,
        header,
    };
    let roots = Roots::collect(&mut image)?;
    let mut from = 0;
    for pass in 0..limits::MAX_CHECK_PASSES {
        let mut counts = Counts::new(from);
        walk::count_references(&mut image, &roots, &mut counts, pass == 0)?;
        let window = counts.finish();
        if counts.is_full {
            return Err(image.unsupported("so many references to the same clusters"));
        }
        compare::compare(&mut image, &counts, window.clone())?;
        if window.end == u64::MAX {
            return Ok(image.report);
        }
        from = window.end;
    }
    Err(image.unsupported("a map scattered so far over its file"))
}

/// Refuses an image that must not be written to, naming the first mistake: a corrupt one, and one
/// whose refcounts are known to be out of date. Leaks are no reason.
pub(crate) fn refuse_unless_writable(file: &Arc<dyn Storage>, header: &Header) -> Result<()> {
    refuse_marked(&**file, header)?;
    match check(file, header)?.unsafe_finding {
        Some((_, what)) => Err(file.malformed(what)),
        None => Ok(()),
    }
}

/// An image being checked.
struct Image<'a> {
    file: &'a Arc<dyn Storage>,
    header: &'a Header,
    geometry: Geometry,
    refcounts: Refcounts,
    /// Clusters of the file, a part of one at the end included.
    file_clusters: u64,
    report: CheckReport,
}

impl Image<'_> {
    fn find(&mut self, kind: FindingKind, by: Referrer, problem: Problem) {
        self.report.add(kind, Malformed::new(by.at, by.field, problem));
    }

    fn unsupported(&self, feature: &str) -> Error {
        Error::Unsupported { file: self.file.name(), feature: feature.into() }
    }

    /// Whether `bytes` from `start` lie in the file, a part of a cluster at its end left aside.
    fn is_inside(&self, start: u64, bytes: u64) -> bool {
        let end = start.saturating_add(bytes.max(1) - 1) >> self.geometry.cluster_bits();
        end < self.file_clusters
    }

    /// Finds a reference to bytes past the end of the file. Answers whether there was none.
    fn expect_inside(&mut self, start: u64, bytes: u64, by: Referrer) -> bool {
        let is_inside = self.is_inside(start, bytes);
        if !is_inside {
            let max = self.file_clusters << self.geometry.cluster_bits();
            let problem = Problem::OutOfRange { value: start, min: 0, max };
            self.find(FindingKind::PastEnd, by, problem);
        }
        is_inside
    }

    /// Reads a piece of metadata, unless it is a hole and thus all zero.
    fn read_unless_hole(&self, buf: &mut [u8], at: u64) -> Result<bool> {
        if self.is_hole_of(at, buf.len() as u64)? {
            return Ok(false);
        }
        self.file.read(buf, at)?;
        Ok(true)
    }

    /// Whether the cluster at `at` is a hole.
    fn is_hole(&self, at: u64) -> Result<bool> {
        self.is_hole_of(at, self.geometry.cluster_size())
    }

    fn is_hole_of(&self, at: u64, len: u64) -> Result<bool> {
        let run = self.file.run_at(at, len).map_err(|e| self.file.io_error("read", at, e))?;
        Ok(run.is_hole && run.len >= len)
    }
}
