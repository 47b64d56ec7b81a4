//! What has arrived of a stream and is not taken yet.

use std::io::{self, Read};

use format_spec::qemu::MAX_ITEM;

/// What is read at once when little is needed: thousands of empty sections fit in it.
const READ_BYTES: usize = 256 << 10;

/// What has arrived of a stream and is not taken yet: the bytes that decoders are handed. It holds
/// at most one item of [`MAX_ITEM`] bytes and what came with it.
#[derive(Debug)]
pub(crate) struct Buffer<R> {
    reader: R,
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    is_whole: bool,
}

impl<R: Read> Buffer<R> {
    /// Nothing has arrived yet.
    pub(crate) fn new(reader: R) -> Self {
        Self { reader, bytes: Vec::new(), start: 0, end: 0, is_whole: false }
    }

    /// Where it comes from. What has arrived and was not taken is lost.
    pub(crate) fn into_reader(self) -> R {
        self.reader
    }

    /// What has arrived.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Whether nothing comes after it.
    pub(crate) fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Takes the first `len` bytes out.
    pub(crate) fn consume(&mut self, len: usize) {
        self.start = self.start.saturating_add(len).min(self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Waits until `needed` bytes are here, at most [`MAX_ITEM`], or nothing more comes.
    pub(crate) fn fill(&mut self, needed: usize) -> io::Result<()> {
        if needed > MAX_ITEM {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an item larger than any"));
        }
        while self.end - self.start < needed && !self.is_whole {
            if self.bytes.len() - self.start < needed.max(READ_BYTES) {
                self.bytes.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
                let room = needed.max(READ_BYTES).saturating_mul(2);
                if self.bytes.len() < room {
                    self.bytes.resize(room, 0);
                }
            }
            let room = self.bytes.get_mut(self.end..).unwrap_or_default();
            match self.reader.read(room) {
                Ok(0) => self.is_whole = true,
                Ok(len) => self.end = self.end.saturating_add(len).min(self.bytes.len()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives one byte at a time.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            match self.0 {
                [first, rest @ ..] => {
                    out[0] = *first;
                    self.0 = rest;
                    Ok(1)
                }
                [] => Ok(0),
            }
        }
    }

    #[test]
    fn all_bytes_come_in_their_order() {
        let bytes: Vec<u8> = (0..=255).cycle().take(3 * READ_BYTES + 5).collect();
        let mut buffer = Buffer::new(Slow(&bytes));
        let mut seen = Vec::new();
        for step in [1, 7, READ_BYTES, 3, READ_BYTES + 9].iter().cycle() {
            buffer.fill(*step).unwrap();
            let len = buffer.bytes().len().min(*step);
            seen.extend_from_slice(&buffer.bytes()[..len]);
            buffer.consume(len);
            if buffer.is_whole() && buffer.bytes().is_empty() {
                break;
            }
        }
        assert!(seen == bytes);
        assert!(buffer.fill(1).is_ok() && buffer.bytes().is_empty());
        assert!(Buffer::new(Slow(b"")).fill(MAX_ITEM + 1).is_err());
    }
}
