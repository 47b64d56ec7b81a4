//! A disk in memory for tests, with a state per sector and a fault.

use std::collections::BTreeMap;
use std::sync::Mutex;

use format_spec::Blame;
use mig_core::block::{
    BlockSink, BlockSource, CompressedUnit, Compression, Extent, ExtentKind, SECTOR_BYTES,
};
use mig_core::{Error, Result};

#[derive(Default)]
struct Inner {
    bytes: Vec<u8>,
    kinds: Vec<ExtentKind>,
    packed: BTreeMap<u64, u64>,
    writes: u64,
    zero_writes: u64,
}

/// A disk in memory.
pub(crate) struct MemoryDisk {
    inner: Mutex<Inner>,
    pub(crate) fresh: bool,
    pub(crate) cluster: u64,
    pub(crate) takes_compressed: bool,
    /// Operations that touch this byte fail.
    pub(crate) bad: Option<u64>,
}

fn sectors(offset: u64, len: u64) -> std::ops::Range<usize> {
    let index = |n: u64| usize::try_from(n).unwrap();
    index(offset / SECTOR_BYTES)..index((offset + len).div_ceil(SECTOR_BYTES))
}

fn span(offset: u64, len: usize) -> std::ops::Range<usize> {
    let start = usize::try_from(offset).unwrap();
    start..start + len
}

impl MemoryDisk {
    pub(crate) fn new(size: u64) -> Self {
        let bytes = vec![0; usize::try_from(size).unwrap()];
        let kinds = vec![ExtentKind::Hole; bytes.len() / 512];
        let inner = Mutex::new(Inner { bytes, kinds, ..Inner::default() });
        Self { inner, fresh: true, cluster: 65536, takes_compressed: false, bad: None }
    }

    /// Not known to be zero, and it is not.
    pub(crate) fn dirty(size: u64) -> Self {
        let mut disk = Self::new(size);
        disk.fresh = false;
        disk.fill(0, size, 0xee, ExtentKind::Data);
        disk
    }

    pub(crate) fn fill(&mut self, offset: u64, len: u64, byte: u8, kind: ExtentKind) {
        let inner = self.inner.get_mut().unwrap();
        inner.bytes[span(offset, usize::try_from(len).unwrap())].fill(byte);
        inner.kinds[sectors(offset, len)].fill(kind);
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.inner.lock().unwrap().bytes.clone()
    }

    /// Writes of data and of zeroes so far.
    pub(crate) fn writes(&self) -> (u64, u64) {
        let inner = self.inner.lock().unwrap();
        (inner.writes, inner.zero_writes)
    }

    /// Compressed clusters received: offset to length.
    pub(crate) fn packed(&self) -> BTreeMap<u64, u64> {
        self.inner.lock().unwrap().packed.clone()
    }

    fn check(&self, operation: &'static str, offset: u64, len: u64) -> Result<()> {
        let size = self.inner.lock().unwrap().bytes.len() as u64;
        assert!(offset + len <= size, "{operation} of {len} at {offset} outside {size}");
        match self.bad {
            Some(bad) if (offset..offset + len).contains(&bad) => Err(Error::Device {
                operation,
                offset,
                blame: Blame::Device,
                source: "bad sector".into(),
            }),
            _ => Ok(()),
        }
    }
}

impl BlockSource for MemoryDisk {
    fn size(&self) -> u64 {
        self.inner.lock().unwrap().bytes.len() as u64
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<Extent> {
        assert!(max_len > 0);
        let inner = self.inner.lock().unwrap();
        let kinds = &inner.kinds[sectors(offset, 1).start..];
        let run = kinds.iter().take_while(|k| **k == kinds[0]).count() as u64;
        let len = (run * SECTOR_BYTES - offset % SECTOR_BYTES).min(max_len);
        Ok(Extent { len, kind: kinds[0], host: None })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check("read", offset, buf.len() as u64)?;
        buf.copy_from_slice(&self.inner.lock().unwrap().bytes[span(offset, buf.len())]);
        Ok(())
    }

    fn read_compressed(&self, offset: u64, out: &mut Vec<u8>) -> Result<Option<CompressedUnit>> {
        let inner = self.inner.lock().unwrap();
        if inner.kinds[sectors(offset, 1).start] != ExtentKind::Compressed
            || !offset.is_multiple_of(self.cluster)
        {
            return Ok(None);
        }
        // "Compressed" to the first byte of the cluster, which tests fill evenly.
        out.push(inner.bytes[span(offset, 1)][0]);
        Ok(Some(CompressedUnit { len: self.cluster, compression: Compression::Zstd }))
    }
}

impl BlockSink for MemoryDisk {
    fn size(&self) -> u64 {
        BlockSource::size(self)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check("write", offset, buf.len() as u64)?;
        let mut inner = self.inner.lock().unwrap();
        inner.bytes[span(offset, buf.len())].copy_from_slice(buf);
        inner.kinds[sectors(offset, buf.len() as u64)].fill(ExtentKind::Data);
        inner.writes += 1;
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check("write zeroes", offset, len)?;
        let mut inner = self.inner.lock().unwrap();
        inner.bytes[span(offset, usize::try_from(len).unwrap())].fill(0);
        inner.kinds[sectors(offset, len)].fill(ExtentKind::Zero);
        inner.zero_writes += 1;
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn reads_as_zero(&self, _offset: u64, _len: u64) -> bool {
        self.fresh
    }

    fn allocation_unit(&self) -> u64 {
        4096
    }

    fn write_compressed(&self, offset: u64, unit: CompressedUnit, bytes: &[u8]) -> Result<bool> {
        if !self.takes_compressed {
            return Ok(false);
        }
        let len = unit.len.min(BlockSource::size(self) - offset);
        self.write_at(&vec![bytes[0]; usize::try_from(len).unwrap()], offset)?;
        self.inner.lock().unwrap().packed.insert(offset, len);
        Ok(true)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
