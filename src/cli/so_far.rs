//! What is known of a long operation that fails: its summary is made without a report.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bitferry::report::BitmapReport;

/// What was told of an operation before its error.
#[derive(Debug, Default)]
pub(crate) struct SoFar {
    wire_bytes: AtomicU64,
    invalidated: Mutex<Vec<(String, Vec<BitmapReport>)>>,
}

impl SoFar {
    /// So many bytes went over the wire.
    pub(crate) fn wire(&self, bytes: u64) {
        self.wire_bytes.store(bytes, Ordering::Relaxed);
    }

    /// These bitmaps of a disk cannot be trusted.
    pub(crate) fn invalidated(&self, id: &str, bitmaps: &[BitmapReport]) {
        self.lock().push((id.to_owned(), bitmaps.to_vec()));
    }

    /// Bytes on the wire.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.wire_bytes.load(Ordering::Relaxed)
    }

    /// Bitmaps of a disk that cannot be trusted; of whatever disk where there is one alone, which
    /// may be called otherwise here.
    pub(crate) fn bitmaps(&self, id: &str, is_only: bool) -> Vec<BitmapReport> {
        let found = self.lock();
        let of = found.iter().filter(|(of, _)| is_only || of == id);
        of.flat_map(|(_, bitmaps)| bitmaps.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(String, Vec<BitmapReport>)>> {
        self.invalidated.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
