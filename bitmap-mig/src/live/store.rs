//! The bitmaps of a disk at the destination: what arrives replaces, what the guest already writes
//! there is added.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use format_spec::Blame;
use mig_core::bitmap::{BitmapInfo, BitmapStore};
use mig_core::dirty::{AtomicBits, CHUNK_BYTES};
use mig_core::{Error, Result};

use super::one::Slot;
use super::{JobError, LiveBitmaps};
use crate::running_digest::read_chunk;

impl LiveBitmaps {
    /// Replaces whether a bitmap records writes, loading or not, as its source says.
    pub fn update(&self, name: &str, is_enabled: bool) -> Result<()> {
        let _job = self.job().map_err(failed("update", name))?;
        let slot = self.find(name).map_err(failed("update", name))?;
        slot.life.is_enabled.store(is_enabled, Ordering::Release);
        Ok(())
    }

    fn loading(&self, operation: &'static str, name: &str) -> Result<Slot> {
        let slot = self.find(name).map_err(failed(operation, name))?;
        if slot.successor.is_none() {
            return Err(refused(operation, name, "it is not being loaded"));
        }
        Ok(slot)
    }

    /// Puts the sealed persistent bitmaps into the keeper.
    fn keep(&self, keeper: &dyn BitmapStore) -> Result<()> {
        let kept = keeper.list()?;
        let mut bytes = Vec::new();
        let slots = self.read().clone();
        let usable = |slot: &&Slot| slot.successor.is_none() && !slot.life.info().is_inconsistent;
        for slot in slots.iter().filter(usable).filter(|slot| slot.life.is_persistent) {
            let info = slot.life.info();
            if kept.iter().any(|other| other.name == info.name) {
                keeper.remove(&info.name)?;
            }
            keeper.create(&info)?;
            for chunk in slot.life.bits.chunks() {
                let offset = chunk.saturating_mul(CHUNK_BYTES);
                read_chunk(&slot.life.bits, offset, &mut bytes);
                keeper.put_bits(&info.name, offset, &bytes)?;
            }
            keeper.seal(&info.name)?;
        }
        keeper.store()
    }
}

impl BitmapStore for LiveBitmaps {
    fn list(&self) -> Result<Vec<BitmapInfo>> {
        Ok(self.all())
    }

    fn read_bits(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let slot = self.find(name).map_err(failed("read", name))?;
        if slot.life.info().is_inconsistent {
            return Err(refused("read", name, "it is inconsistent"));
        }
        if !offset.is_multiple_of(8) {
            return Err(refused("read", name, "bits are read from whole words"));
        }
        slot.life.bits.read_bytes(offset, buf);
        Ok(())
    }

    fn create(&self, info: &BitmapInfo) -> Result<()> {
        let life = self.new_life(info).map_err(failed("create", &info.name))?;
        let successor = Some(Arc::new(AtomicBits::new(life.bits.len())));
        let slot = Slot { successor, ..Slot::new(life) };
        self.insert(slot).map_err(failed("create", &info.name))
    }

    fn put_bits(&self, name: &str, offset: u64, bits: &[u8]) -> Result<()> {
        if !offset.is_multiple_of(8) || !bits.len().is_multiple_of(8) {
            return Err(refused("load", name, "bits come in whole words"));
        }
        // Held until they are written: once it is sealed, the guest's own bits are among them.
        let slots = self.read();
        let slot = slots.iter().find(|slot| slot.life.name == name);
        match slot.filter(|slot| slot.successor.is_some()) {
            Some(slot) => slot.life.bits.write_bytes(offset, bits),
            None => return self.loading("load", name).map(drop),
        };
        Ok(())
    }

    fn seal(&self, name: &str) -> Result<()> {
        self.loading("seal", name)?;
        // No guest thread is marking while slots are exchanged.
        let mut slots = self.write();
        let found = slots.iter_mut().find(|slot| slot.life.name == name);
        if let Some((slot, successor)) = found.and_then(|s| s.successor.take().map(|x| (s, x))) {
            slot.life.bits.merge(&successor);
        }
        Ok(())
    }

    /// Makes them valid in the keeper, where there is one; else they live in memory alone, as long
    /// as the guest does.
    fn store(&self) -> Result<()> {
        self.keeper.as_deref().map_or(Ok(()), |keeper| self.keep(keeper))
    }

    fn invalidate(&self, name: &str) -> Result<()> {
        let _job = self.job().map_err(failed("invalidate", name))?;
        let slot = self.find(name).map_err(failed("invalidate", name))?;
        slot.life.is_inconsistent.store(true, Ordering::Release);
        match &self.keeper {
            Some(keeper) if keeper.list()?.iter().any(|kept| kept.name == name) => {
                keeper.invalidate(name)
            }
            _ => Ok(()),
        }
    }

    fn remove(&self, name: &str) -> Result<()> {
        let _job = self.job().map_err(failed("remove", name))?;
        self.find(name).map_err(failed("remove", name))?;
        self.take_out(name);
        Ok(())
    }
}

fn failed<'a>(operation: &'static str, name: &'a str) -> impl Fn(JobError) -> Error + 'a {
    move |error| Error::Bitmap {
        operation,
        name: name.to_owned(),
        blame: Blame::Caller,
        source: Box::new(error),
    }
}

fn refused(operation: &'static str, name: &str, reason: &'static str) -> Error {
    Error::Bitmap { operation, name: name.to_owned(), blame: Blame::Caller, source: reason.into() }
}
