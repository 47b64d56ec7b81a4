//! Leaves that arrived, gathered into units, so that a unit that came in parts has a node too.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use format_spec::content_hash::{
    LEAF_BYTES, LEDGER_HEIGHT, Node, leaf, parent, subtree, zero_node,
};
use mig_core::block::is_zero;

use crate::ledger::UNIT_BYTES;

/// Leaves of a unit.
const UNIT_LEAVES: usize = 1 << LEDGER_HEIGHT;
/// Units that are kept in part, about 2 MiB of them. What exceeds that has no node: it is sent
/// again should the transfer be interrupted.
const MAX_PARTS: usize = 4096;

/// Nodes that were completed: the first unit, and one for each from there on.
pub(super) type Completed = (u64, Vec<Node>);

/// Units of one disk that came in part, since the last barrier.
#[derive(Debug, Default)]
pub(super) struct Units(Mutex<BTreeMap<u64, Part>>);

#[derive(Debug, Clone, Copy)]
struct Part {
    is_known: [bool; UNIT_LEAVES],
    leaves: [Node; UNIT_LEAVES],
}

impl Units {
    /// Content of a range was stored: nodes of the units that are whole with it.
    pub(super) fn content(&self, range: &Range<u64>, content: &[u8], size: u64) -> Completed {
        let mut completed = (range.start / UNIT_BYTES, Vec::new());
        let mut rest = content;
        for unit in range.start / UNIT_BYTES..range.end.div_ceil(UNIT_BYTES) {
            let whole = whole(unit, size);
            let inside = whole.start.max(range.start)..whole.end.min(range.end);
            let len = usize::try_from(inside.end.saturating_sub(inside.start)).unwrap_or(0);
            let (bytes, after) = rest.split_at_checked(len).unwrap_or((rest, &[]));
            rest = after;
            let node = if inside == whole {
                self.lock().remove(&unit);
                Some(subtree(LEDGER_HEIGHT, bytes, &is_zero))
            } else {
                let node = |bytes: &[u8]| if is_zero(bytes) { zero_node(0) } else { leaf(bytes) };
                self.part(unit, &inside, bytes.chunks(LEAF_BYTES).map(node).collect(), size)
            };
            match node {
                Some(node) => completed.1.push(node),
                None if completed.1.is_empty() => completed.0 = unit.saturating_add(1),
                None => {}
            }
        }
        completed
    }

    /// A range became zero: the units at its ends that are whole with it, though it covers only a
    /// part of them.
    pub(super) fn zeroes(&self, range: &Range<u64>, size: u64) -> Vec<(u64, Node)> {
        let units = range.start / UNIT_BYTES..range.end.div_ceil(UNIT_BYTES);
        let ends = [units.start, units.end.saturating_sub(1)];
        let mut completed = Vec::new();
        for (at, unit) in ends.into_iter().enumerate() {
            let whole = whole(unit, size);
            let inside = whole.start.max(range.start)..whole.end.min(range.end);
            if inside == whole || (at == 1 && ends[0] == ends[1]) {
                continue;
            }
            let count = inside.end.saturating_sub(inside.start).div_ceil(LEAF_BYTES as u64);
            let nodes = vec![zero_node(0); usize::try_from(count).unwrap_or(0)];
            completed.extend(self.part(unit, &inside, nodes, size).map(|node| (unit, node)));
        }
        let mut parts = self.lock();
        let is_whole = |unit: u64| {
            let whole = whole(unit, size);
            range.start <= whole.start && whole.end <= range.end
        };
        let covered: Vec<u64> = parts.range(units).map(|(unit, _)| *unit).collect();
        for unit in covered.into_iter().filter(|unit| is_whole(*unit)) {
            parts.remove(&unit);
        }
        completed
    }

    /// A barrier: what is not whole by now is not going to be.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    /// Adds leaves of a unit; its node, if that makes it whole.
    fn part(&self, unit: u64, inside: &Range<u64>, nodes: Vec<Node>, size: u64) -> Option<Node> {
        let mut parts = self.lock();
        if parts.len() >= MAX_PARTS && !parts.contains_key(&unit) {
            return None;
        }
        let part = parts.entry(unit).or_insert_with(|| Part::new(&whole(unit, size)));
        let first =
            inside.start.saturating_sub(unit.saturating_mul(UNIT_BYTES)) / LEAF_BYTES as u64;
        let first = usize::try_from(first).unwrap_or(UNIT_LEAVES);
        let places = part.leaves.iter_mut().zip(&mut part.is_known).skip(first);
        for ((place, is_known), node) in places.zip(nodes) {
            (*place, *is_known) = (node, true);
        }
        if !part.is_known.iter().all(|is_known| *is_known) {
            return None;
        }
        let node = part.node();
        parts.remove(&unit);
        Some(node)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Part>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part {
    /// Nothing of a unit is known but that there is nothing beyond the end of the disk.
    fn new(whole: &Range<u64>) -> Self {
        let len = whole.end.saturating_sub(whole.start);
        let inside = usize::try_from(len.div_ceil(LEAF_BYTES as u64)).unwrap_or(UNIT_LEAVES);
        let mut is_known = [false; UNIT_LEAVES];
        is_known.iter_mut().skip(inside).for_each(|known| *known = true);
        Self { is_known, leaves: [zero_node(0); UNIT_LEAVES] }
    }

    fn node(&self) -> Node {
        let mut level = self.leaves.to_vec();
        while level.len() > 1 {
            let (pairs, _) = level.as_chunks::<2>();
            level = pairs.iter().map(|[left, right]| parent(left, right)).collect();
        }
        level.first().copied().unwrap_or_default()
    }
}

/// The bytes of a unit.
fn whole(unit: u64, size: u64) -> Range<u64> {
    let start = unit.saturating_mul(UNIT_BYTES);
    start..start.saturating_add(UNIT_BYTES).min(size)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEAF: u64 = LEAF_BYTES as u64;

    proptest! {
        /// However a disk is cut, each unit is completed once, with the node of its content.
        #[test]
        fn a_disk_in_pieces_has_all_its_nodes(
            cuts in proptest::collection::btree_set(1u64..37, 0..20),
            zeroes in proptest::collection::vec(any::<bool>(), 21),
            order in any::<u64>(),
        ) {
            let size = 37 * LEAF + 512;
            let ends: Vec<u64> = cuts.iter().map(|leaf| leaf * LEAF).chain([size]).collect();
            let starts = std::iter::once(0).chain(ends.iter().copied());
            let mut pieces: Vec<_> = starts.zip(&ends).zip(&zeroes).collect();
            let len = pieces.len();
            pieces.rotate_left(usize::try_from(order).unwrap_or(0) % len);
            let mut disk = vec![0u8; usize::try_from(size).unwrap()];
            let units = Units::default();
            let mut nodes = BTreeMap::new();
            for ((start, end), is_zero) in pieces {
                let range = start..*end;
                let span = |at: u64| usize::try_from(at).unwrap();
                let bytes = &mut disk[span(start)..span(*end)];
                if *is_zero {
                    for (unit, node) in units.zeroes(&range, size) {
                        prop_assert!(nodes.insert(unit, node).is_none());
                    }
                    let last = if *end == size { 3 } else { *end / UNIT_BYTES };
                    for unit in start.div_ceil(UNIT_BYTES)..last {
                        prop_assert!(nodes.insert(unit, zero_node(LEDGER_HEIGHT)).is_none());
                    }
                } else {
                    bytes.fill(u8::try_from(start / LEAF + 1).unwrap());
                    let (first, made) = units.content(&range, bytes, size);
                    for (unit, node) in (first..).zip(made) {
                        prop_assert!(nodes.insert(unit, node).is_none());
                    }
                }
            }
            for (unit, bytes) in (0u64..).zip(disk.chunks(16 * LEAF_BYTES)) {
                let expected = subtree(LEDGER_HEIGHT, bytes, &is_zero);
                prop_assert_eq!(nodes.get(&unit), Some(&expected));
            }
            prop_assert!(units.lock().is_empty());
        }
    }
}
