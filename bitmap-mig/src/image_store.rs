//! The bitmaps of a qcow2 image at rest, as a store.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use format_spec::Blame;
use mig_core::bitmap::{BitmapInfo, BitmapStore, granules};
use mig_core::{Error, Result};
use qcow2_file::Storage;
use qcow2_file::bitmaps::{BitmapEditor, Bitmaps, Bits, PersistentBitmap};
use qcow2_file::limits::{BITMAP_GRANULARITY_BITS, MAX_BITMAP_BYTES};
use qcow2_file::preflight::read_header;

use crate::summary;

/// The bitmaps of an image whose guest data nobody writes, and whose lock the caller holds. A new
/// bitmap is kept in memory until [`store`](BitmapStore::store) writes all sealed ones in one
/// atomic step, so that the image never has a half of one.
#[derive(Debug)]
pub struct ImageBitmaps {
    file: Arc<dyn Storage>,
    size: u64,
    loading: Mutex<BTreeMap<String, Loading>>,
}

/// A bitmap that is not stored yet.
#[derive(Debug)]
struct Loading {
    bitmap: PersistentBitmap,
    is_sealed: bool,
}

impl ImageBitmaps {
    /// The bitmaps of the image in `file`.
    pub fn open(file: Arc<dyn Storage>) -> qcow2_file::Result<Self> {
        let size = read_header(&*file)?.size & !511;
        Ok(Self { file, size, loading: Mutex::default() })
    }

    fn loading(&self) -> MutexGuard<'_, BTreeMap<String, Loading>> {
        self.loading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stored(&self) -> qcow2_file::Result<Option<Bitmaps>> {
        Bitmaps::open(self.file.clone(), &read_header(&*self.file)?)
    }

    /// Calls `change` with a bitmap that is still loading.
    fn with_loading<T>(
        &self,
        operation: &'static str,
        name: &str,
        change: impl FnOnce(&mut Loading) -> T,
    ) -> Result<T> {
        let mut loading = self.loading();
        let found = loading.get_mut(name).filter(|l| !l.is_sealed);
        found.map(change).ok_or_else(|| refused(operation, name, "it is not being loaded"))
    }
}

fn failed(operation: &'static str, name: &str) -> impl Fn(qcow2_file::Error) -> Error {
    move |e| Error::Bitmap {
        operation,
        name: name.to_owned(),
        blame: e.blame(),
        source: Box::new(e),
    }
}

fn refused(operation: &'static str, name: &str, reason: &str) -> Error {
    Error::Bitmap {
        operation,
        name: name.to_owned(),
        blame: Blame::Caller,
        source: reason.to_owned().into(),
    }
}

impl BitmapStore for ImageBitmaps {
    fn list(&self) -> Result<Vec<BitmapInfo>> {
        let stored = self.stored().map_err(failed("list", "*"))?;
        Ok(stored.iter().flat_map(Bitmaps::list).map(summary).collect())
    }

    fn read_bits(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let stored = self.stored().map_err(failed("load", name))?;
        let stored = stored.ok_or_else(|| refused("load", name, "the image has no bitmaps"))?;
        stored.read_bits(name, offset, buf).map_err(failed("load", name))
    }

    fn create(&self, info: &BitmapInfo) -> Result<()> {
        let name = info.name.as_str();
        let refuse = |reason| Err(refused("create", name, reason));
        let bits = info.granularity.checked_ilog2().and_then(|bits| u8::try_from(bits).ok());
        let Some(granularity_bits) = bits.filter(|_| info.granularity.is_power_of_two()) else {
            return refuse("its granularity is not a power of two");
        };
        let bytes = granules(self.size, info.granularity).div_ceil(8);
        if !BITMAP_GRANULARITY_BITS.contains(&granularity_bits) || bytes > MAX_BITMAP_BYTES {
            return refuse("it has more bits than an image holds, or a granularity that none has");
        }
        let is_known = self.list()?.iter().any(|b| b.name == name);
        let mut loading = self.loading();
        if is_known || loading.contains_key(name) {
            return refuse("there is one of that name");
        }
        let bitmap = PersistentBitmap {
            name: name.to_owned(),
            granularity_bits,
            is_enabled: info.is_enabled,
            bits: Bits::for_disk(self.size, granularity_bits),
        };
        loading.insert(name.to_owned(), Loading { bitmap, is_sealed: false });
        Ok(())
    }

    fn put_bits(&self, name: &str, offset: u64, bits: &[u8]) -> Result<()> {
        self.with_loading("load", name, |l| l.bitmap.bits.write_bytes(offset, bits))
    }

    fn seal(&self, name: &str) -> Result<()> {
        self.with_loading("seal", name, |l| l.is_sealed = true)
    }

    fn store(&self) -> Result<()> {
        let mut loading = self.loading();
        let mut editor = BitmapEditor::open(self.file.clone()).map_err(failed("store", "*"))?;
        for (name, sealed) in loading.iter().filter(|(_, l)| l.is_sealed) {
            editor.add(sealed.bitmap.clone()).map_err(failed("store", name))?;
        }
        editor.commit().map_err(failed("store", "*"))?;
        loading.retain(|_, l| !l.is_sealed);
        Ok(())
    }

    /// Removes it: a bitmap that is not there cannot be trusted by mistake.
    fn invalidate(&self, name: &str) -> Result<()> {
        self.remove(name)
    }

    fn remove(&self, name: &str) -> Result<()> {
        if self.loading().remove(name).is_some() {
            return Ok(());
        }
        let mut editor = BitmapEditor::open(self.file.clone()).map_err(failed("remove", name))?;
        editor.remove(name).map_err(failed("remove", name))?;
        editor.commit().map_err(failed("remove", name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_file::Memory;
    use qcow2_file::create::{CreateOptions, NewImage};

    fn store() -> ImageBitmaps {
        let file = Arc::new(Memory::new());
        NewImage::create(file.clone(), &CreateOptions::new(1 << 30)).unwrap().finish(&[]).unwrap();
        ImageBitmaps::open(file).unwrap()
    }

    fn info(name: &str) -> BitmapInfo {
        BitmapInfo {
            name: name.into(),
            granularity: 65536,
            is_enabled: false,
            is_persistent: true,
            is_inconsistent: false,
        }
    }

    #[test]
    fn a_bitmap_is_there_once_it_is_stored_and_as_it_was_put() {
        let store = store();
        store.create(&info("a")).unwrap();
        store.create(&info("b")).unwrap();
        assert!(store.create(&info("a")).is_err());
        store.put_bits("a", 8, &[0xf0, 1]).unwrap();
        store.put_bits("a", 8, &[0x0f]).unwrap();
        assert!(store.list().unwrap().is_empty());
        store.seal("a").unwrap();
        assert!(store.put_bits("a", 0, &[1]).is_err());
        store.store().unwrap();
        assert_eq!(store.list().unwrap(), [info("a")]);
        let mut bits = [0; 16];
        store.read_bits("a", 0, &mut bits).unwrap();
        assert_eq!(bits[8..10], [0x0f, 1]);
        store.seal("b").unwrap();
        store.store().unwrap();
        assert_eq!(store.list().unwrap().len(), 2);
        store.remove("a").unwrap();
        store.invalidate("b").unwrap();
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let store = store();
        for granularity in [0, 1, 256, 1000, 1 << 32] {
            assert!(store.create(&BitmapInfo { granularity, ..info("a") }).is_err());
        }
        assert!(store.put_bits("a", 0, &[1]).is_err());
        assert!(store.seal("a").is_err());
        assert!(store.remove("a").is_err());
        assert!(store.read_bits("a", 0, &mut [0]).is_err());
    }
}
