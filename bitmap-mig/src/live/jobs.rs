//! What backup jobs do with bitmaps, also while they are being migrated.
//!
//! Bits change atomically one by one: a job that needs the bitmap as of one moment pauses the guest
//! around it, as it does for the point in time of its backup.

use std::sync::atomic::{AtomicBool, Ordering};

use mig_core::bitmap::{BitmapInfo, granules};
use mig_core::dirty::AtomicBits;
use qcow2_file::limits::{BITMAP_GRANULARITY_BITS, MAX_BITMAP_BYTES};

use super::one::{Life, Slot};
use super::{JobError, JobResult, LiveBitmaps};
use crate::Bitmap;

impl LiveBitmaps {
    /// Adds a bitmap with all bits clear; an enabled one records writes from now on.
    pub fn add(&self, info: &BitmapInfo) -> JobResult<()> {
        let _job = self.job()?;
        let slot = Slot::new(self.new_life(info)?);
        self.insert(slot)
    }

    /// Adds a persistent bitmap with its bits, as it was loaded from an image.
    pub fn add_loaded(&self, bitmap: &Bitmap) -> JobResult<()> {
        let _job = self.job()?;
        let info = BitmapInfo {
            name: bitmap.name.clone(),
            granularity: 1u64.checked_shl(bitmap.granularity_bits.into()).unwrap_or(0),
            is_enabled: bitmap.is_enabled,
            is_persistent: true,
            is_inconsistent: false,
        };
        let life = self.new_life(&info)?;
        if life.bits.len() != bitmap.bits.len() {
            let reason = format!("{} bits are not one per granule", bitmap.bits.len());
            return Err(JobError::Wrong { name: bitmap.name.clone(), reason });
        }
        for run in bitmap.bits.runs() {
            life.bits.set_range(run);
        }
        self.insert(Slot::new(life))
    }

    /// Removes a bitmap, in whatever state it is.
    pub fn remove(&self, name: &str) -> JobResult<()> {
        let _job = self.job()?;
        let slot = self.find(name)?;
        if slot.successor.is_some() {
            return Err(JobError::Loading { name: name.to_owned() });
        }
        self.take_out(name);
        Ok(())
    }

    /// Clears all bits.
    pub fn clear(&self, name: &str) -> JobResult<()> {
        let _job = self.job()?;
        self.usable(name)?.clear();
        Ok(())
    }

    /// Adds the bits of `source`, of any granularity, to `target`.
    pub fn merge(&self, target: &str, source: &str) -> JobResult<()> {
        let _job = self.job()?;
        let (target, source) = (self.usable(target)?, self.usable(source)?);
        target.merge(&source.life);
        Ok(())
    }

    /// Whether it records writes from now on. When this returns, what is written later is or is
    /// not recorded as it says.
    pub fn set_enabled(&self, name: &str, is_enabled: bool) -> JobResult<()> {
        let _job = self.job()?;
        self.usable(name)?.life.is_enabled.store(is_enabled, Ordering::Release);
        Ok(())
    }

    /// A bitmap that makes sense for this disk, empty.
    pub(super) fn new_life(&self, info: &BitmapInfo) -> JobResult<Life> {
        let wrong = |reason: String| JobError::Wrong { name: info.name.clone(), reason };
        let bits = info.granularity.checked_ilog2().and_then(|bits| u8::try_from(bits).ok());
        let granularity_bits = bits
            .filter(|_| info.granularity.is_power_of_two())
            .filter(|bits| BITMAP_GRANULARITY_BITS.contains(bits))
            .ok_or_else(|| wrong(format!("granularity {} is not possible", info.granularity)))?;
        if !(1..=1023).contains(&info.name.len()) || info.name.contains('\0') {
            return Err(wrong("a name has 1 to 1023 bytes and no NUL".to_owned()));
        }
        let granules = granules(self.size, info.granularity);
        if granules.div_ceil(8) > MAX_BITMAP_BYTES {
            let reason = format!(
                "at a granularity of {} it would take more than {MAX_BITMAP_BYTES} bytes",
                info.granularity
            );
            return Err(wrong(reason));
        }
        Ok(Life {
            name: info.name.clone(),
            granularity_bits,
            is_persistent: info.is_persistent,
            is_enabled: AtomicBool::new(info.is_enabled),
            is_inconsistent: AtomicBool::new(info.is_inconsistent),
            bits: AtomicBits::new(granules),
        })
    }

    pub(super) fn insert(&self, slot: Slot) -> JobResult<()> {
        let mut slots = self.write();
        if slots.iter().any(|other| other.life.name == slot.life.name) {
            return Err(JobError::Exists { name: slot.life.name.clone() });
        }
        slots.push(slot);
        Ok(())
    }

    /// Takes a bitmap out of the list; guest threads do not see it any more when this returns.
    pub(super) fn take_out(&self, name: &str) {
        self.write().retain(|slot| slot.life.name != name);
    }
}
