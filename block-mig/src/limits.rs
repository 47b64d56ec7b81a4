//! Capacities of the engine. Memory is bounded by these, whatever the disk's size.

use std::time::Duration;

/// Bytes that a worker loads at once: 16 leaves, one node of the ledger (SPEC 2). Larger units save
/// system calls, smaller ones stay in the cache between read, hash and write.
pub const UNIT_BYTES: u64 = 1 << 20;
/// Largest unit, where a compressed cluster must fit into one. The largest cluster of qcow2.
pub const MAX_UNIT_BYTES: u64 = 2 << 20;
/// Runs of extents that are kept from a first walk over a source for a second one: 1.5 MiB of them.
pub const MAX_RECORDED_RUNS: usize = 1 << 16;
/// Units that may wait for a worker. They are a few words each; the queue only keeps workers fed
/// while metadata is read.
pub const QUEUE_UNITS: usize = 64;
/// Most workers by default. More do not help: memory bandwidth is used up before.
pub const MAX_DEFAULT_WORKERS: usize = 4;
/// Most workers on request. Each holds one unit and a compressed cluster.
pub const MAX_WORKERS: usize = 16;

/// Pages of 32 KiB that a [`Ledger`](crate::Ledger) holds in memory: the nodes of 128 GiB of data.
pub const LEDGER_PAGES: usize = 128;

/// Nodes in one record of a journal.
pub const JOURNAL_RECORD_NODES: usize = 4096;
/// What a journal may hold beside twice what it claims before it is written anew.
pub const JOURNAL_SLACK_BYTES: u64 = 1 << 20;

/// Room that a journal has taken ahead of what it holds: what one checkpoint says and what ends a
/// journal fit into it where the file system is full.
pub const JOURNAL_RESERVE_BYTES: u64 = 16 << 10;

/// Bytes that arrive between two checkpoints, at which a destination is synced and its journal says
/// what it has: what a cut costs at most.
pub const CHECKPOINT_BYTES: u64 = 64 << 20;
/// How long what arrives may wait for a checkpoint, however little it is: what a cut costs on a
/// slow link. Looked at when something arrives.
pub const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(3);
/// Bytes that arrive behind others before those are read back: enough that a unit that comes in
/// parts is whole by then, and few enough that little is left in the end.
pub const SETTLE_BYTES: u64 = 16 << 20;
/// Runs of units that wait to be read back. What is forgotten is read in the end.
pub const MAX_WAITING_RUNS: usize = 1 << 16;
/// Units of which only a part has arrived that are remembered. What is forgotten is not claimed.
pub const MAX_PARTIAL_UNITS: usize = 4096;
/// Units of zeroes that are read again at once, where they have to be: between them a command can
/// be called off.
pub const RECHECKED_ZEROES: u64 = 64;

/// The number of workers for a wish: by the number of cores where there is none.
pub fn workers(wish: Option<std::num::NonZeroUsize>) -> usize {
    match wish {
        Some(n) => n.get().min(MAX_WORKERS),
        None => std::thread::available_parallelism()
            .map_or(1, std::num::NonZeroUsize::get)
            .min(MAX_DEFAULT_WORKERS),
    }
}
