//! Capacities of a destination. Memory is bounded by these, whatever the peer sends.

/// Most bitmaps in one migration: as many as one qcow2 image may hold.
pub(super) const MAX_BITMAPS: usize = 65535;
/// Most bytes of bitmaps in one migration: they are held in memory until the stream has ended well.
pub(super) const MAX_BITMAP_BYTES: u64 = 1 << 30;
/// Most names that an error or a warning lists.
pub(super) const MAX_LISTED: usize = 16;
/// Most sections of devices whose names are remembered, to be told.
pub(super) const MAX_DEVICES: usize = 256;
