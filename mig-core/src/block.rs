//! Disks as a mover sees them.

use crate::error::Result;

/// Unit in which guests see the size of a disk.
pub const SECTOR_BYTES: u64 = 512;

/// How a stretch of a disk reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Stored content; may happen to be zero.
    Data,
    /// Stored compressed.
    Compressed,
    /// Reads as zero because the disk says so; allocated or not.
    Zero,
    /// Nothing is stored anywhere in the chain; reads as zero.
    Hole,
}

impl ExtentKind {
    /// Whether it reads as zero without looking.
    pub fn reads_as_zero(self) -> bool {
        matches!(self, Self::Zero | Self::Hole)
    }
}

/// A stretch of a disk of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// How it reads.
    pub kind: ExtentKind,
    /// Where it stands in the file that holds it, where that is one contiguous stretch. Valid while
    /// nobody writes to the disk.
    pub host: Option<u64>,
}

/// How a compressed unit is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, 4 KiB window, as in qcow2.
    Deflate,
    /// zstd frame, as in qcow2.
    Zstd,
}

/// One compressed unit of a disk, as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressedUnit {
    /// Guest bytes it stands for.
    pub len: u64,
    /// How it is compressed.
    pub compression: Compression,
}

/// A disk that can be read. All methods may be called from any thread at any time.
pub trait BlockSource: Send + Sync {
    /// Guest-visible size in bytes, a multiple of [`SECTOR_BYTES`].
    fn size(&self) -> u64;

    /// The extent that starts at `offset`, at most `max_len` bytes. `offset` must lie inside the
    /// disk and `max_len` must not be zero. Neighbouring extents may be of the same kind.
    fn extent(&self, offset: u64, max_len: u64) -> Result<Extent>;

    /// Fills `buf`. Never short. The range must lie inside the disk.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Whether it stands on a base, which somebody else may have too: see [`held`](Self::held).
    fn has_base(&self) -> bool {
        false
    }

    /// Like [`extent`](Self::extent), of what the disk holds itself: a hole is what its base
    /// decides. What is held stays held, whatever is written or discarded. A disk without a base
    /// holds everything.
    fn held(&self, offset: u64, max_len: u64) -> Result<Extent> {
        let found = self.extent(offset, max_len)?;
        let is_hole = found.kind == ExtentKind::Hole;
        Ok(Extent { kind: if is_hole { ExtentKind::Zero } else { found.kind }, ..found })
    }

    /// Where a compressed unit starts at `offset`: appends its stored bytes, exactly those that its
    /// decoder consumes, to `out`. `None` where there is no such unit.
    fn read_compressed(&self, _offset: u64, _out: &mut Vec<u8>) -> Result<Option<CompressedUnit>> {
        Ok(None)
    }
}

/// A disk that can be written. All methods may be called from any thread at any time; two writes of
/// overlapping ranges at the same time leave one or the other in each sector.
pub trait BlockSink: Send + Sync {
    /// Guest-visible size in bytes, a multiple of [`SECTOR_BYTES`].
    fn size(&self) -> u64;

    /// Writes all of `buf`. The range must lie inside the disk.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Makes the range read as zero. May deallocate.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()>;

    /// Tells the disk that the content is not needed; the range reads as anything afterwards.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Whether the range is known to read as zero now. `false` means "not known".
    fn reads_as_zero(&self, offset: u64, len: u64) -> bool;

    /// Bytes in the unit that a write allocates: a cluster, a subcluster, a block. A power of two.
    fn allocation_unit(&self) -> u64;

    /// Stores a compressed unit as it is. `false`, and nothing is written, where this disk cannot
    /// hold it in that form; the caller then writes the content.
    fn write_compressed(&self, _offset: u64, _unit: CompressedUnit, _bytes: &[u8]) -> Result<bool> {
        Ok(false)
    }

    /// Hands everything that is buffered here to the system. Not durable: see
    /// [`sync`](BlockSink::sync).
    fn flush(&self) -> Result<()>;

    /// Makes everything written before durable. Includes a flush.
    fn sync(&self) -> Result<()>;
}

/// Where a page of memory begins, as the system copies to and from it.
pub(crate) const PAGE_BYTES: usize = 4096;

/// `len` bytes inside `room` that begin on a page boundary; `room` grows to hold them and is kept
/// by the caller for the next time. What they hold is anything.
///
/// Large allocations begin 16 bytes behind a page boundary, and some processors copy into such a
/// place several times slower than into one that is aligned as the source is.
pub fn on_page(room: &mut Vec<u8>, len: usize) -> &mut [u8] {
    let needed = len.saturating_add(PAGE_BYTES);
    if room.len() < needed {
        room.resize(needed, 0);
    }
    let start = room.as_ptr().align_offset(PAGE_BYTES).min(PAGE_BYTES);
    room.get_mut(start..start.saturating_add(len)).unwrap_or_default()
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Wide strides let the compiler use vector loads; an early exit per stride keeps data cheap.
    let (chunks, tail) = bytes.as_chunks::<256>();
    chunks.iter().all(|c| c.iter().fold(0, |acc, b| acc | b) == 0)
        && tail.iter().fold(0, |acc, b| acc | b) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_begins_on_a_page() {
        let mut room = Vec::new();
        for len in [1, 512, 1 << 20, 4096, 0] {
            let bytes = on_page(&mut room, len);
            assert_eq!(bytes.len(), len);
            assert_eq!(bytes.as_ptr().addr() % 4096, 0);
        }
        assert!(room.len() <= (1 << 20) + 4096, "the room is kept");
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        for len in [0, 1, 255, 256, 257, 4096, 4097] {
            let mut buf = vec![0u8; len];
            assert!(is_zero(&buf));
            for at in [0, len / 2, len.saturating_sub(1)] {
                if at < len {
                    buf[at] = 0x80;
                    assert!(!is_zero(&buf), "len {len} at {at}");
                    buf[at] = 0;
                }
            }
        }
    }
}
