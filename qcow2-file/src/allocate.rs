//! Where new clusters come from.

use crate::error::Result;
use crate::layout::units::HostOffset;

/// A source of host clusters: the append-only writer's end of file, or the editor's refcounts.
/// Whoever stores a structure in clusters (bitmaps, tables) needs no more than this.
pub trait Allocate {
    /// Allocates `clusters` contiguous clusters with refcount one. Their content is undefined.
    fn allocate(&mut self, clusters: u64) -> Result<HostOffset>;

    /// Gives clusters back. They are not reused before what pointed at them is durably gone.
    fn free(&mut self, at: HostOffset, clusters: u64) -> Result<()>;
}
