//! The bitmaps of a disk that a guest is writing to.
//!
//! [`LiveBitmaps`] is one object with three sides: guest threads mark writes (it is the
//! [`Recorder`] of a tracked disk), backup jobs add, clear, merge and remove at any time, and a
//! migration sends what changed (`Sender`) or, at the destination, loads what arrives (it is a
//! [`BitmapStore`]).

mod jobs;
mod one;
mod save;
mod sender;
mod store;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};

use mig_core::bitmap::{BitmapInfo, BitmapStore};
use mig_core::dirty::Recorder;
use qcow2_file::bitmaps::Bits;

use self::one::Slot;
pub use self::save::SaveLive;
pub use self::sender::{Carry, Numbers, PieceCounts, Sender};

/// Result of a backup job.
pub type JobResult<T, E = JobError> = std::result::Result<T, E>;

/// Why a backup job could not do what it wanted with a bitmap.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// There is one of that name.
    #[error("there is a bitmap {name:?} already")]
    Exists {
        /// The name.
        name: String,
    },
    /// There is none of that name.
    #[error("there is no bitmap {name:?}")]
    NoBitmap {
        /// The name.
        name: String,
    },
    /// It is still arriving from the source of a migration.
    #[error("bitmap {name:?} is being loaded")]
    Loading {
        /// The name.
        name: String,
    },
    /// Its content is not to be trusted.
    #[error("bitmap {name:?} is inconsistent; it can only be removed")]
    Inconsistent {
        /// The name.
        name: String,
    },
    /// What was asked for makes no sense.
    #[error("bitmap {name:?}: {reason}")]
    Wrong {
        /// The name.
        name: String,
        /// What, with the values.
        reason: String,
    },
    /// The destination of a migration has taken over.
    #[error("the disk has been handed over to the destination of a migration")]
    HandedOver,
}

/// Whether backup jobs may change something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Jobs {
    Run,
    /// They wait: bitmaps are being sealed.
    Wait,
    /// They fail: the destination has taken over.
    HandedOver,
}

/// The bitmaps of one disk in memory. All methods may be called from any thread.
///
/// Bits take memory only where they were set. A guest's write costs one shared lock and, for each
/// enabled bitmap, a load where the granule is marked already.
pub struct LiveBitmaps {
    size: u64,
    /// Taken for reading by guest threads, for writing only to exchange slots.
    slots: RwLock<Vec<Slot>>,
    /// Held by a backup job as long as it works, so that jobs come one after another.
    jobs: Mutex<Jobs>,
    jobs_changed: Condvar,
    /// Where persistent bitmaps are kept when they are stored.
    keeper: Option<Arc<dyn BitmapStore>>,
}

impl std::fmt::Debug for LiveBitmaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiveBitmaps").field("slots", &*self.read()).finish_non_exhaustive()
    }
}

impl LiveBitmaps {
    /// None yet, of a disk of `size` bytes; they live in memory only.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            slots: RwLock::default(),
            jobs: Mutex::new(Jobs::Run),
            jobs_changed: Condvar::new(),
            keeper: None,
        }
    }

    /// Like [`new`](Self::new); [`store`](BitmapStore::store) puts persistent ones into `keeper`,
    /// which is to be the image's own bitmaps, with the guest no longer writing.
    pub fn kept_in(size: u64, keeper: Arc<dyn BitmapStore>) -> Self {
        Self { keeper: Some(keeper), ..Self::new(size) }
    }

    /// Guest bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// All bitmaps, in the order in which they were added.
    pub fn all(&self) -> Vec<BitmapInfo> {
        self.read().iter().map(|slot| slot.life.info()).collect()
    }

    /// A copy of a bitmap's bits as they are now.
    pub fn snapshot(&self, name: &str) -> JobResult<Bits> {
        Ok(self.usable(name)?.life.snapshot())
    }

    /// Number of set bits.
    pub fn count(&self, name: &str) -> JobResult<u64> {
        Ok(self.usable(name)?.life.bits.count())
    }

    /// Makes backup jobs wait from now on, once the one that works is done. The guest is paused:
    /// nothing changes any more. Idempotent.
    pub fn freeze(&self) {
        let mut jobs = self.lock_jobs();
        if *jobs == Jobs::Run {
            *jobs = Jobs::Wait;
        }
    }

    /// Lets backup jobs go on: the migration was called off.
    pub fn thaw(&self) {
        let mut jobs = self.lock_jobs();
        if *jobs == Jobs::Wait {
            *jobs = Jobs::Run;
        }
        drop(jobs);
        self.jobs_changed.notify_all();
    }

    /// Makes backup jobs fail from now on: the destination has taken over.
    pub fn retire(&self) {
        *self.lock_jobs() = Jobs::HandedOver;
        self.jobs_changed.notify_all();
    }

    /// Waits until backup jobs may work, and keeps others out as long as the guard lives.
    fn job(&self) -> JobResult<MutexGuard<'_, Jobs>> {
        let waits = |jobs: &mut Jobs| *jobs == Jobs::Wait;
        let jobs = self.jobs_changed.wait_while(self.lock_jobs(), waits);
        let jobs = jobs.unwrap_or_else(PoisonError::into_inner);
        if *jobs == Jobs::HandedOver { Err(JobError::HandedOver) } else { Ok(jobs) }
    }

    fn lock_jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slot of a bitmap that is neither loading nor broken.
    fn usable(&self, name: &str) -> JobResult<Slot> {
        let slot = self.find(name)?;
        if slot.successor.is_some() {
            return Err(JobError::Loading { name: name.to_owned() });
        }
        if slot.life.info().is_inconsistent {
            return Err(JobError::Inconsistent { name: name.to_owned() });
        }
        Ok(slot)
    }

    fn find(&self, name: &str) -> JobResult<Slot> {
        let slots = self.read();
        let found = slots.iter().find(|slot| slot.life.name == name).cloned();
        found.ok_or_else(|| JobError::NoBitmap { name: name.to_owned() })
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<Slot>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<Slot>> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Recorder for LiveBitmaps {
    fn record_write(&self, range: Range<u64>) {
        if !range.is_empty() {
            self.read().iter().for_each(|slot| slot.record(range.clone()));
        }
    }
}
