//! What a multifd channel carries: a hello, then packets of pages. SPEC 7.5.
//!
//! A packet's header is kept as it is: QEMU 7.2 leaves values of the packet before in fields that
//! count for nothing, and what is read is written again to the same bytes.

use super::{Step, attempt};
use crate::{Malformed, Problem, Reader, Writer};

/// First four bytes of a hello and of each packet.
pub const MAGIC: u32 = 0x1122_3344;
/// The one version.
pub const VERSION: u32 = 1;
/// Bytes of a hello.
pub const HELLO_BYTES: usize = 64;
/// Bytes of a packet's header.
pub const HEADER_BYTES: usize = 1344;
/// Most pages in a packet: 512 KiB of memory.
pub const MAX_PAGES: u32 = 128;
/// Largest payload. A QEMU destination has room for so much, and does not check.
pub const MAX_PAYLOAD: u32 = 1 << 20;
/// Bytes of the name of a RAM block, with its NUL.
pub const BLOCK_NAME_BYTES: usize = 256;
/// Bytes of the header of a packet with a device's state.
pub const DEVICE_HEADER_BYTES: usize = 276;

/// Flag: all channels meet here.
pub const SYNC: u32 = 0x01;
/// The bits of the flags that name the compression.
pub const COMPRESSION: u32 = 0x3e;
/// Compression: one zlib stream per channel.
pub const ZLIB: u32 = 0x02;
/// Compression: one zstd frame per channel.
pub const ZSTD: u32 = 0x04;
/// Flag: the state of a device and no pages. Since QEMU 10.0.
pub const DEVICE_STATE: u32 = 0x40;

/// With which a channel opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello<'a> {
    /// UUID of the source's VM; zeroes where it has none.
    pub uuid: &'a [u8; 16],
    /// Number of the channel, from 0.
    pub channel: u8,
    /// Zeroes, as they came.
    pub unused: &'a [u8; 39],
}

/// The header of a packet of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'a> {
    /// [`SYNC`] and one compression.
    pub flags: u32,
    /// Room for so many pages.
    pub pages_alloc: u32,
    /// Pages with content.
    pub normal_pages: u32,
    /// Bytes of payload; means nothing without [`normal_pages`](Packet::normal_pages).
    pub next_packet_size: u32,
    /// Counts the packets of all channels.
    pub packet_num: u64,
    /// Pages of zeroes. Since QEMU 9.0.
    pub zero_pages: u32,
    /// Zeroes, as they came.
    pub unused: &'a [u8; 28],
    /// Name of the block with a NUL, and what stands behind it.
    pub block: &'a [u8; BLOCK_NAME_BYTES],
    /// Byte offsets of pages, big-endian: those with content, zeroes, and what is left from before.
    pub offsets: &'a [u8; MAX_PAGES as usize * 8],
}

/// What a channel carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item<'a> {
    /// The channel opens.
    Hello(Hello<'a>),
    /// A packet of pages. Its payload follows.
    Packet(Packet<'a>),
    /// The header of a packet with a device's state, which follows.
    Device {
        /// Name of the device with a NUL, and what stands behind it.
        name: &'a [u8; BLOCK_NAME_BYTES],
        /// Flags of the packet.
        flags: u32,
        /// Which of several of that name.
        instance: u32,
        /// Bytes of state.
        len: u32,
    },
    /// Bytes of a payload; one payload may come in several parts.
    Payload(&'a [u8]),
}

/// Takes a channel apart.
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    offset: u64,
    has_hello: bool,
    /// Bytes of the payload that are still to come.
    payload_left: u32,
}

impl Decoder {
    /// Bytes taken so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether the channel may end here.
    pub fn may_end(&self) -> bool {
        self.has_hello && self.payload_left == 0
    }

    /// Takes the next item from what has arrived.
    pub fn next<'a>(&mut self, input: &'a [u8]) -> Result<Step<Item<'a>>, Malformed> {
        let step = if self.payload_left > 0 {
            let len = (self.payload_left as usize).min(input.len());
            match input.get(..len) {
                Some(bytes) if len > 0 => Step::Item(Item::Payload(bytes), len),
                _ => Step::Need(1),
            }
        } else if self.has_hello {
            attempt(input, self.offset, decode_packet)?
        } else {
            attempt(input, self.offset, Hello::decode)?.map(Item::Hello)
        };
        if let Step::Item(item, len) = &step {
            self.has_hello = true;
            self.payload_left = match item {
                Item::Hello(_) => 0,
                Item::Packet(packet) => packet.payload_len(),
                Item::Device { len, .. } => *len,
                Item::Payload(bytes) => {
                    self.payload_left.saturating_sub(u32::try_from(bytes.len()).unwrap_or(u32::MAX))
                }
            };
            self.offset = self.offset.saturating_add(*len as u64);
        }
        Ok(step)
    }
}

impl Item<'_> {
    /// Writes the item.
    pub fn encode(&self, out: &mut Writer) {
        match self {
            Self::Hello(hello) => {
                out.be32(MAGIC).be32(VERSION).bytes(hello.uuid).u8(hello.channel);
                out.bytes(hello.unused);
            }
            Self::Packet(packet) => packet.encode(out),
            Self::Device { name, flags, instance, len } => {
                out.be32(MAGIC).be32(VERSION).be32(*flags).bytes(*name);
                out.be32(*instance).be32(*len);
            }
            Self::Payload(bytes) => {
                out.bytes(bytes);
            }
        }
    }
}

impl<'a> Hello<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        decode_magic(reader)?;
        let uuid = reader.array("uuid of a multifd hello")?;
        let channel = reader.u8("multifd channel")?;
        let unused = reader.array("multifd hello")?;
        Ok(Self { uuid, channel, unused })
    }
}

impl<'a> Packet<'a> {
    /// Takes a header. The counts fit the header and one another; offsets and the block's name are
    /// for whoever knows the blocks.
    fn decode(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        decode_magic(reader)?;
        let flags = reader.be32("multifd flags")?;
        let pages_alloc = bounded(reader, MAX_PAGES, "multifd pages_alloc")?;
        let normal_pages = bounded(reader, pages_alloc, "multifd normal_pages")?;
        let size_at = reader.offset();
        let next_packet_size = reader.be32("multifd next_packet_size")?;
        if normal_pages > 0 && next_packet_size > MAX_PAYLOAD {
            let (value, max) = (next_packet_size.into(), MAX_PAYLOAD.into());
            let problem = Problem::OutOfRange { value, min: 0, max };
            return Err(Malformed::new(size_at, "multifd next_packet_size", problem));
        }
        let packet_num = reader.be64("multifd packet_num")?;
        let zero_max = pages_alloc.saturating_sub(normal_pages);
        let zero_pages = bounded(reader, zero_max, "multifd zero_pages")?;
        Ok(Self {
            flags,
            pages_alloc,
            normal_pages,
            next_packet_size,
            packet_num,
            zero_pages,
            unused: reader.array("multifd packet")?,
            block: reader.array("multifd RAM block name")?,
            offsets: reader.array("multifd page offsets")?,
        })
    }

    /// Bytes of payload that follow: none without pages, whole pages without compression, whatever
    /// the field says.
    pub fn payload_len(&self) -> u32 {
        match (self.normal_pages, self.flags & COMPRESSION) {
            (0, _) => 0,
            (pages, 0) => pages.saturating_mul(4096),
            _ => self.next_packet_size,
        }
    }

    /// Name of the block, up to its NUL; `None` where there is no NUL or no name.
    pub fn block_name(&self) -> Option<&'a str> {
        let len = self.block.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(self.block.get(..len)?).ok().filter(|name| !name.is_empty())
    }

    /// Byte offsets of the pages with content, then of those of zeroes.
    pub fn page_offsets(&self) -> impl Iterator<Item = u64> + '_ {
        let count = self.normal_pages.saturating_add(self.zero_pages) as usize;
        self.offsets.as_chunks::<8>().0.iter().take(count).map(|bytes| u64::from_be_bytes(*bytes))
    }

    fn encode(&self, out: &mut Writer) {
        out.be32(MAGIC).be32(VERSION).be32(self.flags).be32(self.pages_alloc);
        out.be32(self.normal_pages).be32(self.next_packet_size).be64(self.packet_num);
        out.be32(self.zero_pages).bytes(self.unused).bytes(self.block).bytes(self.offsets);
    }
}

fn decode_packet<'a>(reader: &mut Reader<'a>) -> Result<Item<'a>, Malformed> {
    let mut ahead = reader.clone();
    ahead.take(8, "multifd packet")?;
    let flags = ahead.be32("multifd flags")?;
    if flags & DEVICE_STATE == 0 {
        return Packet::decode(reader).map(Item::Packet);
    }
    decode_magic(reader)?;
    reader.be32("multifd flags")?;
    let name = reader.array("multifd device name")?;
    let instance = reader.be32("multifd device instance")?;
    let len = reader.be32("length of a device's state")?;
    Ok(Item::Device { name, flags, instance, len })
}

fn decode_magic(reader: &mut Reader<'_>) -> Result<(), Malformed> {
    for (field, expected) in [("multifd magic", MAGIC), ("multifd version", VERSION)] {
        let at = reader.offset();
        let found = reader.be32(field)?;
        if found != expected {
            let (value, expected) = (found.into(), expected.into());
            return Err(Malformed::new(at, field, Problem::Mismatch { value, expected }));
        }
    }
    Ok(())
}

fn bounded(reader: &mut Reader<'_>, max: u32, field: &'static str) -> Result<u32, Malformed> {
    let at = reader.offset();
    let value = reader.be32(field)?;
    if value <= max {
        return Ok(value);
    }
    let problem = Problem::OutOfRange { value: value.into(), min: 0, max: max.into() };
    Err(Malformed::new(at, field, problem))
}
