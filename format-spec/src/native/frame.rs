//! Record framing. SPEC 5.
//!
//! ```text
//! be32 body length | be16 type | be16 flags | be32 CRC32C of these 8 | body | be32 CRC32C of it
//! ```
//!
//! A shell that reads from a connection takes [`HEADER_BYTES`], decodes the [`Header`], then reads
//! [`Header::rest_len`] bytes into a buffer of its own and hands both to [`Record::from_parts`].
//! Whoever has all bytes in memory uses [`Record::decode`].

use crate::{Malformed, Problem, Reader};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 12;
/// Largest content that a record carries: 2 MiB.
pub const MAX_PAYLOAD: usize = 2 << 20;
/// Largest body: content and 64 KiB around it.
pub const MAX_BODY: usize = MAX_PAYLOAD + (64 << 10);
/// Type of the record that ends a section body.
pub const END: u16 = 0;
/// Bit of a type that a reader may skip when it does not know it.
pub const OPTIONAL: u16 = 0x8000;
/// Flag: the body is followed by its checksum.
pub const CHECKSUM: u16 = 0x1;
/// Flag: the body is a part of the connection's compression stream.
pub const COMPRESSED: u16 = 0x2;

/// What stands before a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the body, without its checksum. At most [`MAX_BODY`].
    pub body_len: usize,
    /// Type of the record, with [`OPTIONAL`].
    pub kind: u16,
    /// [`CHECKSUM`], [`COMPRESSED`].
    pub flags: u16,
}

impl Header {
    /// Decodes and checks a header that stands at byte `offset` of its stream.
    pub fn decode(bytes: &[u8; HEADER_BYTES], offset: u64) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes, offset);
        let covered = Reader::new(bytes, offset).take(8, "record header")?;
        let body_len = reader.be32("record length")?;
        let kind = reader.be16("record type")?;
        let flags_at = reader.offset();
        let flags = reader.be16("record flags")?;
        let crc_at = reader.offset();
        let crc = reader.be32("record header checksum")?;
        check_crc(crc, crc32c::crc32c(covered), crc_at, "record header checksum")?;
        let max = MAX_BODY as u64;
        if u64::from(body_len) > max {
            let problem = Problem::OutOfRange { value: body_len.into(), min: 0, max };
            return Err(Malformed::new(offset, "record length", problem));
        }
        let reserved = flags & !(CHECKSUM | COMPRESSED);
        if reserved != 0 {
            let problem = Problem::Reserved { value: reserved.into() };
            return Err(Malformed::new(flags_at, "record flags", problem));
        }
        let header = Self { body_len: body_len as usize, kind, flags };
        if header.is_end() && (body_len != 0 || header.is_compressed()) {
            let problem = Problem::OutOfRange { value: body_len.into(), min: 0, max: 0 };
            return Err(Malformed::new(offset, "length of the END record", problem));
        }
        Ok(header)
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        debug_assert!(self.body_len <= MAX_BODY, "a body of {} bytes", self.body_len);
        let len = u32::try_from(self.body_len).unwrap_or(u32::MAX).to_be_bytes();
        let kind = self.kind.to_be_bytes();
        let flags = self.flags.to_be_bytes();
        let [a, b, c, d] = len;
        let ([e, f], [g, h]) = (kind, flags);
        let covered = [a, b, c, d, e, f, g, h];
        let [i, j, k, l] = crc32c::crc32c(&covered).to_be_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l]
    }

    /// Bytes after the header: body and checksum.
    pub fn rest_len(&self) -> usize {
        self.body_len.saturating_add(if self.has_checksum() { 4 } else { 0 })
    }

    /// Whether this ends a section body.
    pub fn is_end(&self) -> bool {
        self.kind == END
    }

    /// Whether a reader that does not know the type skips it.
    pub fn is_optional(&self) -> bool {
        self.kind & OPTIONAL != 0
    }

    /// Whether the body is followed by its checksum.
    pub fn has_checksum(&self) -> bool {
        self.flags & CHECKSUM != 0
    }

    /// Whether the body is compressed.
    pub fn is_compressed(&self) -> bool {
        self.flags & COMPRESSED != 0
    }
}

/// A record whose checksums were right. The body is borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// What stood before it.
    pub header: Header,
    /// The body, compressed if the header says so.
    pub body: &'a [u8],
    /// Offset of the body in its stream.
    pub offset: u64,
}

impl<'a> Record<'a> {
    /// Takes the next record from `reader`.
    pub fn decode(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        let at = reader.offset();
        let bytes = reader.array("record header")?;
        let header = Header::decode(bytes, at)?;
        let offset = reader.offset();
        Self::from_parts(header, reader.take(header.rest_len(), "record body")?, offset)
    }

    /// Joins a header and the [`Header::rest_len`] bytes after it, which stand at byte `offset`.
    pub fn from_parts(header: Header, rest: &'a [u8], offset: u64) -> Result<Self, Malformed> {
        let mut reader = Reader::new(rest, offset);
        let body = reader.take(header.body_len, "record body")?;
        if header.has_checksum() {
            let at = reader.offset();
            let crc = reader.be32("record checksum")?;
            check_crc(crc, crc32c::crc32c(body), at, "record checksum")?;
        }
        reader.finish("record")?;
        Ok(Self { header, body, offset })
    }

    /// A reader over the body of a record that must have a checksum and be inflated.
    pub fn plain_body(&self) -> Result<Reader<'a>, Malformed> {
        if !self.header.has_checksum() {
            let problem = Problem::Other("is missing");
            return Err(Malformed::new(self.offset, "record checksum", problem));
        }
        if self.header.is_compressed() {
            let problem = Problem::Other("is compressed where it must not be");
            return Err(Malformed::new(self.offset, "record body", problem));
        }
        Ok(Reader::new(self.body, self.offset))
    }

    /// The error for a type that the section does not know, unless it may be skipped.
    pub fn skip_unknown(&self) -> Result<(), Malformed> {
        if self.header.is_optional() {
            return Ok(());
        }
        let at = self.offset.saturating_sub(HEADER_BYTES as u64).saturating_add(4);
        let problem = Problem::Unknown { value: self.header.kind.into() };
        Err(Malformed::new(at, "record type", problem))
    }
}

/// Appends a record with checksum whose body is `parts` one after another, together at most
/// [`MAX_BODY`] bytes.
pub fn encode(kind: u16, parts: &[&[u8]], out: &mut Vec<u8>) {
    let body_len = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.len()));
    out.extend_from_slice(&Header { body_len, kind, flags: CHECKSUM }.encode());
    parts.iter().for_each(|part| out.extend_from_slice(part));
    out.extend_from_slice(&checksum(parts).to_be_bytes());
}

/// Appends the record that ends a section body.
pub fn encode_end(out: &mut Vec<u8>) {
    out.extend_from_slice(&Header { body_len: 0, kind: END, flags: 0 }.encode());
}

/// CRC32C of `parts` one after another.
pub fn checksum(parts: &[&[u8]]) -> u32 {
    parts.iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part))
}

fn check_crc(found: u32, expected: u32, at: u64, field: &'static str) -> Result<(), Malformed> {
    if found == expected {
        return Ok(());
    }
    let problem = Problem::Mismatch { value: found.into(), expected: expected.into() };
    Err(Malformed::new(at, field, problem))
}
