//! Records of the `block` section, version 1: disks in QEMU up to 9.0. SPEC 7.1.

use crate::{Malformed, Problem, Reader, Writer};

/// Name of the section.
pub const SECTION: &str = "block";
/// Version that QEMU writes; it reads 0 too.
pub const SECTION_VERSION: u32 = 1;
/// Bytes of content in one record, whatever the disk's size.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Flag: a device's name follows, and content unless it is zero.
pub const DEVICE_BLOCK: u64 = 0x01;
/// Flag: the section's body ends with this record.
pub const EOS: u64 = 0x02;
/// Flag: the number is a percentage.
pub const PROGRESS: u64 = 0x04;
/// Flag, with [`DEVICE_BLOCK`]: the chunk is zero, no content follows.
pub const ZERO_BLOCK: u64 = 0x08;
/// The bits of a word that are flags.
pub const FLAGS: u64 = 0x1ff;

/// What a record carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body<'a> {
    /// Content of a chunk. Beyond the end of the disk it is padding of any value.
    Data {
        /// The device; empty where QEMU knows it by node name only.
        device: &'a str,
        /// Always a whole chunk.
        content: &'a [u8; CHUNK_BYTES],
    },
    /// A chunk of zeroes.
    Zeroes {
        /// The device.
        device: &'a str,
    },
    /// How far the source is.
    Progress,
    /// Nothing: the word says all.
    None,
}

/// A record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Offset or percentage, and flags, as they are on the wire. QEMU ignores flags that it does
    /// not know.
    pub word: u64,
    /// What follows the word.
    pub body: Body<'a>,
}

impl<'a> Record<'a> {
    /// A chunk with content at byte `offset`, a multiple of [`CHUNK_BYTES`].
    pub fn data(offset: u64, device: &'a str, content: &'a [u8; CHUNK_BYTES]) -> Self {
        Self { word: offset & !FLAGS | DEVICE_BLOCK, body: Body::Data { device, content } }
    }

    /// A chunk of zeroes at byte `offset`, a multiple of [`CHUNK_BYTES`].
    pub fn zeroes(offset: u64, device: &'a str) -> Self {
        Self { word: offset & !FLAGS | DEVICE_BLOCK | ZERO_BLOCK, body: Body::Zeroes { device } }
    }

    /// How far the source is.
    pub fn progress(percent: u8) -> Self {
        Self { word: u64::from(percent) << 9 | PROGRESS, body: Body::Progress }
    }

    /// The end of a section's body.
    pub fn end() -> Self {
        Self { word: EOS, body: Body::None }
    }

    /// Takes the next record.
    pub fn decode(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        let at = reader.offset();
        let word = reader.be64("block word")?;
        // QEMU looks at the flags in this order and at no others.
        let body = if word & DEVICE_BLOCK != 0 {
            let device = reader.name8_or_empty("block device name")?;
            if word & ZERO_BLOCK != 0 {
                Body::Zeroes { device }
            } else {
                Body::Data { device, content: reader.array("block content")? }
            }
        } else if word & PROGRESS != 0 {
            Body::Progress
        } else if word & EOS != 0 {
            Body::None
        } else {
            let problem = Problem::Unknown { value: word & FLAGS };
            return Err(Malformed::new(at, "block flags", problem));
        };
        Ok(Self { word, body })
    }

    /// Writes the record.
    pub fn encode(&self, out: &mut Writer) {
        self.encode_head(out);
        if let Body::Data { content, .. } = self.body {
            out.bytes(content);
        }
    }

    /// Writes the record up to its content, which the caller puts behind it from where it lies.
    pub fn encode_head(&self, out: &mut Writer) {
        out.be64(self.word);
        match self.body {
            Body::Data { device, .. } | Body::Zeroes { device } => {
                out.text8(device);
            }
            Body::Progress | Body::None => {}
        }
    }

    /// Byte offset of the chunk.
    pub fn offset(&self) -> u64 {
        self.word & !FLAGS
    }

    /// Percentage of a progress record, cut at 100.
    pub fn percent(&self) -> u8 {
        u8::try_from((self.word >> 9).min(100)).unwrap_or(100)
    }

    /// Whether the section's body ends after this record.
    pub fn ends_body(&self) -> bool {
        self.word & EOS != 0
    }
}

/// Bytes of the chunk at `offset` that lie on a disk of `disk_size` bytes; the rest is padding. A
/// chunk must begin on the disk.
pub fn chunk_len(offset: u64, disk_size: u64) -> Result<usize, Problem> {
    match disk_size.checked_sub(offset) {
        None | Some(0) => {
            let max = disk_size.saturating_sub(1);
            Err(Problem::OutOfRange { value: offset, min: 0, max })
        }
        Some(rest) => Ok(usize::try_from(rest).unwrap_or(usize::MAX).min(CHUNK_BYTES)),
    }
}
