//! What a write or a zero does to one cluster's entry. Pure decisions; see `write` and `zero` for
//! who carries them out, and `convert` for the ones that need the cluster to themselves.

use crate::layout::entry::{L2Entry, StandardEntry, Subclusters};
use crate::layout::geometry::Geometry;
use crate::layout::units::HostOffset;

/// The *units* of one cluster that a range touches, as masks like [`Subclusters`]: a unit is a
/// subcluster, or the cluster where there are none (then all 32 bits are equal).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Touch {
    /// Units the range covers at least in part.
    pub(super) any: u32,
    /// Units the range covers whole.
    pub(super) whole: u32,
}

/// A stretch of a guest cluster: bytes `from` to `to` of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Guest cluster number.
    pub(super) cluster: u64,
    /// First byte inside the cluster.
    pub(super) from: u64,
    /// Byte behind the last one, inside the cluster.
    pub(super) to: u64,
}

impl Piece {
    /// The part of `[at, end)` that lies in `cluster`.
    pub(super) fn of(cluster: u64, at: u64, end: u64, geometry: Geometry) -> Self {
        let start = cluster << geometry.cluster_bits();
        let from = at.saturating_sub(start).min(geometry.cluster_size());
        let to = end.saturating_sub(start).min(geometry.cluster_size());
        Self { cluster, from, to }
    }

    /// Bytes in it.
    pub(super) fn len(self) -> u64 {
        self.to.saturating_sub(self.from)
    }

    /// Guest offset of its first byte.
    pub(super) fn at(self, geometry: Geometry) -> u64 {
        (self.cluster << geometry.cluster_bits()) + self.from
    }

    /// The units it touches on a disk of `size` bytes. The end of the disk completes a unit.
    pub(super) fn touch(self, size: u64, geometry: Geometry) -> Touch {
        let start = self.cluster << geometry.cluster_bits();
        let unit = geometry.subcluster_size();
        let reaches_end = start.saturating_add(self.to) >= size;
        let to = if reaches_end { self.to.next_multiple_of(unit) } else { self.to };
        if !geometry.has_subclusters() {
            let is_whole = self.from == 0 && to >= unit;
            return Touch { any: u32::MAX, whole: if is_whole { u32::MAX } else { 0 } };
        }
        let any = mask(self.from / unit, to.div_ceil(unit));
        Touch { any, whole: any & mask(self.from.div_ceil(unit), to / unit) }
    }
}

/// Bits `from` to `to`, exclusive.
fn mask(from: u64, to: u64) -> u32 {
    let below = |n: u64| (1u64 << n.min(32)).wrapping_sub(1);
    u32::try_from(below(to) & !below(from)).unwrap_or_default()
}

/// What of an image the decisions depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rules {
    /// Something shines through what is unallocated.
    pub(super) has_backing: bool,
    /// New clusters read as zero.
    pub(super) is_virgin: bool,
    /// Entries can say "zero": version 3.
    pub(super) has_zero_flag: bool,
    /// The file was written before a crash, so that what a host cluster holds at an unallocated
    /// unit is not known: its data may be there and its entry lost.
    pub(super) is_reopened: bool,
}

/// What a data write must do to a cluster before the bytes can go to the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WriteStep {
    /// Nothing: the bytes go where they are mapped.
    InPlace(HostOffset),
    /// Point the entry at the cluster it has, or a new one, with these subclusters.
    Map(Option<HostOffset>, Subclusters),
    /// Content outside the range must be brought along or cleared first: see `convert`.
    Convert,
}

/// Decides for a data write.
pub(super) fn write_step(entry: L2Entry, touch: Touch, rules: Rules) -> WriteStep {
    let L2Entry::Standard(s) = entry else {
        return WriteStep::Convert;
    };
    let Subclusters { allocated, zero } = s.subclusters;
    let need = touch.any & !allocated;
    match s.cluster {
        Some(host) if need == 0 => WriteStep::InPlace(host),
        // What the host cluster holds at a unit marked zero is not known.
        Some(_) if need & zero != 0 || rules.is_reopened => WriteStep::Convert,
        _ if rules.has_backing || !rules.is_virgin => WriteStep::Convert,
        host => WriteStep::Map(host, becoming_data(s, need)),
    }
}

/// The subclusters of `entry` once `units` hold data.
pub(super) fn becoming_data(entry: StandardEntry, units: u32) -> Subclusters {
    let Subclusters { allocated, zero } = entry.subclusters;
    Subclusters { allocated: allocated | units, zero: zero & !units }
}

/// What making a range zero does to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ZeroStep {
    /// The entry as it shall be (`None`: as it is), and the units of its host cluster to clear.
    Set(Option<L2Entry>, Option<HostOffset>),
    /// Version 2 over a backing file: a new cluster that reads as zero because nothing is in it.
    MapHole,
    /// As [`WriteStep::Convert`]; afterwards the range is cleared in place.
    Convert,
}

/// Decides for zeroes.
pub(super) fn zero_step(entry: L2Entry, touch: Touch, rules: Rules) -> ZeroStep {
    match entry {
        L2Entry::Compressed(_) if touch.whole != u32::MAX => ZeroStep::Convert,
        L2Entry::Compressed(_) if rules.has_zero_flag => {
            ZeroStep::Set(Some(zero_without_cluster()), None)
        }
        L2Entry::Compressed(_) if rules.has_backing => ZeroStep::MapHole,
        L2Entry::Compressed(_) => ZeroStep::Set(Some(L2Entry::UNALLOCATED), None),
        L2Entry::Standard(s) => zero_standard(s, touch, rules),
    }
}

fn zero_standard(s: StandardEntry, touch: Touch, rules: Rules) -> ZeroStep {
    let Subclusters { allocated, zero } = s.subclusters;
    let unallocated = !(allocated | zero);
    let partial = touch.any & !touch.whole;
    if rules.has_backing && partial & unallocated != 0 {
        return ZeroStep::Convert;
    }
    let shining = if rules.has_backing { touch.whole & unallocated } else { 0 };
    if !rules.has_zero_flag {
        let is_shining = shining != 0;
        return if is_shining { ZeroStep::MapHole } else { ZeroStep::Set(None, s.cluster) };
    }
    let marked = (touch.whole & allocated) | shining;
    let subclusters = Subclusters { allocated: allocated & !marked, zero: zero | marked };
    let entry = L2Entry::Standard(StandardEntry { subclusters, ..s });
    let clear = s.cluster.filter(|_| touch.any & allocated != 0);
    ZeroStep::Set((marked != 0).then_some(entry), clear)
}

fn zero_without_cluster() -> L2Entry {
    L2Entry::Standard(StandardEntry {
        cluster: None,
        is_copied: false,
        subclusters: Subclusters::ZERO,
    })
}

/// A cluster that is not compressed, as this writer maps it: nothing else shares it.
pub(super) fn mapped(host: HostOffset, subclusters: Subclusters) -> L2Entry {
    L2Entry::Standard(StandardEntry { cluster: Some(host), is_copied: true, subclusters })
}
