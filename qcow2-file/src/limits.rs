//! Every bound on what an image may make us do. Each says why, and what QEMU uses.

/// Smallest and largest cluster size, as powers of two: 512 B to 2 MiB, as QEMU and the spec.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Largest refcount order: 64-bit refcounts, as the spec.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// Largest L1 table in bytes, as QEMU: enough for 2 EiB at 2 MiB clusters.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes, as QEMU.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Largest snapshot count, as QEMU.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Largest snapshot table in bytes, as QEMU.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 1024 * 65536;
/// Longest extra data of a snapshot table entry in bytes, as QEMU.
pub const MAX_SNAPSHOT_EXTRA_BYTES: u32 = 1024;
/// Longest backing file or data file name in bytes, as the spec.
pub const MAX_FILE_NAME_BYTES: u32 = 1023;
/// Longest bitmap name in bytes, as QEMU.
pub const MAX_BITMAP_NAME_BYTES: u16 = 1023;
/// Most bitmaps in one image, as QEMU.
pub const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory in bytes, as QEMU.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 1024 * 65535;
/// Granularity of a bitmap as powers of two: 512 B to 2 GiB, as QEMU.
pub const BITMAP_GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Largest bitmap payload on disk in bytes, as QEMU.
pub const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// Most findings that a check of bitmaps keeps; more are counted.
pub const MAX_BITMAP_FINDINGS: usize = 1000;
/// Most data clusters of bitmaps that are held against each other: 64 MiB of memory, or one bitmap
/// of the largest size at 512-byte clusters four times over.
pub const MAX_CHECKED_BITMAP_CLUSTERS: usize = 4 << 20;
/// Deepest backing chain. QEMU has no limit and runs out of descriptors; longer honest chains are
/// unheard of.
pub const MAX_CHAIN_DEPTH: usize = 200;
/// Largest virtual size: host offsets have 56 bits, and a guest offset must fit an `i64` with room.
pub const MAX_VIRTUAL_SIZE: u64 = 1 << 61;
/// Bytes of refcount blocks an editor keeps in memory. QEMU keeps four clusters.
pub const REFCOUNT_CACHE_BYTES: u64 = 8 << 20;
/// Freed clusters that wait for their decrement before a flush is forced, so that memory and what a
/// crash leaks stay bounded: 4 GiB at 64 KiB clusters. QEMU frees at once.
pub const MAX_PENDING_FREES: u64 = 65536;
/// Bytes of L2 tables that a chain of layers keeps in memory, all layers together: the tables of
/// 64 GiB of disk at 64 KiB clusters. QEMU: 32 MiB per layer.
pub const L2_CACHE_BYTES: usize = 8 << 20;
/// Bytes of an L2 table that are read at a time, where clusters are larger: otherwise one look into
/// an image of 2 MiB clusters would read 2 MiB. QEMU: 4 KiB.
pub const L2_SLICE_BYTES: u64 = 64 << 10;
/// Slices of L2 tables that one extent query may go through before it answers with what it has.
pub const MAX_SLICES_PER_EXTENT: u32 = 64;
/// Bytes of disk that an extent query through several layers looks at first; doubled while all of
/// it is alike. Bounds what is thrown away when a lower layer has shorter extents.
pub const FIRST_EXTENT_WINDOW: u64 = 4 << 20;
/// L1 tables of all layers of a chain together, in bytes: two of the largest.
pub const MAX_CHAIN_L1_BYTES: u64 = 2 * MAX_L1_BYTES;
/// Memory in which a check counts references: 2^26 clusters (4 TiB at 64 KiB) in one pass over the
/// metadata. QEMU holds the counts of the whole file.
pub const CHECK_COUNTS_BYTES: usize = 132 << 20;
/// Most passes of a check, so that an image that scatters references over exabytes ends in an
/// error: 256 TiB of dense data at 64 KiB clusters.
pub const MAX_CHECK_PASSES: u32 = 64;
/// Clusters with more references than the counts' width holds, which a check counts aside.
pub const MAX_CHECK_OVERFLOWS: usize = 1 << 20;
/// Distinct L2 tables, active and in snapshots, that a check remembers: as many as the largest L1
/// table has entries.
pub const MAX_CHECK_TABLES: usize = 4 << 20;
/// Findings that a check describes; further ones are counted only.
pub const MAX_CHECK_FINDINGS: usize = 1000;
/// Runs of leaked clusters that a check remembers for [`reclaim`](crate::check::reclaim): 1 MiB.
pub const MAX_UNREFERENCED_RUNS: usize = 1 << 16;
/// Most walks of one [`reclaim`](crate::check::reclaim). What is scattered wider stays leaked.
pub const MAX_RECLAIM_WALKS: u32 = 16;
/// Compressed clusters whose exact lengths are remembered between reading their content and passing
/// their bytes on: 64 KiB, as many as 8 units of 2 MiB have at 4 KiB clusters.
pub const KNOWN_COMPRESSED_LENGTHS: usize = 4096;
/// Bytes of L2 tables an editor keeps in memory: the map of 256 GiB at 64 KiB clusters. QEMU: the
/// same on Linux.
pub const EDITOR_TABLES_BYTES: u64 = 32 << 20;
/// Most L2 tables an editor keeps in memory, where clusters are small.
pub const MAX_EDITOR_TABLES: u64 = 8192;
/// Bytes of a guest write that an editor maps at a time, so that one huge write does not hold its
/// range, and neither memory for its entries, for long.
pub const EDITOR_STEP_BYTES: u64 = 16 << 20;

/// Most bytes of a part of a file whose writes are counted, as a power of two: a usual cluster.
pub const WATCHED_PART_BITS: u32 = 16;
/// Most parts whose writes are counted: 8 MiB of counts. Parts are larger in files that have more.
pub const MAX_WATCHED_PARTS: u64 = 1 << 22;
