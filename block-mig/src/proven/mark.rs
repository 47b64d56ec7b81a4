//! The mark of a unit: where its content stands, and how often that was written.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use format_spec::content_hash::Node;
use mig_core::Result;
use mig_core::block::Extent;
use qcow2_file::storage::Writes;

/// Answers where the content at an offset stands, at most so many bytes of it.
pub(super) type Places<'a> = dyn Fn(u64, u64) -> Result<Extent> + Sync + 'a;

/// The mark of `range`, by these tables and counts as they are now: equal marks mean equal places
/// that were not written in between. `None` where nothing is stored, or it cannot be told where.
///
/// It is kept like a node, and is none of those that mean something.
pub(super) fn mark(
    range: &Range<u64>,
    places: &Places<'_>,
    writes: &Writes,
) -> Result<Option<Node>> {
    let mut hasher = DefaultHasher::new();
    let mut counts: Vec<u16> = Vec::new();
    let mut run: Option<Run> = None;
    let (mut at, mut is_stored) = (range.start, false);
    while at < range.end {
        let extent = places(at, range.end - at)?;
        let len = extent.len.clamp(1, range.end - at);
        let host = if extent.kind.reads_as_zero() { None } else { extent.host };
        if let Some(host) = host {
            is_stored = true;
            if !writes.collect(host..host.saturating_add(len), &mut counts) {
                return Ok(None);
            }
        } else if !extent.kind.reads_as_zero() {
            return Ok(None);
        }
        let next = Run { at, len, host };
        run = match run {
            Some(run) if run.joins(&next) => Some(Run { len: run.len.saturating_add(len), ..run }),
            ended => {
                ended.hash(&mut hasher);
                Some(next)
            }
        };
        at = at.saturating_add(len);
    }
    run.hash(&mut hasher);
    counts.hash(&mut hasher);
    let mut mark = [0x4d; 32];
    if let Some(hashed) = mark.first_chunk_mut() {
        *hashed = hasher.finish().to_le_bytes();
    }
    Ok(is_stored.then_some(mark))
}

/// A stretch that stands in one piece; without a place it reads as zero.
#[derive(Clone, Copy, Hash)]
struct Run {
    at: u64,
    len: u64,
    host: Option<u64>,
}

impl Run {
    fn joins(&self, next: &Self) -> bool {
        self.host.map(|host| host.saturating_add(self.len)) == next.host
    }
}
