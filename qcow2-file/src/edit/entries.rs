//! Decisions about single L2 entries. Pure.

use crate::layout::entry::{CompressedEntry, L2Entry, StandardEntry, Subclusters};
use crate::layout::geometry::{Geometry, SUBCLUSTERS};
use crate::layout::units::HostOffset;

/// Where the data of a write into one cluster goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// Straight into the host cluster; the entry stays.
    InPlace(HostOffset),
    /// Into the host cluster the entry has, which then says more than before.
    SameHost(HostOffset),
    /// Into a new host cluster.
    NewHost,
}

/// Where a write that touches the units `touched` of a cluster goes. In a version 3 image without
/// subclusters a cluster is one unit, and all bits of a mask are alike.
pub(super) fn target(entry: &L2Entry, touched: u32) -> Target {
    match entry {
        L2Entry::Standard(StandardEntry { cluster: Some(host), is_copied: true, subclusters }) => {
            if touched & !subclusters.allocated == 0 {
                Target::InPlace(*host)
            } else {
                Target::SameHost(*host)
            }
        }
        _ => Target::NewHost,
    }
}

/// The units of a cluster that bytes `start..end` of it touch, as a mask.
pub(super) fn units_touched(g: Geometry, start: u64, end: u64) -> u32 {
    let unit = g.subcluster_size().max(1);
    mask_of(g, start / unit, end.div_ceil(unit))
}

/// The units that lie wholly in bytes `start..end` of the cluster.
pub(super) fn units_covered(g: Geometry, start: u64, end: u64) -> u32 {
    let unit = g.subcluster_size().max(1);
    mask_of(g, start.div_ceil(unit), end / unit)
}

/// The mask of units `first..end`.
fn mask_of(g: Geometry, first: u64, end: u64) -> u32 {
    if first >= end {
        return 0;
    }
    if !g.has_subclusters() {
        return u32::MAX;
    }
    let below = |n: u64| match n {
        n if n >= SUBCLUSTERS => u64::from(u32::MAX),
        n => (1 << n) - 1,
    };
    u32::try_from(below(end) & !below(first)).unwrap_or(u32::MAX)
}

/// The entry after the units `written` got their content in `host`.
pub(super) fn after_write(old: &L2Entry, host: HostOffset, written: u32) -> L2Entry {
    let subclusters = match old {
        L2Entry::Standard(s) => Subclusters {
            // A new host cluster holds what was written there and nothing else.
            allocated: written | if s.cluster == Some(host) { s.subclusters.allocated } else { 0 },
            zero: s.subclusters.zero & !written,
        },
        L2Entry::Compressed(_) => Subclusters { allocated: written, zero: 0 },
    };
    L2Entry::Standard(StandardEntry { cluster: Some(host), is_copied: true, subclusters })
}

/// What of an image decides how zeroes are noted.
#[derive(Debug, Clone, Copy)]
pub(super) struct ZeroRules {
    /// Something shows through where nothing is allocated.
    pub(super) has_backing: bool,
    /// Version 2 cannot say "zero".
    pub(super) can_flag: bool,
    /// Host clusters are not counted, and have their place for good.
    pub(super) has_data_file: bool,
    /// Host clusters stay allocated where they may.
    pub(super) keeps_room: bool,
    /// The caller does not need the content, rather than needing zeroes.
    pub(super) is_discard: bool,
}

/// The entry after the units of `mask` were zeroed or discarded; `None` where only writing zeroes
/// as data can say that. Never makes what is below visible.
pub(super) fn after_zero(old: &L2Entry, mask: u32, rules: ZeroRules) -> Option<L2Entry> {
    let standard = match old {
        L2Entry::Standard(s) => *s,
        L2Entry::Compressed(_) if mask != u32::MAX => return None,
        L2Entry::Compressed(_) => {
            // It has no room that could be kept.
            StandardEntry { cluster: None, is_copied: false, subclusters: Subclusters::DATA }
        }
    };
    let masks = standard.subclusters;
    let shows_other = masks.allocated | if rules.has_backing { !masks.zero } else { 0 };
    let has_room = standard.cluster.is_some();
    let reads_zero = shows_other & mask == 0;
    if reads_zero && (!has_room || rules.keeps_room || rules.has_data_file || mask != u32::MAX) {
        return Some(*old);
    }
    if rules.has_data_file && has_room {
        // Its data was zeroed where it stands.
        return Some(*old);
    }
    if !rules.can_flag {
        return match (rules.has_backing, rules.is_discard, rules.keeps_room) {
            // Content that nobody needs may stay; what is below may not come back.
            (true, true, _) => Some(*old),
            (true, false, _) | (false, _, true) => None,
            (false, _, false) => Some(L2Entry::UNALLOCATED),
        };
    }
    let allocated = masks.allocated & !mask;
    let zero = masks.zero | mask;
    let may_keep = rules.keeps_room && standard.is_copied;
    if allocated != 0 || (may_keep && has_room) {
        let subclusters = Subclusters { allocated, zero };
        return Some(L2Entry::Standard(StandardEntry { subclusters, ..standard }));
    }
    if rules.is_discard && !rules.has_backing {
        return Some(L2Entry::UNALLOCATED);
    }
    let subclusters = Subclusters { allocated: 0, zero };
    Some(L2Entry::Standard(StandardEntry { cluster: None, is_copied: false, subclusters }))
}

/// Host clusters that `new` does not refer to any more, as offset and count. `None` where there
/// are none.
pub(super) fn dropped(old: &L2Entry, new: &L2Entry, g: Geometry) -> Option<(HostOffset, u64)> {
    match (old, new) {
        (L2Entry::Compressed(c), new) if new != old => Some(clusters_of(*c, g)),
        (L2Entry::Standard(StandardEntry { cluster: Some(host), .. }), new) => {
            let stays = matches!(new, L2Entry::Standard(n) if n.cluster == Some(*host));
            (!stays).then_some((*host, 1))
        }
        _ => None,
    }
}

/// The host clusters a compressed cluster has a reference to.
fn clusters_of(c: CompressedEntry, g: Geometry) -> (HostOffset, u64) {
    let first = g.cluster_start(c.offset.0);
    let last = g.cluster_start(c.offset.0.saturating_add(c.max_bytes().saturating_sub(1)));
    (HostOffset(first), (last.saturating_sub(first) >> g.cluster_bits()).saturating_add(1))
}
