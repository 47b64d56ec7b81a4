//! What decoding found out and may be wanted again soon.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::layout::entry::CompressedEntry;
use crate::layout::units::GuestOffset;
use crate::limits;

/// The last compressed cluster that somebody read a part of. Who reads in small pieces in order
/// decodes each cluster once.
#[derive(Debug, Default)]
pub(super) struct RecentCluster(Mutex<Option<Recent>>);

#[derive(Debug)]
struct Recent {
    layer: u32,
    cluster: GuestOffset,
    content: Arc<[u8]>,
}

impl RecentCluster {
    pub(super) fn find(&self, layer: u32, cluster: GuestOffset) -> Option<Arc<[u8]>> {
        let held = lock(&self.0);
        let recent = held.as_ref().filter(|r| (r.layer, r.cluster) == (layer, cluster))?;
        Some(recent.content.clone())
    }

    pub(super) fn keep(&self, layer: u32, cluster: GuestOffset, content: &[u8]) {
        *lock(&self.0) = Some(Recent { layer, cluster, content: content.into() });
    }

    pub(super) fn forget(&self) {
        *lock(&self.0) = None;
    }
}

/// Exact lengths of compressed clusters that were decoded lately, by where they are: a table in
/// which a new one takes the place of an old one.
#[derive(Debug, Default)]
pub(super) struct KnownLengths(Mutex<Vec<Known>>);

/// One length; `len` 0 means that the slot is empty.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    offset: u64,
    layer: u32,
    len: u32,
}

impl KnownLengths {
    fn slot(layer: u32, entry: CompressedEntry) -> usize {
        // Clusters lie close together: multiplying spreads them, the upper bits are the best mixed.
        let key = entry.offset.0 ^ u64::from(layer) << 56;
        let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        usize::try_from(mixed >> 32).unwrap_or(0) % limits::KNOWN_COMPRESSED_LENGTHS
    }

    /// The length of the stream at `entry`, never more than the entry covers.
    pub(super) fn find(&self, layer: u32, entry: CompressedEntry) -> Option<usize> {
        let known = lock(&self.0).get(Self::slot(layer, entry)).copied()?;
        let is_same = known.len != 0 && (known.layer, known.offset) == (layer, entry.offset.0);
        let is_covered = u64::from(known.len) <= entry.max_bytes();
        if is_same && is_covered { usize::try_from(known.len).ok() } else { None }
    }

    pub(super) fn keep(&self, layer: u32, entry: CompressedEntry, len: usize) {
        let Ok(len) = u32::try_from(len) else { return };
        let mut held = lock(&self.0);
        if held.is_empty() {
            held.resize(limits::KNOWN_COMPRESSED_LENGTHS, Known::default());
        }
        if let Some(slot) = held.get_mut(Self::slot(layer, entry)) {
            *slot = Known { offset: entry.offset.0, layer, len };
        }
    }

    pub(super) fn forget(&self) {
        lock(&self.0).clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
