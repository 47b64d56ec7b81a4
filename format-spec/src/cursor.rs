//! The one reader and the one writer of fixed-layout bytes.

use byteorder::{BigEndian, ByteOrder, LittleEndian};

use crate::malformed::{Malformed, Problem};

/// A cursor over a slice. Every method names the field it reads, so that an error can name it too.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
    offset: u64,
}

impl<'a> Reader<'a> {
    /// Reads `bytes`, which stand at `base` in the file or stream.
    pub fn new(bytes: &'a [u8], base: u64) -> Self {
        Self { rest: bytes, offset: base }
    }

    /// Offset of the next byte.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes not yet read.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// Takes the next `len` bytes.
    pub fn take(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], Malformed> {
        match self.rest.split_at_checked(len) {
            Some((head, tail)) => {
                self.rest = tail;
                self.offset = self.offset.saturating_add(len as u64);
                Ok(head)
            }
            None => Err(Malformed::new(
                self.offset,
                field,
                Problem::Truncated { needed: len as u64, left: self.rest.len() as u64 },
            )),
        }
    }

    /// A child reader over the next `len` bytes, for a body whose length is known.
    pub fn sub(&mut self, len: usize, field: &'static str) -> Result<Reader<'a>, Malformed> {
        let base = self.offset;
        Ok(Reader::new(self.take(len, field)?, base))
    }

    /// Takes what is left.
    pub fn take_rest(&mut self) -> &'a [u8] {
        let rest = std::mem::take(&mut self.rest);
        self.offset = self.offset.saturating_add(rest.len() as u64);
        rest
    }

    /// Fails when bytes are left over.
    pub fn finish(self, field: &'static str) -> Result<(), Malformed> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(Malformed::new(
                self.offset,
                field,
                Problem::Other("is followed by unexpected bytes"),
            ))
        }
    }

    /// One byte.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, Malformed> {
        Ok(self.take(1, field)?.first().copied().unwrap_or_default())
    }

    /// Big-endian 16 bits.
    pub fn be16(&mut self, field: &'static str) -> Result<u16, Malformed> {
        self.take(2, field).map(BigEndian::read_u16)
    }

    /// Big-endian 32 bits.
    pub fn be32(&mut self, field: &'static str) -> Result<u32, Malformed> {
        self.take(4, field).map(BigEndian::read_u32)
    }

    /// Big-endian 64 bits.
    pub fn be64(&mut self, field: &'static str) -> Result<u64, Malformed> {
        self.take(8, field).map(BigEndian::read_u64)
    }

    /// Little-endian 64 bits.
    pub fn le64(&mut self, field: &'static str) -> Result<u64, Malformed> {
        self.take(8, field).map(LittleEndian::read_u64)
    }
}

/// Appends fixed-layout fields to a byte vector.
#[derive(Debug, Default, Clone)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty writer.
    pub fn new() -> Self {
        Self::default()
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    /// Big-endian 16 bits.
    pub fn be16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    /// Big-endian 32 bits.
    pub fn be32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    /// Big-endian 64 bits.
    pub fn be64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    /// Little-endian 64 bits.
    pub fn le64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Raw bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Zeroes up to the next multiple of `align`.
    pub fn pad_to(&mut self, align: usize) -> &mut Self {
        let padded = self.bytes.len().next_multiple_of(align.max(1));
        self.bytes.resize(padded, 0);
        self
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_was_written_and_names_what_is_missing() {
        let mut w = Writer::new();
        w.u8(1).be16(2).be32(3).be64(4).le64(5).bytes(b"ab").pad_to(8);
        let bytes = w.into_bytes();
        assert_eq!(bytes.len(), 32);
        let mut r = Reader::new(&bytes, 100);
        assert_eq!(r.u8("a").unwrap(), 1);
        assert_eq!(r.be16("b").unwrap(), 2);
        assert_eq!(r.be32("c").unwrap(), 3);
        assert_eq!(r.be64("d").unwrap(), 4);
        assert_eq!(r.le64("e").unwrap(), 5);
        assert_eq!(r.take(2, "f").unwrap(), b"ab");
        assert_eq!(r.offset(), 125);
        let e = r.be64("g").unwrap_err();
        assert_eq!(e.to_string(), "g at offset 125 needs 8 bytes where 7 are left");
        assert!(r.finish("end").is_err());
    }
}
