//! Cut a disk into the chunks of the `block` section. Pure: it is handed the units of a disk.

use block_mig::Result;
use block_mig::plan::{Content, Unit};
use format_spec::qemu::block::CHUNK_BYTES;

/// [`CHUNK_BYTES`] as a length on a disk.
pub const CHUNK: u64 = CHUNK_BYTES as u64;

/// A chunk of a disk that is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Where it starts: a multiple of [`CHUNK`].
    pub offset: u64,
    /// Whether it is known to read as zero, all of it.
    pub is_zero: bool,
}

impl Chunk {
    /// Bytes of it that lie on a disk of `size` bytes.
    pub fn len_on(&self, size: u64) -> u64 {
        size.saturating_sub(self.offset).min(CHUNK)
    }
}

/// Where the content of the chunk at `offset` is read and sent, on a disk of `size` bytes: a QEMU
/// destination dies when a record reaches beyond the end of its disk, so that the last one is moved
/// down to end with the disk. `None` where the disk is smaller than a record.
pub fn placed(offset: u64, size: u64) -> Option<u64> {
    size.checked_sub(CHUNK).map(|last| offset.min(last))
}

/// The chunks of a disk that are to be sent, in order. What is not to be moved is left out, chunk
/// by chunk: one unit in a chunk makes it be sent whole.
#[derive(Debug)]
pub struct Chunks<I> {
    units: I,
    size: u64,
    at: u64,
    unit: Option<Unit>,
}

impl<I: Iterator<Item = Result<Unit>>> Chunks<I> {
    /// For a disk of `size` bytes, whose units come in order and without gaps.
    pub fn new(units: I, size: u64) -> Self {
        Self { units, size, at: 0, unit: None }
    }

    /// The unit that holds `self.at`.
    fn unit(&mut self) -> Result<Option<Unit>> {
        while self.unit.is_none_or(|unit| unit.end() <= self.at) {
            match self.units.next() {
                Some(unit) => self.unit = Some(unit?),
                None => return Ok(None),
            }
        }
        Ok(self.unit)
    }

    fn cut(&mut self) -> Result<Option<Chunk>> {
        while self.at < self.size {
            let offset = self.at;
            let end = offset.saturating_add(CHUNK).min(self.size);
            let mut found = None;
            while self.at < end {
                let Some(unit) = self.unit()? else { break };
                found = Some(found.map_or(unit.content, |content| mixed(content, unit.content)));
                self.at = unit.end().min(end);
            }
            let is_zero = match found {
                None => return Ok(None),
                Some(Content::Untouched) => {
                    self.skip();
                    continue;
                }
                Some(Content::Zeroes) => true,
                Some(Content::Bytes { .. }) => false,
            };
            return Ok(Some(Chunk { offset, is_zero }));
        }
        Ok(None)
    }

    /// Goes on behind a chunk that is left out: a long run is passed in one step.
    fn skip(&mut self) {
        if let Some(Unit { content: Content::Untouched, .. }) = self.unit {
            let end = self.unit.map_or(0, |unit| unit.end()).min(self.size);
            self.at = self.at.max(if end == self.size { end } else { end / CHUNK * CHUNK });
        }
    }
}

impl<I: Iterator<Item = Result<Unit>>> Iterator for Chunks<I> {
    type Item = Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        self.cut().transpose()
    }
}

/// Two parts of one chunk: zeroes beside what is not to be moved are read with it.
fn mixed(one: Content, other: Content) -> Content {
    if one == other { one } else { Content::Bytes { compressed: false } }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: Content = Content::Bytes { compressed: false };

    fn cut(size: u64, units: &[(u64, Content)]) -> Vec<(u64, bool)> {
        let mut offset = 0;
        let units: Vec<_> = units
            .iter()
            .map(|(len, content)| {
                let unit = Unit { offset, len: *len, content: *content };
                offset += len;
                Ok(unit)
            })
            .collect();
        assert_eq!(offset, size);
        let chunks = Chunks::new(units.into_iter(), size);
        chunks.map(|c| c.unwrap()).map(|c| (c.offset / CHUNK, c.is_zero)).collect()
    }

    #[test]
    fn one_unit_with_content_makes_a_chunk_be_read() {
        assert_eq!(cut(0, &[]), []);
        assert_eq!(cut(512, &[(512, BYTES)]), [(0, false)]);
        assert_eq!(
            cut(3 * CHUNK, &[(3 * CHUNK, Content::Zeroes)]),
            [(0, true), (1, true), (2, true)]
        );
        let units = [(CHUNK + 512, Content::Zeroes), (512, BYTES), (CHUNK, Content::Zeroes)];
        assert_eq!(cut(2 * CHUNK + 1024, &units), [(0, true), (1, false), (2, true)]);
    }

    #[test]
    fn what_is_untouched_is_left_out_chunk_by_chunk() {
        let untouched = Content::Untouched;
        assert_eq!(cut(1 << 40, &[(1 << 40, untouched)]), []);
        let units = [
            ((1 << 40) + 512, untouched),
            (512, BYTES),
            (CHUNK - 1024, untouched),
            (CHUNK - 512, untouched),
            (512, Content::Zeroes),
            (CHUNK, Content::Zeroes),
            (CHUNK + 512, untouched),
        ];
        let first = (1 << 40) / CHUNK;
        let expected = [(first, false), (first + 1, false), (first + 2, true)];
        assert_eq!(cut((1 << 40) + 4 * CHUNK + 512, &units), expected);
    }

    #[test]
    fn an_error_comes_through() {
        let units = [Err(block_mig::Error::Cancelled)].into_iter();
        assert!(Chunks::new(units, CHUNK).next().unwrap().is_err());
    }

    #[test]
    fn the_last_chunk_ends_with_the_disk() {
        assert_eq!(placed(0, CHUNK), Some(0));
        assert_eq!(placed(0, CHUNK - 512), None);
        assert_eq!(placed(CHUNK, CHUNK + 512), Some(512));
        assert_eq!(placed(CHUNK, 2 * CHUNK + 512), Some(CHUNK));
        assert_eq!(Chunk { offset: CHUNK, is_zero: false }.len_on(CHUNK + 512), 512);
    }
}
