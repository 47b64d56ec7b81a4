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

    /// Makes the refcounts of everything allocated so far durable. Nothing durable may point at an
    /// allocated cluster before. A writer that computes refcounts at its end does nothing here.
    fn flush(&mut self) -> Result<()>;

    /// Lets the clusters given back so far be reused: whatever pointed at them is durably gone. A
    /// writer that never reuses does nothing here.
    fn release(&mut self) -> Result<()>;
}
