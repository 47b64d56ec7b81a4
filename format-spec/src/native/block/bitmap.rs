//! Bitmaps in the `block` section: their life and their pieces. SPEC 6.

use super::{
    BITMAP_CREATE, BITMAP_SEAL, BITMAP_UPDATE, DiskId, ENABLED, MAX_BITMAP_NAME, MAX_GRANULARITY,
    MIN_GRANULARITY, PERSISTENT, PIECE_BYTES, encode_hash, sealed_hash,
};
use crate::content_hash::BitmapDigest;
use crate::{Malformed, Problem, Reader, Writer};

/// One life of a bitmap: its number, and how often its name was created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitmapVersion {
    /// Number of the bitmap in the session, chosen by the source; stands for a disk and a name.
    pub bitmap: u32,
    /// 1, and one more each time the name is created again.
    pub generation: u32,
}

impl BitmapVersion {
    pub(in crate::native) fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let bitmap = body.be32("bitmap number")?;
        let at = body.offset();
        let generation = body.be32("bitmap generation")?;
        if generation == 0 {
            let problem = Problem::OutOfRange { value: 0, min: 1, max: u32::MAX.into() };
            return Err(Malformed::new(at, "bitmap generation", problem));
        }
        Ok(Self { bitmap, generation })
    }

    pub(in crate::native) fn encode(self, body: &mut Writer) {
        body.be32(self.bitmap).be32(self.generation);
    }
}

/// What says how many bits a bitmap has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapShape {
    /// Guest bytes per bit: a power of two from [`MIN_GRANULARITY`] to [`MAX_GRANULARITY`].
    pub granularity: u32,
    /// Number of granules.
    pub bits: u64,
}

impl BitmapShape {
    /// The bitmap of a disk of `size` bytes.
    pub fn of_disk(size: u64, granularity: u32) -> Self {
        Self { granularity, bits: size.div_ceil(granularity.max(1).into()) }
    }

    /// Bytes of the bitmap: whole 64-bit words.
    pub fn byte_len(&self) -> u64 {
        self.bits.div_ceil(64).saturating_mul(8)
    }

    /// Number of pieces.
    pub fn piece_count(&self) -> u64 {
        self.byte_len().div_ceil(PIECE_BYTES as u64)
    }

    /// Bytes of piece `index`; `None` beyond the last.
    pub fn piece_len(&self, index: u64) -> Option<usize> {
        let start = index.checked_mul(PIECE_BYTES as u64)?;
        match self.byte_len().checked_sub(start)? {
            0 => None,
            rest => usize::try_from(rest.min(PIECE_BYTES as u64)).ok(),
        }
    }

    /// Byte offset in the disk of the first granule of piece `index`: the run that covers it
    /// carries the piece.
    pub fn piece_start(&self, index: u64) -> u64 {
        let granules = index.saturating_mul(PIECE_BYTES as u64).saturating_mul(8);
        granules.saturating_mul(self.granularity.into())
    }

    /// Checks a piece: it exists, and has the length it must have.
    pub fn check(&self, piece: &Piece<'_>) -> Result<(), Problem> {
        let Some(expected) = self.piece_len(piece.index) else {
            let max = self.piece_count().saturating_sub(1);
            return Err(Problem::OutOfRange { value: piece.index, min: 0, max });
        };
        if piece.bits.is_empty() || piece.bits.len() == expected {
            return Ok(());
        }
        Err(Problem::Mismatch { value: piece.bits.len() as u64, expected: expected as u64 })
    }
}

/// Creates a bitmap, all bits clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapCreate<'a> {
    /// Its number and generation from now on.
    pub version: BitmapVersion,
    /// The disk it belongs to.
    pub disk: DiskId,
    /// Granularity and bits.
    pub shape: BitmapShape,
    /// Whether it records what the guest writes.
    pub is_enabled: bool,
    /// Whether it is kept with the disk.
    pub is_persistent: bool,
    /// Name, unique on the disk.
    pub name: &'a str,
}

impl<'a> BitmapCreate<'a> {
    pub(super) fn decode(body: &mut Reader<'a>) -> Result<Self, Malformed> {
        let version = BitmapVersion::decode(body)?;
        let disk = DiskId(body.be32("disk number")?);
        let at = body.offset();
        let granularity = body.be32("bitmap granularity")?;
        if !granularity.is_power_of_two() || granularity < MIN_GRANULARITY {
            let (min, max) = (MIN_GRANULARITY.into(), MAX_GRANULARITY.into());
            let problem = Problem::NotPowerOfTwo { value: granularity.into(), min, max };
            return Err(Malformed::new(at, "bitmap granularity", problem));
        }
        let shape = BitmapShape { granularity, bits: body.be64("bitmap size in bits")? };
        let flags = body.flags32("bitmap flags", ENABLED | PERSISTENT)?;
        let name = body.name16(MAX_BITMAP_NAME, "bitmap name")?;
        let (is_enabled, is_persistent) = (flags & ENABLED != 0, flags & PERSISTENT != 0);
        Ok(Self { version, disk, shape, is_enabled, is_persistent, name })
    }

    pub(super) fn encode(&self, body: &mut Writer) -> u16 {
        self.version.encode(body);
        body.be32(self.disk.0).be32(self.shape.granularity).be64(self.shape.bits);
        body.be32(flag_bits(self.is_enabled, self.is_persistent));
        body.text16(self.name, MAX_BITMAP_NAME);
        BITMAP_CREATE
    }

    /// The disk and the name in the body of such a record that may not be well formed otherwise: for
    /// messages.
    pub fn named(body: &'a [u8]) -> Option<(DiskId, &'a str)> {
        let mut body = Reader::new(body, 0);
        body.be64("bitmap number, generation").ok()?;
        let disk = DiskId(body.be32("disk number").ok()?);
        body.be32("bitmap granularity").ok()?;
        body.be64("bitmap size in bits").ok()?;
        body.be32("bitmap flags").ok()?;
        Some((disk, body.name16(MAX_BITMAP_NAME, "bitmap name").ok()?))
    }

    /// Checks the number of bits against the size of the disk.
    pub fn check(&self, disk_size: u64) -> Result<(), Problem> {
        let expected = BitmapShape::of_disk(disk_size, self.shape.granularity).bits;
        if self.shape.bits == expected {
            return Ok(());
        }
        Err(Problem::Mismatch { value: self.shape.bits, expected })
    }
}

/// Replaces a bitmap's flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapUpdate {
    /// The bitmap.
    pub version: BitmapVersion,
    /// Whether it records what the guest writes.
    pub is_enabled: bool,
    /// Whether it is kept with the disk.
    pub is_persistent: bool,
}

impl BitmapUpdate {
    pub(super) fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let version = BitmapVersion::decode(body)?;
        let flags = body.flags32("bitmap flags", ENABLED | PERSISTENT)?;
        let (is_enabled, is_persistent) = (flags & ENABLED != 0, flags & PERSISTENT != 0);
        Ok(Self { version, is_enabled, is_persistent })
    }

    pub(super) fn encode(&self, body: &mut Writer) -> u16 {
        self.version.encode(body);
        body.be32(flag_bits(self.is_enabled, self.is_persistent));
        BITMAP_UPDATE
    }
}

/// Ends a bitmap: all its bits were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapSeal {
    /// The bitmap.
    pub version: BitmapVersion,
    /// Its bits as one value; `None` where the user wanted no proof.
    pub digest: Option<BitmapDigest>,
}

impl BitmapSeal {
    pub(super) fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let version = BitmapVersion::decode(body)?;
        let digest = sealed_hash(body, "bitmap digest")?.map(BitmapDigest);
        Ok(Self { version, digest })
    }

    pub(super) fn encode(&self, body: &mut Writer) -> u16 {
        self.version.encode(body);
        encode_hash(self.digest.as_ref().map(|digest| &digest.0), body);
        BITMAP_SEAL
    }
}

/// A piece of a bitmap: replaces what the bitmap has there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The bitmap.
    pub version: BitmapVersion,
    /// Position in units of [`PIECE_BYTES`].
    pub index: u64,
    /// The bytes; none for zeroes. [`BitmapShape::check`] holds the length against the bitmap.
    pub bits: &'a [u8],
}

impl<'a> Piece<'a> {
    /// Appends the piece to what becomes [`Pieces`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        debug_assert!(self.bits.len() <= PIECE_BYTES, "a piece of {} bytes", self.bits.len());
        let mut head = Writer::new();
        self.version.encode(&mut head);
        head.be64(self.index).be32(u32::try_from(self.bits.len()).unwrap_or(u32::MAX));
        out.extend_from_slice(&head.into_bytes());
        out.extend_from_slice(self.bits);
    }

    fn decode(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        let version = BitmapVersion::decode(reader)?;
        let index = reader.be64("piece index")?;
        let at = reader.offset();
        let len = reader.be32("piece length")? as usize;
        if len > PIECE_BYTES {
            let (value, max) = (len as u64, PIECE_BYTES as u64);
            let problem = Problem::OutOfRange { value, min: 0, max };
            return Err(Malformed::new(at, "piece length", problem));
        }
        if !len.is_multiple_of(8) {
            let problem = Problem::Misaligned { value: len as u64, align: 8 };
            return Err(Malformed::new(at, "piece length", problem));
        }
        let bits = reader.take(len, "piece")?;
        Ok(Self { version, index, bits })
    }
}

/// Well-formed pieces one after another, as they are on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pieces<'a> {
    bytes: &'a [u8],
}

impl<'a> Pieces<'a> {
    /// Checks all that `reader` has left, so that [`iter`](Pieces::iter) cannot fail.
    pub fn decode(mut reader: Reader<'a>) -> Result<Self, Malformed> {
        let bytes = reader.clone().take_rest();
        while reader.left() > 0 {
            Piece::decode(&mut reader)?;
        }
        Ok(Self { bytes })
    }

    /// The pieces in their order.
    pub fn iter(&self) -> impl Iterator<Item = Piece<'a>> + use<'a> {
        let mut reader = Reader::new(self.bytes, 0);
        std::iter::from_fn(move || Piece::decode(&mut reader).ok())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The pieces as they are on the wire.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

pub(in crate::native) fn flag_bits(is_enabled: bool, is_persistent: bool) -> u32 {
    (if is_enabled { ENABLED } else { 0 }) | (if is_persistent { PERSISTENT } else { 0 })
}
