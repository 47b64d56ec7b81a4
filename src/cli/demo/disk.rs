//! The demo's disk: a qcow2 image whose bitmaps say what was written since each was started, since
//! every write below passes through the one function that marks them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bitferry::{Error, Observer, Result};
use block_mig::TrackedDisk;
use block_mig::device::EditorDisk;
use block_mig::tracked::HandedOver;
use qcow2_file::bitmaps::{Bits, PersistentBitmap};
use qcow2_file::create::{CreateOptions, NewImage};
use qcow2_file::storage::HostFile;
use qcow2_file::{GuestOffset, Storage};

/// Guest-visible size of the disk.
const DISK_BYTES: u64 = 512 << 20;
/// What a guest installs before anybody asks for a backup.
const INSTALLED_BYTES: u64 = 192 << 20;
/// The part of the disk that a guest keeps writing to: logs, databases.
const BUSY_BYTES: u64 = 48 << 20;
/// Bytes of the writes while the disk is installed.
const INSTALL_WRITE_BYTES: usize = 1 << 20;
/// Most that a guest writes at once.
const MAX_WRITE_BYTES: usize = 64 << 10;
/// What a guest does between two writes.
const BETWEEN_WRITES: Duration = Duration::from_micros(500);
/// Writes between the start of one bitmap and the next.
const WRITES_PER_DAY: u64 = 250;

/// Bitmaps in the order in which they are started, with the logarithm of their granularity.
const BITMAPS: [(&str, u8); 3] = [("weekly", 20), ("nightly", 16), ("hourly", 12)];

/// A disk that is being used, and the bitmaps that record its use.
struct MadeDisk {
    image: NewImage,
    bitmaps: Vec<PersistentBitmap>,
    random: Random,
}

/// Makes the disk at `path` and lives through its history: an installation, then three bitmaps,
/// each started a while after the one before, with small writes all over the disk.
pub(super) fn make(path: &Path, observer: &dyn Observer) -> Result<()> {
    let file: Arc<dyn Storage> = Arc::new(HostFile::create_new(path)?);
    let image = NewImage::create(Arc::clone(&file), &CreateOptions::new(DISK_BYTES))?;
    let mut disk = MadeDisk { image, bitmaps: Vec::new(), random: Random(0x0b17_fe44) };
    let mut buf = vec![0; INSTALL_WRITE_BYTES];
    // A partition, a gap that stays a hole, another partition.
    for at in (0..INSTALLED_BYTES).step_by(INSTALL_WRITE_BYTES) {
        let gap = if at < INSTALLED_BYTES / 2 { 0 } else { DISK_BYTES / 2 };
        disk.random.fill(&mut buf);
        disk.write(&buf, at + gap)?;
        if observer.is_cancelled() {
            return Err(Error::Interrupted);
        }
    }
    for (name, granularity_bits) in BITMAPS {
        disk.start_bitmap(name, granularity_bits);
        for _ in 0..WRITES_PER_DAY {
            disk.write_somewhere(&mut buf)?;
        }
    }
    disk.image.finish(&disk.bitmaps)?;
    Ok(())
}

impl MadeDisk {
    /// From now on writes are recorded under this name.
    fn start_bitmap(&mut self, name: &str, granularity_bits: u8) {
        self.bitmaps.push(PersistentBitmap {
            name: name.to_owned(),
            granularity_bits,
            is_enabled: true,
            bits: Bits::for_disk(DISK_BYTES, granularity_bits),
        });
    }

    /// One small write of a guest: 4 to 64 KiB, at a multiple of 4 KiB, mostly where it writes
    /// often.
    fn write_somewhere(&mut self, buf: &mut [u8]) -> Result<()> {
        let (at, len) = self.random.place();
        let Some(buf) = usize::try_from(len).ok().and_then(|len| buf.get_mut(..len)) else {
            return Ok(());
        };
        self.random.fill(buf);
        self.write(buf, at)
    }

    /// The only way to this disk: data first, then every bitmap that has been started.
    fn write(&mut self, buf: &[u8], at: u64) -> Result<()> {
        self.image.write_at(buf, GuestOffset(at))?;
        let end = at + buf.len() as u64;
        for bitmap in &mut self.bitmaps {
            let bits = bitmap.granularity_bits;
            bitmap.bits.set_range(at >> bits..((end - 1) >> bits) + 1);
        }
        Ok(())
    }
}

/// A guest that goes on writing where it writes often, and marks with each write what its bitmaps
/// must know, until the disk is not its own any more.
pub(super) struct Guest<'a> {
    pub(super) disk: &'a TrackedDisk<EditorDisk>,
    /// Writes that were completed.
    pub(super) writes: &'a AtomicU64,
    /// Whether it is to stop in any case.
    pub(super) is_over: &'a AtomicBool,
}

impl Guest<'_> {
    /// Writes until the destination has taken over. Returns an error of the disk.
    pub(super) fn live(&self) -> Result<()> {
        let mut random = Random(0x5eed_1e55);
        let mut buf = vec![0; MAX_WRITE_BYTES];
        while !self.is_over.load(Ordering::Acquire) {
            let (at, len) = random.place();
            let len = usize::try_from(len).unwrap_or(MAX_WRITE_BYTES);
            let Some(buf) = buf.get_mut(..len) else { break };
            random.fill(buf);
            match self.disk.write(buf, at) {
                Ok(()) => _ = self.writes.fetch_add(1, Ordering::Relaxed),
                Err(error) if is_handed_over(&error) => break,
                Err(error) => return Err(error.into()),
            }
            std::thread::sleep(BETWEEN_WRITES);
        }
        Ok(())
    }
}

fn is_handed_over(error: &mig_core::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<HandedOver>())
}

/// xorshift64*: the same disk on every machine, so that two runs print the same hash.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Where a guest writes next, and how much: mostly in the busy part.
    fn place(&mut self) -> (u64, u64) {
        let len = 4096 * (1 + self.below(MAX_WRITE_BYTES as u64 / 4096));
        let range = if self.below(10) < 9 { BUSY_BYTES } else { DISK_BYTES };
        (4096 * self.below((range - len) / 4096), len)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}
