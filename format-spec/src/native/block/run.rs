//! A run of a disk: content or zeroes, and the pieces of bitmaps that go with it. SPEC 6.

use super::{
    DiskId, HAS_BITMAPS, HAS_BLOCK, Pieces, RUN, RUN_HEAD_BYTES, SECTOR_BYTES, ZERO_BLOCK,
};
use crate::content_hash::{LEAF_BYTES, MAX_SIZE};
use crate::native::frame::{self, MAX_BODY, MAX_PAYLOAD};
use crate::{Malformed, Problem, Reader, Writer};

/// What a run says of its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// Nothing: the run carries pieces alone.
    None,
    /// Its bytes: 1 to [`MAX_PAYLOAD`] of them.
    Data {
        /// Byte offset in the disk, a multiple of [`LEAF_BYTES`].
        offset: u64,
        /// Whole leaves, or up to the end of the disk.
        bytes: &'a [u8],
    },
    /// That it reads as zero.
    Zeroes {
        /// Byte offset in the disk, a multiple of [`LEAF_BYTES`].
        offset: u64,
        /// Whole leaves, or up to the end of the disk; in bytes, at least 1.
        len: u64,
    },
}

impl Content<'_> {
    /// The range it speaks of: byte offset and length, zero for [`Content::None`].
    pub fn range(&self) -> (u64, u64) {
        match self {
            Self::None => (0, 0),
            Self::Data { offset, bytes } => (*offset, bytes.len() as u64),
            Self::Zeroes { offset, len } => (*offset, *len),
        }
    }

    /// Checks the range against the disk: inside it, and cut on a leaf or at its end.
    pub fn check(&self, disk_size: u64) -> Result<(), Problem> {
        let (offset, len) = self.range();
        let end = offset.saturating_add(len);
        if end > disk_size {
            return Err(Problem::OutOfRange { value: end, min: 0, max: disk_size });
        }
        if end != disk_size && !end.is_multiple_of(LEAF_BYTES as u64) {
            return Err(Problem::Misaligned { value: end, align: LEAF_BYTES as u64 });
        }
        Ok(())
    }

    fn flags(&self) -> u32 {
        match self {
            Self::None => 0,
            Self::Data { .. } => HAS_BLOCK,
            Self::Zeroes { .. } => ZERO_BLOCK,
        }
    }
}

/// A run of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run<'a> {
    /// The disk.
    pub disk: DiskId,
    /// What it says of its range.
    pub content: Content<'a>,
    /// Pieces of bitmaps of the disk whose first granule lies in the range; any where there is no
    /// range. Not empty where there is no content.
    pub pieces: Pieces<'a>,
}

impl<'a> Run<'a> {
    /// Content without bitmap pieces.
    pub fn data(disk: DiskId, offset: u64, bytes: &'a [u8]) -> Self {
        Self { disk, content: Content::Data { offset, bytes }, pieces: Pieces::default() }
    }

    /// Zeroes without bitmap pieces.
    pub fn zeroes(disk: DiskId, offset: u64, len: u64) -> Self {
        Self { disk, content: Content::Zeroes { offset, len }, pieces: Pieces::default() }
    }

    pub(super) fn decode(body: &mut Reader<'a>) -> Result<Self, Malformed> {
        let disk = DiskId(body.be32("disk number")?);
        let flags_at = body.offset();
        let flags = body.flags32("run flags", HAS_BLOCK | HAS_BITMAPS | ZERO_BLOCK)?;
        let offset_at = body.offset();
        let offset = body.be64("run offset")?;
        let len_at = body.offset();
        let len = body.be64("run length")?;
        let pieces_at = body.offset();
        let pieces_len = body.be32("run length of pieces")?;
        let zero_at = body.offset();
        match body.be32("run reserved field")? {
            0 => {}
            value => {
                let problem = Problem::Reserved { value: value.into() };
                return Err(Malformed::new(zero_at, "run reserved field", problem));
            }
        }
        if (flags & HAS_BITMAPS != 0) != (pieces_len != 0) {
            let problem = Problem::Other("does not agree with HAS_BITMAPS");
            return Err(Malformed::new(pieces_at, "run length of pieces", problem));
        }
        let pieces = Pieces::decode(body.sub(pieces_len as usize, "run pieces")?)?;
        let content = match flags & (HAS_BLOCK | ZERO_BLOCK) {
            HAS_BLOCK => Content::Data { offset, bytes: take_content(body, len, len_at)? },
            ZERO_BLOCK => Content::Zeroes { offset, len },
            0 if flags & HAS_BITMAPS != 0 => {
                range_of_none(offset, len, offset_at)?;
                Content::None
            }
            _ => {
                let problem = Problem::Other("are a combination that has no meaning");
                return Err(Malformed::new(flags_at, "run flags", problem));
            }
        };
        check_range(&content, offset_at, len_at)?;
        Ok(Self { disk, content, pieces })
    }

    /// Appends what stands in the body before the content, so that content need not be copied: the
    /// body is this, then the content.
    pub fn encode_body_head(&self, out: &mut Vec<u8>) {
        let (offset, len) = self.content.range();
        let pieces = self.pieces.as_bytes();
        debug_assert!(self.content_bytes().len() <= MAX_PAYLOAD);
        let mut head = Writer::new();
        head.be32(self.disk.0);
        head.be32(self.content.flags() | if pieces.is_empty() { 0 } else { HAS_BITMAPS });
        head.be64(offset).be64(len);
        head.be32(u32::try_from(pieces.len()).unwrap_or(u32::MAX)).be32(0);
        out.extend_from_slice(&head.into_bytes());
        out.extend_from_slice(pieces);
    }

    /// Bytes of pieces that fit beside this content.
    pub fn room_for_pieces(content_len: usize) -> usize {
        MAX_BODY.saturating_sub(RUN_HEAD_BYTES).saturating_sub(content_len)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let mut head = Vec::new();
        self.encode_body_head(&mut head);
        frame::encode(RUN, &[&head, self.content_bytes()], out);
    }

    fn content_bytes(&self) -> &'a [u8] {
        match self.content {
            Content::Data { bytes, .. } => bytes,
            Content::None | Content::Zeroes { .. } => &[],
        }
    }
}

fn take_content<'a>(body: &mut Reader<'a>, len: u64, len_at: u64) -> Result<&'a [u8], Malformed> {
    match usize::try_from(len) {
        Ok(len) if len <= MAX_PAYLOAD => body.take(len, "run content"),
        _ => {
            let problem = Problem::OutOfRange { value: len, min: 1, max: MAX_PAYLOAD as u64 };
            Err(Malformed::new(len_at, "run length", problem))
        }
    }
}

fn range_of_none(offset: u64, len: u64, at: u64) -> Result<(), Malformed> {
    if offset == 0 && len == 0 {
        return Ok(());
    }
    let problem = Problem::Other("and length are not zero in a run of pieces alone");
    Err(Malformed::new(at, "run offset", problem))
}

fn check_range(content: &Content<'_>, offset_at: u64, len_at: u64) -> Result<(), Malformed> {
    let (offset, len) = content.range();
    if !offset.is_multiple_of(LEAF_BYTES as u64) {
        let problem = Problem::Misaligned { value: offset, align: LEAF_BYTES as u64 };
        return Err(Malformed::new(offset_at, "run offset", problem));
    }
    if !len.is_multiple_of(SECTOR_BYTES) {
        let problem = Problem::Misaligned { value: len, align: SECTOR_BYTES };
        return Err(Malformed::new(len_at, "run length", problem));
    }
    let max = MAX_SIZE.saturating_sub(offset.min(MAX_SIZE));
    let min = u64::from(!matches!(content, Content::None));
    if (min..=max).contains(&len) {
        return Ok(());
    }
    Err(Malformed::new(len_at, "run length", Problem::OutOfRange { value: len, min, max }))
}
