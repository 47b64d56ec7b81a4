//! Records of the `ram` section, version 4, on the main connection. SPEC 7.3.

use std::collections::BTreeMap;

use super::{Step, attempt};
use crate::{Malformed, Problem, Reader, Writer};

/// Name of the section.
pub const SECTION: &str = "ram";
/// The one version.
pub const SECTION_VERSION: u32 = 4;
/// Bytes of a target page; x86's.
pub const PAGE_BYTES: usize = 4096;
/// The bits of a word that are flags.
pub const FLAGS: u64 = 0xfff;
/// Flag: a page of one byte's value, in practice zero.
pub const ZERO: u64 = 0x002;
/// Flag: the list of RAM blocks follows.
pub const MEM_SIZE: u64 = 0x004;
/// Flag: a page.
pub const PAGE: u64 = 0x008;
/// Flag: the section's body ends.
pub const EOS: u64 = 0x010;
/// Flag: of the same block as the page before, which is not named again.
pub const CONTINUE: u64 = 0x020;
/// Flag: a page as a difference to what it was.
pub const XBZRLE: u64 = 0x040;
/// Flag: a page as one zlib stream. Up to QEMU 9.0.
pub const COMPRESS_PAGE: u64 = 0x100;
/// Flag: all multifd channels meet here. Since QEMU 8.1.
pub const MULTIFD_FLUSH: u64 = 0x200;
/// What stands before the bytes of an [`XBZRLE`] page.
pub const XBZRLE_ENCODING: u8 = 0x01;
/// Longest zlib stream of one page.
pub const MAX_COMPRESSED: usize = 4110;
/// Most RAM blocks.
pub const MAX_BLOCKS: usize = 1024;
/// Version of the header of a block in a mapped-ram file.
pub const MAPPED_VERSION: u32 = 1;

/// What both sides must know to read the list of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// `x-ignore-shared` is set: each block has an address.
    pub has_addresses: bool,
    /// `mapped-ram` is set: each block has a [`MappedBlock`].
    pub is_mapped: bool,
}

/// Where a mapped-ram file keeps a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedBlock {
    /// Bytes of a page.
    pub page_size: u64,
    /// Offset of the bitmap of pages in the file.
    pub bitmap_offset: u64,
    /// Offset of the pages in the file.
    pub pages_offset: u64,
}

/// What a page became.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// All bytes are this one. QEMU 10.0 takes only zero.
    Fill(u8),
    /// Its bytes.
    Plain(&'a [u8; PAGE_BYTES]),
    /// A difference to what it was.
    Xbzrle(&'a [u8]),
    /// One zlib stream.
    Zlib(&'a [u8]),
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record<'a> {
    /// The list of RAM blocks follows: so many bytes of memory in all.
    MemSize(u64),
    /// A RAM block of the list.
    Block {
        /// Its name; not a path, though it may look like one.
        name: &'a str,
        /// Its length in bytes.
        used_length: u64,
        /// Guest address, with [`Options::has_addresses`].
        address: Option<u64>,
        /// Its places, with [`Options::is_mapped`]. The bytes from here to the end of its pages
        /// then are no records.
        mapped: Option<MappedBlock>,
    },
    /// A page.
    Page {
        /// Its block; `None`: that of the page before.
        block: Option<&'a str>,
        /// Byte offset in the block.
        offset: u64,
        /// What it became.
        content: Content<'a>,
    },
    /// All multifd channels meet here.
    MultifdFlush,
    /// The section's body ends.
    End,
}

impl Record<'_> {
    /// Writes the record.
    pub fn encode(&self, out: &mut Writer) {
        match self {
            Self::MemSize(total) => {
                out.be64(*total | MEM_SIZE);
            }
            Self::Block { name, used_length, address, mapped } => {
                out.text8(name).be64(*used_length);
                if let Some(address) = address {
                    out.be64(*address);
                }
                if let Some(mapped) = mapped {
                    out.be32(MAPPED_VERSION).be64(mapped.page_size);
                    out.be64(mapped.bitmap_offset).be64(mapped.pages_offset);
                }
            }
            Self::Page { block, offset, content } => encode_page(*block, *offset, content, out),
            Self::MultifdFlush => {
                out.be64(MULTIFD_FLUSH);
            }
            Self::End => {
                out.be64(EOS);
            }
        }
    }
}

/// Takes records and keeps what later ones build on. One per stream.
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    options: Options,
    /// Bytes of memory that the list of blocks must still name.
    unlisted: u64,
    blocks: BTreeMap<String, u64>,
    /// Length of the block of the page before.
    current: Option<u64>,
}

impl Decoder {
    /// Starts a stream with these settings.
    pub fn new(options: Options) -> Self {
        Self { options, ..Self::default() }
    }

    /// Lengths of the RAM blocks listed so far, by name.
    pub fn blocks(&self) -> &BTreeMap<String, u64> {
        &self.blocks
    }

    /// Takes the next record from what has arrived, of a channel that carries nothing else: that of
    /// postcopy-preempt. It stands at byte `offset`.
    pub fn next<'a>(
        &mut self,
        input: &'a [u8],
        offset: u64,
    ) -> Result<Step<Record<'a>>, Malformed> {
        attempt(input, offset, |reader| self.decode(reader))
    }

    /// Takes the next record.
    pub fn decode<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Record<'a>, Malformed> {
        if self.unlisted > 0 {
            return self.decode_block(reader);
        }
        let at = reader.offset();
        let word = reader.be64("ram word")?;
        let (value, flags) = (word & !FLAGS, word & FLAGS);
        match flags & !CONTINUE {
            MEM_SIZE if flags == MEM_SIZE => {
                self.unlisted = value;
                self.blocks.clear();
                Ok(Record::MemSize(value))
            }
            EOS if word == EOS => Ok(Record::End),
            MULTIFD_FLUSH if word == MULTIFD_FLUSH => Ok(Record::MultifdFlush),
            kind @ (ZERO | PAGE | XBZRLE | COMPRESS_PAGE) => {
                self.decode_page(reader, kind, flags & CONTINUE != 0, (value, at))
            }
            _ => Err(Malformed::new(at, "ram flags", Problem::Unknown { value: flags })),
        }
    }

    fn decode_block<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Record<'a>, Malformed> {
        let name_at = reader.offset();
        let name = reader.name8("RAM block name")?;
        let at = reader.offset();
        let used_length = reader.be64("RAM block length")?;
        let address = self.options.has_addresses.then(|| reader.be64("RAM block address"));
        let address = address.transpose()?;
        let mapped = self.options.is_mapped.then(|| decode_mapped(reader)).transpose()?;
        let Some(unlisted) = self.unlisted.checked_sub(used_length) else {
            let (value, max) = (used_length, self.unlisted);
            let problem = Problem::OutOfRange { value, min: 0, max };
            return Err(Malformed::new(at, "RAM block length", problem));
        };
        if !used_length.is_multiple_of(PAGE_BYTES as u64) {
            let problem = Problem::Misaligned { value: used_length, align: PAGE_BYTES as u64 };
            return Err(Malformed::new(at, "RAM block length", problem));
        }
        if self.blocks.contains_key(name) {
            return Err(Malformed::new(name_at, "RAM block name", Problem::Duplicate));
        }
        if self.blocks.len() >= MAX_BLOCKS {
            let problem = Problem::Other("is one more than the limit of 1024 blocks");
            return Err(Malformed::new(name_at, "RAM block", problem));
        }
        self.blocks.insert(name.to_owned(), used_length);
        self.unlisted = unlisted;
        Ok(Record::Block { name, used_length, address, mapped })
    }

    fn decode_page<'a>(
        &mut self,
        reader: &mut Reader<'a>,
        kind: u64,
        continues: bool,
        (offset, at): (u64, u64),
    ) -> Result<Record<'a>, Malformed> {
        let name_at = reader.offset();
        let block = if continues { None } else { Some(reader.name8("RAM block name")?) };
        let content = decode_content(reader, kind)?;
        let length = match block {
            Some(name) => self.length_of(name, name_at)?,
            None => self.current.ok_or_else(|| {
                let problem = Problem::Other("continues a block where none was named");
                Malformed::new(at, "ram page", problem)
            })?,
        };
        if offset >= length {
            let max = length.saturating_sub(PAGE_BYTES as u64);
            let problem = Problem::OutOfRange { value: offset, min: 0, max };
            return Err(Malformed::new(at, "offset of a ram page", problem));
        }
        self.current = Some(length);
        Ok(Record::Page { block, offset, content })
    }

    /// Length of a block. QEMU does without a list; then any name and length goes.
    fn length_of(&self, name: &str, at: u64) -> Result<u64, Malformed> {
        if self.blocks.is_empty() {
            return Ok(u64::MAX);
        }
        self.blocks.get(name).copied().ok_or_else(|| {
            Malformed::new(at, "RAM block name", Problem::Other("is not in the list of blocks"))
        })
    }
}

fn decode_mapped(reader: &mut Reader<'_>) -> Result<MappedBlock, Malformed> {
    let at = reader.offset();
    let version = reader.be32("mapped-ram version")?;
    if version != MAPPED_VERSION {
        let (value, expected) = (version.into(), MAPPED_VERSION.into());
        return Err(Malformed::new(
            at,
            "mapped-ram version",
            Problem::Mismatch { value, expected },
        ));
    }
    Ok(MappedBlock {
        page_size: reader.be64("mapped-ram page size")?,
        bitmap_offset: reader.be64("mapped-ram bitmap offset")?,
        pages_offset: reader.be64("mapped-ram pages offset")?,
    })
}

fn decode_content<'a>(reader: &mut Reader<'a>, kind: u64) -> Result<Content<'a>, Malformed> {
    match kind {
        ZERO => Ok(Content::Fill(reader.u8("fill byte")?)),
        PAGE => Ok(Content::Plain(reader.array("ram page")?)),
        XBZRLE => {
            let at = reader.offset();
            let encoding = reader.u8("xbzrle encoding")?;
            if encoding != XBZRLE_ENCODING {
                let (value, expected) = (encoding.into(), XBZRLE_ENCODING.into());
                let problem = Problem::Mismatch { value, expected };
                return Err(Malformed::new(at, "xbzrle encoding", problem));
            }
            let at = reader.offset();
            let len = usize::from(reader.be16("xbzrle length")?);
            bounded(len, PAGE_BYTES, at, "xbzrle length")?;
            Ok(Content::Xbzrle(reader.take(len, "xbzrle page")?))
        }
        _ => {
            let at = reader.offset();
            let len = reader.be32("length of a compressed page")? as usize;
            bounded(len, MAX_COMPRESSED, at, "length of a compressed page")?;
            Ok(Content::Zlib(reader.take(len, "compressed page")?))
        }
    }
}

fn bounded(len: usize, max: usize, at: u64, field: &'static str) -> Result<(), Malformed> {
    if len <= max {
        return Ok(());
    }
    let problem = Problem::OutOfRange { value: len as u64, min: 0, max: max as u64 };
    Err(Malformed::new(at, field, problem))
}

fn encode_page(block: Option<&str>, offset: u64, content: &Content<'_>, out: &mut Writer) {
    let kind = match content {
        Content::Fill(_) => ZERO,
        Content::Plain(_) => PAGE,
        Content::Xbzrle(_) => XBZRLE,
        Content::Zlib(_) => COMPRESS_PAGE,
    };
    out.be64(offset | kind | if block.is_none() { CONTINUE } else { 0 });
    if let Some(block) = block {
        out.text8(block);
    }
    match content {
        Content::Fill(byte) => {
            out.u8(*byte);
        }
        Content::Plain(page) => {
            out.bytes(*page);
        }
        Content::Xbzrle(bytes) => {
            out.u8(XBZRLE_ENCODING).be16(u16::try_from(bytes.len()).unwrap_or(u16::MAX));
            out.bytes(bytes);
        }
        Content::Zlib(bytes) => {
            out.be32(u32::try_from(bytes.len()).unwrap_or(u32::MAX)).bytes(bytes);
        }
    }
}
