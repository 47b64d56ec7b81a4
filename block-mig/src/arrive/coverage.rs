//! Which bytes of a disk have come.

use std::collections::BTreeMap;
use std::ops::Range;

/// Most runs that are kept apart: a source that sends in so wild an order is refused.
const MAX_RUNS: usize = 1 << 20;

/// Ranges that have come, joined where they touch: memory follows the number of gaps.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// End by start.
    runs: BTreeMap<u64, u64>,
    /// Sum of their lengths.
    bytes: u64,
}

impl Coverage {
    /// Adds a range. `false` if that is one run more than is kept.
    #[must_use]
    pub(super) fn add(&mut self, range: Range<u64>) -> bool {
        let (mut start, mut end) = (range.start, range.end);
        if start >= end {
            return true;
        }
        if let Some((before, before_end)) = self.runs.range(..=start).next_back() {
            if *before_end >= end {
                return true;
            }
            if *before_end >= start {
                start = *before;
            }
        }
        while let Some((next, next_end)) = self.runs.range(start..=end).next() {
            let (next, next_end) = (*next, *next_end);
            end = end.max(next_end);
            self.bytes = self.bytes.saturating_sub(next_end.saturating_sub(next));
            self.runs.remove(&next);
        }
        self.runs.insert(start, end);
        self.bytes = self.bytes.saturating_add(end.saturating_sub(start));
        self.runs.len() <= MAX_RUNS
    }

    /// Whether nothing has come.
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many bytes have come, each counted once.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The first byte below `size` that has not come.
    pub(super) fn first_gap(&self, size: u64) -> Option<u64> {
        let end = match self.runs.first_key_value() {
            Some((0, end)) => *end,
            _ => 0,
        };
        (end < size).then_some(end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_the_set_of_bytes_that_came(
            ranges in proptest::collection::vec((0u64..60, 0u64..9), 0..40),
        ) {
            let mut coverage = Coverage::default();
            let mut bytes = [false; 70];
            let span = |range: &Range<u64>| {
                usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
            };
            for (start, len) in ranges {
                prop_assert!(coverage.add(start..start + len));
                bytes[span(&(start..start + len))].fill(true);
            }
            let first_gap = bytes.iter().position(|b| !b).map(|at| at as u64);
            prop_assert_eq!(coverage.first_gap(70), first_gap);
            let mut last_end = None;
            for (start, end) in &coverage.runs {
                prop_assert!(last_end.is_none_or(|last| last < *start) && start < end);
                prop_assert!(bytes[span(&(*start..*end))].iter().all(|b| *b));
                last_end = Some(*end);
            }
            let covered: u64 = coverage.runs.iter().map(|(start, end)| end - start).sum();
            prop_assert_eq!(covered, coverage.bytes());
            prop_assert_eq!(covered, bytes.iter().filter(|b| **b).count() as u64);
        }
    }
}
