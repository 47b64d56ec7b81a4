//! Bitmaps as records of the `dirty-bitmap` section, in QEMU's order: all are created, then all
//! bits, then all are complete.

use std::io::Write;

use format_spec::qemu::container::SectionKind;
use format_spec::qemu::dirty_bitmap::{
    self, BUFFER_ALIGN, Body, CHUNK_BITS, ENABLED, PERSISTENT, Record,
};
use qcow2_file::bitmaps::Bits;

use super::session::{Names, Session};
use super::stream::Stream;
use crate::qemu::Result;

/// Bytes of bits in one record.
const CHUNK_BYTES: usize = (CHUNK_BITS / 8) as usize;

/// A bitmap that is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingBitmap {
    /// Name of its disk on the wire: of the block backend or node at the destination, or an alias.
    /// 1 to 255 bytes.
    pub device: String,
    /// Its own name on the wire, 1 to 255 bytes.
    pub name: String,
    /// Guest bytes of its disk, a multiple of 512.
    pub disk_size: u64,
    /// Guest bytes per bit: a power of two from 512 to 2 GiB. QEMU aborts on anything else.
    pub granularity: u32,
    /// Whether it records what the guest writes.
    pub is_enabled: bool,
    /// Whether it is to be kept with the disk.
    pub is_persistent: bool,
}

impl Session {
    /// Creates bitmaps at the destination. Once, with all of them. They record nothing there until
    /// the migration is over.
    pub fn start_bitmaps(&mut self, bitmaps: &[OutgoingBitmap]) -> Result<()> {
        self.bitmap_section(SectionKind::Start, |names, stream| {
            for bitmap in bitmaps {
                let flags = if bitmap.is_enabled { ENABLED } else { 0 }
                    | if bitmap.is_persistent { PERSISTENT } else { 0 };
                let body = Body::Start { granularity: bitmap.granularity, flags };
                record(names, stream, bitmap, body)?;
            }
            Ok(())
        })
    }

    /// Sends all bits and completes the bitmaps. Once, with those of
    /// [`start_bitmaps`](Session::start_bitmaps), when nobody writes to the disks any more. `bits`
    /// answers the bits of each in its turn, so that only one bitmap's have to be held.
    pub fn end_bitmaps(
        &mut self,
        bitmaps: &[OutgoingBitmap],
        mut bits: impl FnMut(usize) -> Result<Bits>,
    ) -> Result<()> {
        self.bitmap_section(SectionKind::End, |names, stream| {
            for (index, bitmap) in bitmaps.iter().enumerate() {
                send_bits(names, stream, bitmap, &bits(index)?)?;
            }
            for bitmap in bitmaps {
                record(names, stream, bitmap, Body::Complete)?;
            }
            Ok(())
        })
    }
}

fn record<W: Write>(
    names: &mut Names,
    stream: &mut Stream<W>,
    bitmap: &OutgoingBitmap,
    body: Body<'_>,
) -> Result<()> {
    let (device, name) = names.tell(&bitmap.device, &bitmap.name);
    stream.write(|out| Record::new(device, name, body).encode(out))
}

/// Every range of the disk, clear ones without a buffer.
fn send_bits<W: Write>(
    names: &mut Names,
    stream: &mut Stream<W>,
    bitmap: &OutgoingBitmap,
    bits: &Bits,
) -> Result<()> {
    let mut buffer = [0; CHUNK_BYTES];
    for (first_sector, sectors, range) in dirty_bitmap::chunks(bitmap.granularity, bitmap.disk_size)
    {
        let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        let padded = len.checked_next_multiple_of(BUFFER_ALIGN).unwrap_or(len);
        let buffer = buffer.get_mut(..padded).unwrap_or_default();
        bits.read_bytes(range.start, buffer);
        // Padding must be clear; it may lie before the end of the bitmap.
        buffer.get_mut(len..).unwrap_or_default().fill(0);
        let has_bits = buffer.iter().any(|byte| *byte != 0);
        let buffer = has_bits.then_some(&*buffer);
        record(names, stream, bitmap, Body::Bits { first_sector, sectors, buffer })?;
    }
    Ok(())
}
