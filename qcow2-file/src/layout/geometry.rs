//! Cluster arithmetic of one image. qcow2 spec, "Cluster mapping".

use super::units::{GuestOffset, HostOffset};

/// Subclusters in a cluster of an image with extended L2 entries.
pub const SUBCLUSTERS: u64 = 32;

/// What follows from the cluster size and the width of L2 entries and refcounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    has_subclusters: bool,
}

impl Geometry {
    /// `cluster_bits` and `refcount_order` have been checked against [`crate::limits`].
    pub fn new(cluster_bits: u32, refcount_order: u32, has_subclusters: bool) -> Self {
        Self {
            cluster_bits: cluster_bits.clamp(9, 21),
            refcount_order: refcount_order.min(6),
            has_subclusters,
        }
    }

    /// log2 of the cluster size.
    pub fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Bytes in a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries are extended.
    pub fn has_subclusters(self) -> bool {
        self.has_subclusters
    }

    /// Bytes in the unit that has a state of its own: a subcluster, or a cluster.
    pub fn subcluster_size(self) -> u64 {
        if self.has_subclusters { self.cluster_size() / SUBCLUSTERS } else { self.cluster_size() }
    }

    /// Bytes of one L2 entry: 16 when extended.
    pub fn l2_entry_size(self) -> u64 {
        if self.has_subclusters { 16 } else { 8 }
    }

    /// Entries in an L2 table, which fills one cluster.
    pub fn l2_entries(self) -> u64 {
        if self.has_subclusters { self.cluster_size() >> 4 } else { self.cluster_size() >> 3 }
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_span(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries needed for a disk of `size` bytes.
    pub fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l2_span().max(1))
    }

    /// Position in the L1 table.
    pub fn l1_index(self, at: GuestOffset) -> u64 {
        at.0.checked_div(self.l2_span()).unwrap_or(0)
    }

    /// Position in the L2 table.
    pub fn l2_index(self, at: GuestOffset) -> u64 {
        (at.0 >> self.cluster_bits) & self.l2_entries().saturating_sub(1)
    }

    /// Offset inside the cluster.
    pub fn in_cluster(self, offset: u64) -> u64 {
        offset & self.cluster_size().saturating_sub(1)
    }

    /// Start of the cluster that holds `offset`.
    pub fn cluster_start(self, offset: u64) -> u64 {
        offset & !self.cluster_size().saturating_sub(1)
    }

    /// Clusters needed for `bytes`.
    pub fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Whether a host offset starts a cluster.
    pub fn is_cluster_aligned(self, at: HostOffset) -> bool {
        self.in_cluster(at.0) == 0
    }

    /// log2 of the refcount width in bits.
    pub fn refcount_order(self) -> u32 {
        self.refcount_order
    }

    /// Refcounts in one refcount block, which fills one cluster.
    pub fn refcounts_per_block(self) -> u64 {
        (self.cluster_size() << 3) >> self.refcount_order
    }

    /// Host bytes that one refcount block covers.
    pub fn refcount_block_span(self) -> u64 {
        self.refcounts_per_block() << self.cluster_bits
    }

    /// Largest refcount that fits.
    pub fn max_refcount(self) -> u64 {
        match 1u32 << self.refcount_order {
            64 => u64::MAX,
            bits => (1u64 << bits).saturating_sub(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_geometry() {
        let g = Geometry::new(16, 4, false);
        assert_eq!(g.l2_entries(), 8192);
        assert_eq!(g.l2_span(), 512 << 20);
        assert_eq!(g.refcounts_per_block(), 32768);
        assert_eq!(g.refcount_block_span(), 2 << 30);
        assert_eq!(g.max_refcount(), 65535);
        assert_eq!(g.l1_entries((512 << 20) + 1), 2);
        let at = GuestOffset((512 << 20) + (3 << 16) + 5);
        assert_eq!((g.l1_index(at), g.l2_index(at), g.in_cluster(at.0)), (1, 3, 5));
    }

    #[test]
    fn extended_geometry() {
        let g = Geometry::new(16, 6, true);
        assert_eq!((g.l2_entries(), g.subcluster_size()), (4096, 2048));
        assert_eq!(g.max_refcount(), u64::MAX);
    }
}
