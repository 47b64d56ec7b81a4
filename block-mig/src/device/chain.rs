//! An image with its chain as a source.

use mig_core::Result;
use mig_core::block::{BlockSource, CompressedUnit, Extent, ExtentKind};
use qcow2_file::create::BackingReader;
use qcow2_file::{Chain, ChainExtent, ChainKind, GuestOffset};

use super::{compression, failed};

/// A whole chain: what the guest reads.
#[derive(Debug, Clone, Copy)]
pub struct ChainSource<'a>(pub &'a Chain);

fn kind(kind: ChainKind) -> ExtentKind {
    match kind {
        ChainKind::Data => ExtentKind::Data,
        ChainKind::Compressed => ExtentKind::Compressed,
        ChainKind::Zero => ExtentKind::Zero,
        ChainKind::Hole => ExtentKind::Hole,
    }
}

fn extent(found: ChainExtent) -> Extent {
    Extent { len: found.len, kind: kind(found.kind), host: found.host.map(|host| host.0) }
}

impl ChainSource<'_> {
    /// [`extent`](BlockSource::extent) by the tables alone: holes of files count as content.
    pub fn placed(&self, offset: u64, max_len: u64) -> Result<Extent> {
        let found = self.0.placed(GuestOffset(offset), max_len);
        Ok(extent(found.map_err(failed("look up", offset))?))
    }

    fn find(&self, offset: u64, max_len: u64) -> Result<ChainExtent> {
        self.0.extent(GuestOffset(offset), max_len).map_err(failed("find an extent", offset))
    }
}

impl BlockSource for ChainSource<'_> {
    fn size(&self) -> u64 {
        self.0.virtual_size()
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<Extent> {
        self.find(offset, max_len).map(extent)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, GuestOffset(offset)).map_err(failed("read", offset))
    }

    fn read_compressed(&self, offset: u64, out: &mut Vec<u8>) -> Result<Option<CompressedUnit>> {
        let found = self.0.read_compressed(GuestOffset(offset), out);
        let cluster = found.map_err(failed("read compressed data", offset))?;
        Ok(cluster.map(|c| CompressedUnit {
            len: c.cluster_size,
            compression: compression(c.compression),
        }))
    }
}

/// What the upper layers of a chain hold. Everything that the others decide is a hole; reading
/// answers what the guest reads all the same.
#[derive(Debug, Clone, Copy)]
pub struct AboveSource<'a> {
    /// The whole chain.
    pub chain: &'a Chain,
    /// How many of its layers count.
    pub layers: usize,
}

impl AboveSource<'_> {
    fn kind(&self, found: ChainExtent) -> ExtentKind {
        if found.depth >= self.layers {
            return ExtentKind::Hole;
        }
        match found.kind {
            // Nothing above holds it because some layer is too short. Where that is the backing
            // file itself, it is as short below the destination; else zeroes hide what it has.
            ChainKind::Hole if found.depth.saturating_add(1) == self.layers => ExtentKind::Hole,
            ChainKind::Hole => ExtentKind::Zero,
            other => kind(other),
        }
    }
}

impl BlockSource for AboveSource<'_> {
    fn size(&self) -> u64 {
        self.chain.virtual_size()
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<Extent> {
        let found = ChainSource(self.chain).find(offset, max_len)?;
        let host = found.host.map(|h| h.0);
        Ok(Extent { len: found.len, kind: self.kind(found), host })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        ChainSource(self.chain).read_at(buf, offset)
    }

    fn read_compressed(&self, offset: u64, out: &mut Vec<u8>) -> Result<Option<CompressedUnit>> {
        ChainSource(self.chain).read_compressed(offset, out)
    }
}

/// A chain below a new image.
#[derive(Debug)]
pub struct ChainBacking(pub Chain);

impl BackingReader for ChainBacking {
    fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> qcow2_file::Result<()> {
        self.0.read_at(buf, at)
    }
}
