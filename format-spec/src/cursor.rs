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

    /// Takes `N` bytes as an array.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<&'a [u8; N], Malformed> {
        let at = self.offset;
        let bytes = self.take(N, field)?;
        bytes.try_into().map_err(|_| Malformed::new(at, field, Problem::Other("is cut off")))
    }

    /// Text behind a one-byte length, for messages: may be empty, and what is not UTF-8 is
    /// replaced.
    pub fn text8(&mut self, field: &'static str) -> Result<String, Malformed> {
        let len = self.u8(field)?;
        self.take(len.into(), field).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }

    /// Text behind a big-endian two-byte length of at most `max` bytes, for messages: may be empty,
    /// and what is not UTF-8 is replaced.
    pub fn text16(&mut self, max: usize, field: &'static str) -> Result<String, Malformed> {
        let len = self.length16(0, max, field)?;
        self.take(len, field).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }

    /// A name behind a one-byte length: 1 to 255 bytes of UTF-8 without NUL.
    pub fn name8(&mut self, field: &'static str) -> Result<&'a str, Malformed> {
        let at = self.offset;
        match self.name8_or_empty(field)? {
            "" => Err(Malformed::new(at, field, Problem::Other("is empty"))),
            name => Ok(name),
        }
    }

    /// Like [`name8`](Reader::name8), or no name.
    pub fn name8_or_empty(&mut self, field: &'static str) -> Result<&'a str, Malformed> {
        let len = self.u8(field)?;
        self.name(len.into(), field)
    }

    fn name(&mut self, len: usize, field: &'static str) -> Result<&'a str, Malformed> {
        let at = self.offset;
        match std::str::from_utf8(self.take(len, field)?) {
            Ok(name) if !name.contains('\0') => Ok(name),
            _ => Err(Malformed::new(at, field, Problem::BadName)),
        }
    }

    /// A name behind a big-endian two-byte length: 1 to `max` bytes of UTF-8 without NUL.
    pub fn name16(&mut self, max: usize, field: &'static str) -> Result<&'a str, Malformed> {
        let len = self.length16(1, max, field)?;
        self.name(len, field)
    }

    fn length16(
        &mut self,
        min: usize,
        max: usize,
        field: &'static str,
    ) -> Result<usize, Malformed> {
        let at = self.offset;
        let len = self.be16(field)?;
        if (min..=max).contains(&usize::from(len)) {
            return Ok(len.into());
        }
        let (min, max) = (min as u64, max as u64);
        Err(Malformed::new(at, field, Problem::OutOfRange { value: len.into(), min, max }))
    }

    /// Big-endian 16 bits.
    pub fn be16(&mut self, field: &'static str) -> Result<u16, Malformed> {
        self.take(2, field).map(BigEndian::read_u16)
    }

    /// Big-endian 32 bits.
    pub fn be32(&mut self, field: &'static str) -> Result<u32, Malformed> {
        self.take(4, field).map(BigEndian::read_u32)
    }

    /// Big-endian 32 bits of which only those of `known` may be set.
    pub fn flags32(&mut self, field: &'static str, known: u32) -> Result<u32, Malformed> {
        let at = self.offset;
        let flags = self.be32(field)?;
        match flags & !known {
            0 => Ok(flags),
            unknown => Err(Malformed::new(at, field, Problem::Reserved { value: unknown.into() })),
        }
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

    /// Text behind a one-byte length, cut at a character where it is longer than that can say.
    pub fn text8(&mut self, text: &str) -> &mut Self {
        let text = cut(text, u8::MAX.into());
        self.u8(u8::try_from(text.len()).unwrap_or(u8::MAX)).bytes(text.as_bytes())
    }

    /// Text or a name behind a big-endian two-byte length, cut at a character beyond `max` bytes.
    pub fn text16(&mut self, text: &str, max: usize) -> &mut Self {
        let text = cut(text, max.min(u16::MAX.into()));
        self.be16(u16::try_from(text.len()).unwrap_or(u16::MAX)).bytes(text.as_bytes())
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

fn cut(text: &str, max: usize) -> &str {
    text.get(..text.floor_char_boundary(max)).unwrap_or(text)
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
