//! Capacities of a destination. Memory and time are bounded by these, whatever the peer sends.

use std::time::Duration;

/// Most bitmaps in one migration: as many as one qcow2 image may hold.
pub(super) const MAX_BITMAPS: usize = 65535;
/// Most bytes of bitmaps in one migration: they are held in memory until the stream has ended well.
pub(super) const MAX_BITMAP_BYTES: u64 = 1 << 30;
/// Most names that an error or a warning lists.
pub(super) const MAX_LISTED: usize = 16;
/// Most sections of devices whose names are remembered, to be told.
pub(super) const MAX_DEVICES: usize = 256;
/// How long a source that was told the outcome is waited for to end the connection. A QEMU takes
/// milliseconds.
pub(super) const LINGER: Duration = Duration::from_secs(10);
/// How long after its end a connection is looked at for a reset.
pub(super) const SETTLE: Duration = Duration::from_millis(100);
/// How often it is looked whether the user wants to stop, while the source is waited for.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long the description of the machine is waited for, which a QEMU sends together with the end.
pub(super) const TAIL_LIMIT: Duration = Duration::from_secs(10);
