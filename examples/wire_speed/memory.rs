//! Warm memory as a disk.

use std::sync::{Arc, Mutex, PoisonError};

use bitferry::DiskProof;
use bitferry::incoming::{Destination, Place, Sealed, SessionId, Wanted};
use block_mig::{Landing, Unwatched};
use format_spec::native::hello::SessionState;
use mig_core::Result;
use mig_core::block::{BlockSink, BlockSource, Extent, ExtentKind};
use mig_core::section::Fate;
use mig_core::stream;

const SLAB_BYTES: u64 = 1 << 20;

/// A disk in slabs of 1 MiB, so that threads do not wait for one another.
pub(crate) struct Slabs(Vec<Mutex<Vec<u8>>>);

impl Slabs {
    /// Bytes without a pattern. `size` is a number of MiB.
    pub(crate) fn random(size: u64) -> Self {
        let mut x = size | 1;
        let mut next = || {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            x.to_le_bytes()
        };
        let words = SLAB_BYTES / 8;
        let mut slab = || (0..words).flat_map(|_| next()).collect();
        Self((0..size / SLAB_BYTES).map(|_| Mutex::new(slab())).collect())
    }

    /// Calls `look` with the parts of a range: where it is in the buffer, and the slab's bytes.
    fn each(&self, offset: u64, len: usize, mut look: impl FnMut(usize, &mut [u8])) {
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let index = usize::try_from(at / SLAB_BYTES).unwrap_or(usize::MAX);
            let start = usize::try_from(at % SLAB_BYTES).unwrap_or(usize::MAX);
            let Some(slab) = self.0.get(index) else { return };
            let mut slab = slab.lock().unwrap_or_else(PoisonError::into_inner);
            let end = slab.len().min(start + (len - done));
            let Some(part) = slab.get_mut(start..end) else { return };
            look(done, part);
            done += end - start;
        }
    }
}

impl BlockSource for Slabs {
    fn size(&self) -> u64 {
        self.0.len() as u64 * SLAB_BYTES
    }

    fn extent(&self, _offset: u64, max_len: u64) -> Result<Extent> {
        Ok(Extent { len: max_len, kind: ExtentKind::Data, host: None })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len();
        self.each(offset, len, |at, part| buf[at..at + part.len()].copy_from_slice(part));
        Ok(())
    }
}

impl BlockSink for Slabs {
    fn size(&self) -> u64 {
        BlockSource::size(self)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.each(offset, buf.len(), |at, part| part.copy_from_slice(&buf[at..at + part.len()]));
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.each(offset, usize::try_from(len).unwrap_or(usize::MAX), |_, part| part.fill(0));
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn reads_as_zero(&self, _offset: u64, _len: u64) -> bool {
        false
    }

    fn allocation_unit(&self) -> u64 {
        65536
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

/// Slabs as the place of the one disk that comes.
pub(crate) struct Target(Arc<Slabs>);

impl Target {
    pub(crate) fn new(slabs: Arc<Slabs>) -> Self {
        Self(slabs)
    }
}

impl Destination for Target {
    fn begin(&self, _session: SessionId) -> stream::Result<SessionState> {
        Ok(SessionState::Fresh)
    }

    fn place(&self, _wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        Ok(Arc::new(Self(self.0.clone())))
    }

    fn commit(&self) -> stream::Result<()> {
        Ok(())
    }

    fn abort(&self, _fate: Fate) {}
}

impl Landing for Target {
    fn sink(&self) -> &dyn BlockSink {
        &*self.0
    }
}

impl Place for Target {
    fn prepare(&self, sealed: &Sealed) -> stream::Result<Option<DiskProof>> {
        if sealed.content.is_none() {
            return Ok(None);
        }
        let content = block_mig::content_hash(&*self.0, 2, &Unwatched)?;
        Ok(Some(DiskProof { content: Some(content), bitmaps: Vec::new() }))
    }
}
