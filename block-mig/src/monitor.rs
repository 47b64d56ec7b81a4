//! How a transfer is watched and stopped.

/// Who watches a transfer. Called from any worker, about once per unit.
pub trait Monitor: Send + Sync {
    /// That many more bytes of content are done.
    fn advance(&self, _bytes: u64) {}

    /// Whether to stop.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Watches nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unwatched;

impl Monitor for Unwatched {}
