//! Capacities of the stream engine. Memory and patience are bounded by these, whatever a peer says.

use std::time::Duration;

/// Longest silence of a live side: after that it says that it is still there (SPEC 8).
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long a new connection may take to say hello.
pub const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// How long a source may take to open all connections that it was granted.
pub const JOIN_LIMIT: Duration = Duration::from_secs(30);
/// Further connections whose hello is awaited at the same time. One more pushes out the oldest.
pub const MAX_WAITING_JOINS: usize = 16;
/// How long a side that gave up stays reachable, so that its reason is read.
pub const LINGER: Duration = Duration::from_secs(2);
/// Records that are gathered before they are handed to the system. Content passes by this buffer.
pub const GATHER_BYTES: usize = 64 << 10;
/// Bodies that wait for a worker at the destination, for each connection: one that is being read,
/// one that waits, so that reading and writing overlap.
pub const BODIES_PER_CONNECTION: usize = 2;
/// Bodies in work at the destination, for each worker.
pub const BODIES_PER_WORKER: usize = 1;
/// Worker threads at the destination that apply what was read.
pub const LOAD_WORKERS: usize = 2;
/// Sections that a stream may start.
pub const MAX_SECTIONS: usize = 4096;
/// log2 of the largest zstd window that is written and read: 1 MiB.
pub const ZSTD_WINDOW_LOG: u32 = 20;
/// From this level on zstd would index far more than the window: up to 640 MiB for each connection.
pub const ZSTD_LARGE_LEVEL: i32 = 12;
/// log2 of the entries of either of its tables then, of 4 bytes each: what a window has use for.
pub const ZSTD_TABLE_LOG: u32 = ZSTD_WINDOW_LOG + 1;
/// Bytes that an idle sender may save up for later, in time at its bandwidth.
pub const BURST: Duration = Duration::from_millis(50);
/// Runs of units that a source has been told of and not looked at yet.
pub const HAVE_QUEUE: usize = 64;
