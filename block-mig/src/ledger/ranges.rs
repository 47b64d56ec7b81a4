//! A set of numbers, kept as the ranges they form.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint ranges that do not touch, by start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    /// Whether `at` is in the set.
    pub(crate) fn contains(&self, at: u64) -> bool {
        self.end_of_run(at).is_some()
    }

    /// End of the range that holds `at`.
    pub(crate) fn end_of_run(&self, at: u64) -> Option<u64> {
        self.0.range(..=at).next_back().map(|(_, end)| *end).filter(|end| *end > at)
    }

    /// Where the first range behind `at` starts.
    pub(crate) fn next_start(&self, at: u64) -> Option<u64> {
        self.0.range(at..).next().map(|(start, _)| *start)
    }

    /// Whether nothing is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many ranges there are.
    pub(crate) fn runs(&self) -> usize {
        self.0.len()
    }

    /// All ranges, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(start, end)| *start..*end)
    }

    /// Adds a range.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        while let Some((s, e)) = self.0.range(..=end).next_back().filter(|(_, e)| **e >= start) {
            let (s, e) = (*s, *e);
            self.0.remove(&s);
            (start, end) = (start.min(s), end.max(e));
        }
        self.0.insert(start, end);
    }

    /// Takes a range out.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        while let Some((s, e)) =
            self.0.range(..range.end).next_back().filter(|(_, e)| **e > range.start)
        {
            let (s, e) = (*s, *e);
            self.0.remove(&s);
            if e > range.end {
                self.0.insert(range.end, e);
            }
            if s < range.start {
                self.0.insert(s, range.start);
            }
        }
    }
}
