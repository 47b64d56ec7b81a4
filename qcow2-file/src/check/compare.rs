//! Holds what was counted against what is stored.

use std::ops::Range;

use format_spec::{Malformed, Problem};

use super::counts::{CHUNK_CLUSTERS, Counts};
use super::{FindingKind, Image};
use crate::error::Result;
use crate::in_memory;
use crate::layout::refcount::refcount_at;

/// Compares the chunks of the window, and reports overlaps in it.
pub(super) fn compare(image: &mut Image<'_>, counts: &Counts, window: Range<u64>) -> Result<()> {
    for (cluster, by) in counts.overlaps() {
        let value = cluster << image.geometry.cluster_bits();
        let problem = if value == 0 {
            Problem::Other("points at the header")
        } else {
            Problem::Other("shares a cluster with other metadata, or is data inside metadata")
        };
        image.find(FindingKind::Overlap, by, problem);
    }
    for chunk in counts.touched() {
        let references = counts.of_chunk(chunk);
        compare_chunk(image, chunk, &references)?;
    }
    leaks_elsewhere(image, counts, window)
}

/// Compares one chunk; `references` are its counts, or nothing where nobody refers to it.
fn compare_chunk(image: &mut Image<'_>, chunk: u64, references: &[u64]) -> Result<()> {
    let order = image.geometry.refcount_order();
    let per_block = image.geometry.refcounts_per_block();
    let start = chunk * CHUNK_CLUSTERS;
    let end = (start + CHUNK_CLUSTERS).min(image.file_clusters);
    let mut at = start;
    while at < end {
        let (index, within) = image.refcounts.position(at);
        let stop = end.min((index + 1) * per_block);
        let block = image.refcounts.block_bytes(index)?.unwrap_or_default();
        let mut wrong = Vec::new();
        for cluster in at..stop {
            let stored = refcount_at(block, within + (cluster - at), order).unwrap_or(0);
            let counted = references.get(in_memory(cluster - start)).copied().unwrap_or(0);
            if stored != counted {
                wrong.push((cluster, stored, counted));
            }
        }
        wrong.into_iter().for_each(|w| report(image, w));
        at = stop;
    }
    Ok(())
}

/// Finds counts of clusters that nobody refers to in chunks without any reference.
fn leaks_elsewhere(image: &mut Image<'_>, counts: &Counts, window: Range<u64>) -> Result<()> {
    let per_block = image.geometry.refcounts_per_block();
    let file_chunks = image.file_clusters.div_ceil(CHUNK_CLUSTERS);
    let window = window.start..window.end.min(file_chunks);
    for index in 0..image.refcounts.table_len() {
        let Ok(Some(_)) = image.refcounts.block_at(index) else { continue };
        let first = (index * per_block / CHUNK_CLUSTERS).max(window.start);
        let last = ((index + 1) * per_block).div_ceil(CHUNK_CLUSTERS).min(window.end);
        for chunk in first..last {
            // A chunk that several blocks share is compared with the first of them in it.
            let is_first = chunk * CHUNK_CLUSTERS >= index * per_block;
            if !counts.is_touched(chunk) && (is_first || !has_earlier_block(image, chunk, index)) {
                compare_chunk(image, chunk, &[])?;
            }
        }
    }
    Ok(())
}

/// Whether a block before `index` covers a part of the chunk.
fn has_earlier_block(image: &Image<'_>, chunk: u64, index: u64) -> bool {
    let (first, _) = image.refcounts.position(chunk * CHUNK_CLUSTERS);
    (first..index).any(|earlier| matches!(image.refcounts.block_at(earlier), Ok(Some(_))))
}

fn report(image: &mut Image<'_>, (cluster, stored, counted): (u64, u64, u64)) {
    let (index, within) = image.refcounts.position(cluster);
    let block = image.refcounts.block_at(index).ok().flatten();
    let at = block.map(|b| b.0 + ((within << image.geometry.refcount_order()) >> 3));
    if stored > counted {
        image.report.note_overcounted(cluster, counted);
    }
    let kind = if stored > counted { FindingKind::Leak } else { FindingKind::Refcount };
    let what = match at {
        Some(at) => {
            let problem = Problem::Mismatch { value: stored, expected: counted };
            Malformed::new(at, "refcount", problem)
        }
        None => {
            let problem = Problem::Other("is empty, but clusters that it covers are in use");
            let at = image.refcounts.table_at().0 + index * 8;
            Malformed::new(at, "refcount_table_entry", problem)
        }
    };
    image.report.add(kind, what);
}
