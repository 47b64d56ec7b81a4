//! A disk at the destination, as the stream sees it.

use std::ops::Range;

use format_spec::content_hash::Node;
use mig_core::block::BlockSink;
use mig_core::section::Have;
use mig_core::stream::Result;

/// A disk that arrives. Methods are called from several threads, for ranges that do not overlap
/// between two barriers.
///
/// For content the order is [`begin`](Landing::begin), a write to the sink,
/// [`arrived`](Landing::arrived). Ranges are cut on leaves (64 KiB) or at the end of the disk.
pub trait Landing: Send + Sync {
    /// Where content goes.
    fn sink(&self) -> &dyn BlockSink;

    /// Tells what is there from an earlier attempt, in rising order: units of 1 MiB that were
    /// re-read and hash as the journal says. Called once, before anything is written, in a session
    /// that is resumed.
    fn have(&self, _tell: &mut dyn FnMut(Have) -> Result<()>) -> Result<()> {
        Ok(())
    }

    /// Whether [`arrived`](Landing::arrived) wants the nodes of units. They cost a hash of all that
    /// arrives.
    fn wants_nodes(&self) -> bool {
        false
    }

    /// This range is about to be written. Whoever keeps a journal takes its units back first.
    fn begin(&self, _range: Range<u64>) -> Result<()> {
        Ok(())
    }

    /// This range was written; not durable. `nodes` are `T(4, i)` of the units that are whole with
    /// it, since the last barrier, from `first_unit` on; empty where they are not wanted, and for a
    /// range that completes none.
    fn arrived(&self, _range: Range<u64>, _first_unit: u64, _nodes: &[Node]) -> Result<()> {
        Ok(())
    }

    /// This range reads as zero; not durable. Units that it covers only in part, and that are whole
    /// with it, were told to [`arrived`](Landing::arrived) before.
    fn arrived_zeroes(&self, _range: Range<u64>) -> Result<()> {
        Ok(())
    }

    /// A barrier: what arrived before it stays as it is, unless it is sent anew. Must not wait.
    fn settled(&self) {}

    /// A durable barrier: on return everything that arrived is durable, and the journal says so.
    fn durable(&self) -> Result<()> {
        Ok(self.sink().sync()?)
    }
}
