//! Records of the `block` section, version 2: disks, their content, their bitmaps. SPEC 6.

mod bitmap;
mod run;

pub use bitmap::{
    BitmapCreate, BitmapSeal, BitmapShape, BitmapUpdate, BitmapVersion, Piece, Pieces,
};
pub use run::{Content, Run};

pub(super) use bitmap::flag_bits;

use super::frame::{self, OPTIONAL, Record};
use crate::content_hash::{ContentHash, MAX_SIZE};
use crate::{Malformed, Problem, Reader, Writer};

/// Name of the section.
pub const SECTION: &str = "block";
/// Version of the section.
pub const SECTION_VERSION: u32 = 2;
/// Type of [`Disk`].
pub const DISK: u16 = 1;
/// Type of [`Run`].
pub const RUN: u16 = 2;
/// Type of [`DiskSeal`].
pub const DISK_SEAL: u16 = 3;
/// Type of [`BitmapCreate`].
pub const BITMAP_CREATE: u16 = 4;
/// Type of [`BitmapUpdate`].
pub const BITMAP_UPDATE: u16 = 5;
/// Type of the record that removes a [`BitmapVersion`].
pub const BITMAP_REMOVE: u16 = 6;
/// Type of [`BitmapSeal`].
pub const BITMAP_SEAL: u16 = 7;
/// Type of [`DiskContent`].
pub const DISK_CONTENT: u16 = OPTIONAL | 8;
/// Disk flag: what no run covers keeps the content that the destination has.
pub const KEEPS_REST: u32 = 0x1;
/// Run flag: carries content.
pub const HAS_BLOCK: u32 = 0x1;
/// Run flag: carries pieces of bitmaps.
pub const HAS_BITMAPS: u32 = 0x2;
/// Run flag: the range reads as zero.
pub const ZERO_BLOCK: u32 = 0x4;
/// Seal flag: the hash or digest is there.
pub const HAS_HASH: u32 = 0x1;
/// Bitmap flag: records what the guest writes.
pub const ENABLED: u32 = 0x1;
/// Bitmap flag: is kept with the disk.
pub const PERSISTENT: u32 = 0x2;
/// Bytes of a bitmap in one piece.
pub const PIECE_BYTES: usize = 1024;
/// Bytes of a run before its pieces.
pub const RUN_HEAD_BYTES: usize = 32;
/// Bytes of a piece before its bits.
pub const PIECE_HEAD_BYTES: usize = 20;
/// Longest name of a disk, in bytes.
pub const MAX_DISK_NAME: usize = 255;
/// Longest name of a bitmap, in bytes; qcow2's limit.
pub const MAX_BITMAP_NAME: usize = 1023;
/// Smallest granularity.
pub const MIN_GRANULARITY: u32 = 512;
/// Largest granularity.
pub const MAX_GRANULARITY: u32 = 1 << 31;
/// Unit of disk sizes.
const SECTOR_BYTES: u64 = 512;

/// Number of a disk in one session, chosen by the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskId(pub u32);

/// Introduces a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk<'a> {
    /// Its number from now on.
    pub disk: DiskId,
    /// Whether what no run covers keeps the content that the destination has.
    pub keeps_rest: bool,
    /// Guest-visible size in bytes, a multiple of 512.
    pub size: u64,
    /// Selects among what the destination's user configured. Never a path.
    pub name: &'a str,
}

/// Says how much of a disk is content, before any of it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskContent {
    /// The disk.
    pub disk: DiskId,
    /// Bytes that the source's maps do not call zero.
    pub bytes: u64,
}

/// Ends a disk: all its content was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSeal {
    /// The disk.
    pub disk: DiskId,
    /// What the source sent, as one value; `None` where the user wanted no proof.
    pub hash: Option<ContentHash>,
}

/// Any record of the section. Borrows names, bits and content from the record's body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockRecord<'a> {
    /// The section's body ends here.
    End,
    /// Introduces a disk.
    Disk(Disk<'a>),
    /// Content, zeroes, pieces of bitmaps.
    Run(Run<'a>),
    /// Ends a disk.
    DiskSeal(DiskSeal),
    /// Creates a bitmap, all bits clear.
    BitmapCreate(BitmapCreate<'a>),
    /// Changes a bitmap's flags.
    BitmapUpdate(BitmapUpdate),
    /// Removes a bitmap.
    BitmapRemove(BitmapVersion),
    /// Ends a bitmap: all its bits were sent.
    BitmapSeal(BitmapSeal),
    /// Says how much of a disk is content.
    DiskContent(DiskContent),
}

impl<'a> BlockRecord<'a> {
    /// Decodes a record; `None` for an unknown one that may be skipped.
    pub fn decode(record: &Record<'a>) -> Result<Option<Self>, Malformed> {
        if record.header.is_end() {
            return Ok(Some(Self::End));
        }
        if !matches!(record.header.kind, DISK..=BITMAP_SEAL | DISK_CONTENT) {
            return record.skip_unknown().map(|()| None);
        }
        let mut body = record.plain_body()?;
        let decoded = match record.header.kind {
            DISK => Self::Disk(Disk::decode(&mut body)?),
            RUN => Self::Run(Run::decode(&mut body)?),
            DISK_SEAL => Self::DiskSeal(DiskSeal::decode(&mut body)?),
            BITMAP_CREATE => Self::BitmapCreate(BitmapCreate::decode(&mut body)?),
            BITMAP_UPDATE => Self::BitmapUpdate(BitmapUpdate::decode(&mut body)?),
            BITMAP_REMOVE => Self::BitmapRemove(BitmapVersion::decode(&mut body)?),
            DISK_CONTENT => Self::DiskContent(DiskContent::decode(&mut body)?),
            _ => Self::BitmapSeal(BitmapSeal::decode(&mut body)?),
        };
        body.finish("record")?;
        Ok(Some(decoded))
    }

    /// Appends the whole record. Content is copied; [`Run::encode_body_head`] avoids that.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut body = Writer::new();
        let kind = match self {
            Self::End => return frame::encode_end(out),
            Self::Run(run) => return run.encode(out),
            Self::Disk(disk) => disk.encode(&mut body),
            Self::DiskSeal(seal) => seal.encode(&mut body),
            Self::BitmapCreate(create) => create.encode(&mut body),
            Self::BitmapUpdate(update) => update.encode(&mut body),
            Self::BitmapRemove(version) => {
                version.encode(&mut body);
                BITMAP_REMOVE
            }
            Self::BitmapSeal(seal) => seal.encode(&mut body),
            Self::DiskContent(content) => content.encode(&mut body),
        };
        frame::encode(kind, &[&body.into_bytes()], out);
    }
}

impl<'a> Disk<'a> {
    fn decode(body: &mut Reader<'a>) -> Result<Self, Malformed> {
        let disk = DiskId(body.be32("disk number")?);
        let flags = body.flags32("disk flags", KEEPS_REST)?;
        let at = body.offset();
        let size = body.be64("disk size")?;
        if !size.is_multiple_of(SECTOR_BYTES) {
            let problem = Problem::Misaligned { value: size, align: SECTOR_BYTES };
            return Err(Malformed::new(at, "disk size", problem));
        }
        if size > MAX_SIZE {
            let problem = Problem::OutOfRange { value: size, min: 0, max: MAX_SIZE };
            return Err(Malformed::new(at, "disk size", problem));
        }
        let name = body.name16(MAX_DISK_NAME, "disk name")?;
        Ok(Self { disk, keeps_rest: flags & KEEPS_REST != 0, size, name })
    }

    fn encode(&self, body: &mut Writer) -> u16 {
        body.be32(self.disk.0).be32(if self.keeps_rest { KEEPS_REST } else { 0 });
        body.be64(self.size).text16(self.name, MAX_DISK_NAME);
        DISK
    }
}

impl DiskContent {
    fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let disk = DiskId(body.be32("disk number")?);
        Ok(Self { disk, bytes: body.be64("bytes of content")? })
    }

    fn encode(self, body: &mut Writer) -> u16 {
        body.be32(self.disk.0).be64(self.bytes);
        DISK_CONTENT
    }
}

impl DiskSeal {
    fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let disk = DiskId(body.be32("disk number")?);
        let hash = sealed_hash(body, "content hash")?.map(ContentHash);
        Ok(Self { disk, hash })
    }

    fn encode(&self, body: &mut Writer) -> u16 {
        body.be32(self.disk.0);
        encode_hash(self.hash.as_ref().map(|hash| &hash.0), body);
        DISK_SEAL
    }
}

/// The flags of a seal, and what they say follows.
fn sealed_hash(body: &mut Reader<'_>, field: &'static str) -> Result<Option<[u8; 32]>, Malformed> {
    if body.flags32("seal flags", HAS_HASH)? & HAS_HASH == 0 {
        return Ok(None);
    }
    body.array(field).map(|hash| Some(*hash))
}

fn encode_hash(hash: Option<&[u8; 32]>, body: &mut Writer) {
    match hash {
        Some(hash) => body.be32(HAS_HASH).bytes(hash),
        None => body.be32(0),
    };
}
