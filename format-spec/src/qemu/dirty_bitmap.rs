//! Records of the `dirty-bitmap` section, version 1. SPEC 7.2.

use std::ops::Range;

use crate::{Malformed, Problem, Reader, Writer};

/// Name of the section.
pub const SECTION: &str = "dirty-bitmap";
/// The one version.
pub const SECTION_VERSION: u32 = 1;
/// Flag: the section's body ends with this record.
pub const EOS: u8 = 0x01;
/// Flag, with [`BITS`]: the range is clear, no buffer follows.
pub const ZEROES: u8 = 0x02;
/// Flag: the bitmap's name follows; else it is the one before.
pub const BITMAP_NAME: u8 = 0x04;
/// Flag: the device's name follows; else it is the one before.
pub const DEVICE_NAME: u8 = 0x08;
/// Flag: the bitmap is created.
pub const START: u8 = 0x10;
/// Flag: the bitmap is complete.
pub const COMPLETE: u8 = 0x20;
/// Flag: bits of the bitmap.
pub const BITS: u8 = 0x40;
/// Flag: more bytes of flags follow. QEMU heeds the last of them alone.
pub const EXTRA_FLAGS: u8 = 0x80;
/// Bitmap flag: records what the guest writes.
pub const ENABLED: u8 = 0x01;
/// Bitmap flag: is kept with the disk.
pub const PERSISTENT: u8 = 0x02;
/// Bitmap flag that old versions sent; ignored.
pub const AUTOLOAD: u8 = 0x04;
/// Smallest granularity.
pub const MIN_GRANULARITY: u32 = 512;
/// Largest granularity.
pub const MAX_GRANULARITY: u32 = 1 << 31;
/// Largest buffer that a QEMU destination takes.
pub const MAX_BUFFER: u64 = 10240;
/// Bits that QEMU sends in one record.
pub const CHUNK_BITS: u64 = 8192;
/// QEMU pads buffers to a multiple of this.
pub const BUFFER_ALIGN: usize = 32;
/// Bytes that a sector stands for.
pub const SECTOR_BYTES: u64 = 512;

/// What a record carries besides names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body<'a> {
    /// Nothing.
    None,
    /// The bitmap is created.
    Start {
        /// Guest bytes per bit: a power of two from [`MIN_GRANULARITY`] to [`MAX_GRANULARITY`].
        granularity: u32,
        /// [`ENABLED`], [`PERSISTENT`], [`AUTOLOAD`].
        flags: u8,
    },
    /// The bitmap is complete.
    Complete,
    /// Bits of the bitmap. [`bits_range`] says where they belong.
    Bits {
        /// First sector they speak of.
        first_sector: u64,
        /// How many.
        sectors: u32,
        /// Bit `n` in byte `n / 8`, least significant first, then padding; `None`: all clear.
        buffer: Option<&'a [u8]>,
    },
}

/// A record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Bytes of flags before the one that counts; none from any QEMU.
    pub flags_before: &'a [u8],
    /// The flags that count.
    pub flags: u8,
    /// The device's name, if it is given.
    pub device: Option<&'a str>,
    /// The bitmap's name, if it is given.
    pub bitmap: Option<&'a str>,
    /// What else it carries.
    pub body: Body<'a>,
}

impl<'a> Record<'a> {
    /// A record with these names and this body, as QEMU writes it.
    pub fn new(device: Option<&'a str>, bitmap: Option<&'a str>, body: Body<'a>) -> Self {
        let names = if device.is_some() { DEVICE_NAME } else { 0 }
            | if bitmap.is_some() { BITMAP_NAME } else { 0 };
        let kind = match body {
            Body::None => 0,
            Body::Start { .. } => START,
            Body::Complete => COMPLETE,
            Body::Bits { buffer: Some(_), .. } => BITS,
            Body::Bits { buffer: None, .. } => BITS | ZEROES,
        };
        Self { flags_before: &[], flags: names | kind, device, bitmap, body }
    }

    /// The end of a section's body.
    pub fn end() -> Self {
        Self { flags: EOS, ..Self::new(None, None, Body::None) }
    }

    /// Whether the section's body ends after this record.
    pub fn ends_body(&self) -> bool {
        self.flags & EOS != 0
    }

    fn decode(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        let (flags_before, flags) = decode_flags(reader)?;
        let device = named(reader, flags & DEVICE_NAME, "device name of a dirty bitmap")?;
        let bitmap = named(reader, flags & BITMAP_NAME, "name of a dirty bitmap")?;
        // QEMU looks at the flags in this order.
        let body = if flags & START != 0 {
            decode_start(reader)?
        } else if flags & COMPLETE != 0 {
            Body::Complete
        } else if flags & BITS != 0 {
            decode_bits(reader, flags & ZEROES != 0)?
        } else {
            Body::None
        };
        Ok(Self { flags_before, flags, device, bitmap, body })
    }

    /// Writes the record.
    pub fn encode(&self, out: &mut Writer) {
        out.bytes(self.flags_before).u8(self.flags);
        for name in [self.device, self.bitmap].into_iter().flatten() {
            out.text8(name);
        }
        match self.body {
            Body::Start { granularity, flags } => {
                out.be32(granularity).u8(flags);
            }
            Body::Bits { first_sector, sectors, buffer } => {
                out.be64(first_sector).be32(sectors);
                if let Some(buffer) = buffer {
                    out.be64(buffer.len() as u64).bytes(buffer);
                }
            }
            Body::Complete | Body::None => {}
        }
    }
}

/// Takes records and keeps the names that later ones leave out. One per stream: names live on from
/// section to section.
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    device: String,
    bitmap: String,
}

impl Decoder {
    /// Takes the next record. [`device`](Decoder::device) and [`bitmap`](Decoder::bitmap) then name
    /// what it speaks of.
    pub fn decode<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Record<'a>, Malformed> {
        let at = reader.offset();
        let record = Record::decode(reader)?;
        let lacks = |known: &str, given: Option<&str>| known.is_empty() && given.is_none();
        let field = match record.body {
            Body::None => None,
            _ if lacks(&self.device, record.device) => Some("device name of a dirty bitmap"),
            _ if lacks(&self.bitmap, record.bitmap) => Some("name of a dirty bitmap"),
            _ => None,
        };
        if let Some(field) = field {
            let problem = Problem::Other("is left out where none came before");
            return Err(Malformed::new(at, field, problem));
        }
        for (known, given) in [(&mut self.device, record.device), (&mut self.bitmap, record.bitmap)]
        {
            if let Some(given) = given {
                known.clear();
                known.push_str(given);
            }
        }
        Ok(record)
    }

    /// The device that the last record speaks of.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The bitmap that the last record speaks of.
    pub fn bitmap(&self) -> &str {
        &self.bitmap
    }
}

/// Bytes of a bitmap that `sectors` sectors from `first_sector` on stand for, on a disk of
/// `disk_size` bytes. A QEMU destination aborts on ranges that this refuses: the ends must be
/// multiples of 64 granules, or the end of the disk.
pub fn bits_range(
    first_sector: u64,
    sectors: u32,
    granularity: u32,
    disk_size: u64,
) -> Result<Range<u64>, Problem> {
    let start = first_sector.saturating_mul(SECTOR_BYTES);
    let end = start.saturating_add(u64::from(sectors).saturating_mul(SECTOR_BYTES));
    let word = u64::from(granularity).saturating_mul(64).max(1);
    if sectors == 0 || end > disk_size {
        return Err(Problem::OutOfRange { value: end, min: 1, max: disk_size });
    }
    for at in [start, end] {
        if !at.is_multiple_of(word) && at != disk_size {
            return Err(Problem::Misaligned { value: at, align: word });
        }
    }
    let words = |at: u64| at.div_ceil(word).saturating_mul(8);
    Ok(words(start)..words(end))
}

/// Checks the length of a buffer for a range of [`bits_range`] and cuts the padding off.
pub fn trim_buffer<'a>(buffer: &'a [u8], range: &Range<u64>) -> Result<&'a [u8], Problem> {
    let needed = range.end.saturating_sub(range.start);
    let max = needed.checked_next_multiple_of(BUFFER_ALIGN as u64).unwrap_or(needed);
    let value = buffer.len() as u64;
    match usize::try_from(needed).ok().and_then(|needed| buffer.get(..needed)) {
        Some(bits) if value <= max => Ok(bits),
        _ => Err(Problem::OutOfRange { value, min: needed, max }),
    }
}

/// The ranges in which QEMU sends a bitmap: first sector, sectors, bytes of the bitmap.
pub fn chunks(
    granularity: u32,
    disk_size: u64,
) -> impl Iterator<Item = (u64, u32, Range<u64>)> + Clone {
    let total = disk_size.checked_div(SECTOR_BYTES).unwrap_or_default();
    let step = u64::from(granularity / 512).max(1).saturating_mul(CHUNK_BITS);
    // Beyond 2^32 sectors a record's count would not hold a chunk; words of 64 bits always fit.
    let step = step.min(1 << 31);
    let mut first = 0u64;
    std::iter::from_fn(move || {
        let sectors = u32::try_from(total.saturating_sub(first).min(step)).ok()?;
        let range = bits_range(first, sectors, granularity, disk_size).ok()?;
        let chunk = (first, sectors, range);
        first = first.saturating_add(sectors.into());
        Some(chunk)
    })
}

fn decode_flags<'a>(reader: &mut Reader<'a>) -> Result<(&'a [u8], u8), Malformed> {
    const FIELD: &str = "dirty bitmap flags";
    let mut ahead = reader.clone();
    let before = if ahead.u8(FIELD)? & EXTRA_FLAGS == 0 {
        0
    } else if ahead.u8(FIELD)? & EXTRA_FLAGS == 0 {
        1
    } else {
        3
    };
    Ok((reader.take(before, FIELD)?, reader.u8(FIELD)?))
}

fn named<'a>(
    reader: &mut Reader<'a>,
    flag: u8,
    field: &'static str,
) -> Result<Option<&'a str>, Malformed> {
    if flag == 0 { Ok(None) } else { reader.name8(field).map(Some) }
}

fn decode_start<'a>(reader: &mut Reader<'a>) -> Result<Body<'a>, Malformed> {
    let at = reader.offset();
    let granularity = reader.be32("dirty bitmap granularity")?;
    if !granularity.is_power_of_two() || granularity < MIN_GRANULARITY {
        let (min, max) = (MIN_GRANULARITY.into(), MAX_GRANULARITY.into());
        let problem = Problem::NotPowerOfTwo { value: granularity.into(), min, max };
        return Err(Malformed::new(at, "dirty bitmap granularity", problem));
    }
    let at = reader.offset();
    let flags = reader.u8("dirty bitmap START flags")?;
    let reserved = flags & !(ENABLED | PERSISTENT | AUTOLOAD);
    if reserved != 0 {
        let problem = Problem::Reserved { value: reserved.into() };
        return Err(Malformed::new(at, "dirty bitmap START flags", problem));
    }
    Ok(Body::Start { granularity, flags })
}

fn decode_bits<'a>(reader: &mut Reader<'a>, is_zero: bool) -> Result<Body<'a>, Malformed> {
    let first_sector = reader.be64("dirty bitmap first sector")?;
    let sectors = reader.be32("dirty bitmap sectors")?;
    if is_zero {
        return Ok(Body::Bits { first_sector, sectors, buffer: None });
    }
    let at = reader.offset();
    let len = reader.be64("dirty bitmap buffer length")?;
    if len > MAX_BUFFER {
        let problem = Problem::OutOfRange { value: len, min: 0, max: MAX_BUFFER };
        return Err(Malformed::new(at, "dirty bitmap buffer length", problem));
    }
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let buffer = Some(reader.take(len, "dirty bitmap buffer")?);
    Ok(Body::Bits { first_sector, sectors, buffer })
}
