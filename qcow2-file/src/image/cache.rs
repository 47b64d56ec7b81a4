//! L2 tables in memory, a slice at a time, for all layers of a chain and all threads.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::limits;

/// Which slice: the layer's number, and the slice's offset in that layer's file.
type Key = (u32, u64);

/// Raw L2 entries of one slice, as words of this machine.
pub(super) type Slice = Arc<[u64]>;

/// Slices of L2 tables, at most [`limits::L2_CACHE_BYTES`] of them. Looking one up takes a shared
/// lock; reading one from the file happens outside of any lock, so that two threads may read the
/// same slice, which is harmless.
#[derive(Debug, Default)]
pub(super) struct TableCache(RwLock<Held>);

#[derive(Debug, Default)]
struct Held {
    slices: HashMap<Key, Entry>,
    /// Every key once, oldest first.
    order: VecDeque<Key>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    slice: Slice,
    /// Spares the slice once when room is needed.
    was_used: AtomicBool,
}

impl TableCache {
    pub(super) fn find(&self, layer: u32, at: u64) -> Option<Slice> {
        let held = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let entry = held.slices.get(&(layer, at))?;
        entry.was_used.store(true, Ordering::Relaxed);
        Some(entry.slice.clone())
    }

    pub(super) fn keep(&self, layer: u32, at: u64, slice: Slice) {
        let mut held = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let new = Entry { slice, was_used: AtomicBool::new(false) };
        held.bytes += cost(&new);
        match held.slices.insert((layer, at), new) {
            Some(old) => held.bytes -= cost(&old),
            None => held.order.push_back((layer, at)),
        }
        held.shrink();
    }

    /// Forgets all slices of a layer, for whoever changed its tables.
    pub(super) fn forget(&self, layer: u32) {
        let mut held = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Held { slices, order, bytes } = &mut *held;
        slices.retain(|key, _| key.0 != layer);
        order.retain(|key| key.0 != layer);
        *bytes = slices.values().map(cost).sum();
    }
}

impl Held {
    /// Second chance: what was used since it was last looked at goes to the end of the queue.
    fn shrink(&mut self) {
        while self.bytes > limits::L2_CACHE_BYTES && self.order.len() > 1 {
            let Some(key) = self.order.pop_front() else { return };
            let is_spared =
                self.slices.get(&key).is_some_and(|e| e.was_used.swap(false, Ordering::Relaxed));
            if is_spared {
                self.order.push_back(key);
            } else if let Some(old) = self.slices.remove(&key) {
                self.bytes -= cost(&old);
            }
        }
    }
}

/// Bytes an entry takes, with what the map and the queue need for it.
fn cost(entry: &Entry) -> usize {
    const OVERHEAD_BYTES: usize = 128;
    entry.slice.len() * 8 + OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_small_and_spares_what_is_used() {
        let (cache, layer) = (TableCache::default(), 3);
        let slice: Slice = vec![7; 8192].into();
        for n in 0..1000 {
            cache.keep(layer, n << 16, slice.clone());
            assert!(n == 0 || cache.find(layer, 0).is_some(), "at {n}");
        }
        let held = cache.0.read().unwrap();
        assert!(held.bytes <= limits::L2_CACHE_BYTES);
        assert_eq!(held.order.len(), held.slices.len());
        drop(held);
        cache.forget(layer);
        assert_eq!(cache.0.read().unwrap().bytes, 0);
    }
}
