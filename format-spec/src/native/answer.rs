//! What the destination answers on the reverse direction of main. SPEC 8 to 10.

use super::block::{BitmapVersion, DiskId, MAX_BITMAP_NAME, MAX_DISK_NAME};
use super::control::{decode_blame, reason};
use super::frame::{self, OPTIONAL, Record};
use super::hello::{self, MAX_REFUSAL_TEXT};
use super::journal::{UNPROVED, decode_root};
use super::units::{UnitNodes, ZeroUnits};
use crate::content_hash::{BitmapDigest, ContentHash, Node};
use crate::{Blame, Malformed, Problem, Reader, Writer};

/// All before a barrier is applied.
pub const ACK: u16 = 1;
/// Units that are there.
pub const HAVE: u16 = 2;
/// Units that are there and zero.
pub const HAVE_ZEROES: u16 = 3;
/// No more units of a disk are there.
pub const HAVE_DONE: u16 = 4;
/// All is durable and proved.
pub const READY: u16 = 5;
/// All is published.
pub const COMMITTED: u16 = 6;
/// The destination gives up.
pub const FAILED: u16 = 7;
/// What is there of a bitmap.
pub const HAVE_BITMAP: u16 = 9;
/// What was published of a disk.
pub const PUBLISHED: u16 = 10;
/// The destination is still there.
pub const KEEPALIVE: u16 = OPTIONAL | 8;
/// The stream offset of a failure that has none.
pub const UNKNOWN_OFFSET: u64 = u64::MAX;
/// Flag of [`Published`]: nobody has written to it since.
pub const UNCHANGED: u32 = 0x1;
/// Flag of [`Published`] and of a receipt: bitmaps went alone, to content that was there.
pub const BITMAPS_ALONE: u32 = 0x2;

/// What the destination read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// As offered.
    pub session: [u8; 16],
    /// Root of each disk.
    pub disks: Vec<(DiskId, ContentHash)>,
    /// Digest of each bitmap.
    pub bitmaps: Vec<(BitmapVersion, BitmapDigest)>,
}

/// What the receipt of a finished session says of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The disk's name on the wire, 1 to [`MAX_DISK_NAME`] bytes.
    pub name: String,
    /// Guest-visible bytes.
    pub size: u64,
    /// Root of its content; `None` where it was not proved, or not sent.
    pub content: Option<ContentHash>,
    /// Whether nobody has written to it since, as far as its files tell.
    pub is_unchanged: bool,
    /// Whether its bitmaps were sent and its content was not.
    pub is_bitmaps_alone: bool,
    /// Its bitmaps.
    pub bitmaps: Vec<PublishedBitmap>,
}

/// What the receipt of a finished session says of one bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedBitmap {
    /// By which it is stored, 1 to [`MAX_BITMAP_NAME`] bytes.
    pub name: String,
    /// By which the source may have sent it, as the destination's user renames bitmaps; else the
    /// same.
    pub sent_as: String,
    /// What it hashes to, its shape included.
    pub digest: BitmapDigest,
}

/// Any answer. Nodes are borrowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<'a> {
    /// All before this barrier is applied.
    Ack(u64),
    /// Units that are there.
    Have(DiskId, UnitNodes<'a>),
    /// Units that are there and zero.
    HaveZeroes(DiskId, ZeroUnits),
    /// No more units of this disk are there.
    HaveDone(DiskId),
    /// All is durable and proved.
    Ready(Ready),
    /// All is published. With the session.
    Committed([u8; 16]),
    /// The destination gives up.
    Failed {
        /// Whose fault it is, as the destination sees it.
        blame: Blame,
        /// Where in the stream, if that is known.
        offset: Option<u64>,
        /// For the user. Longer than [`MAX_REFUSAL_TEXT`] is cut.
        text: String,
    },
    /// What is there of a bitmap: its leaves that are not zero and their nodes, in rising order.
    HaveBitmap(BitmapVersion, Vec<(u64, Node)>),
    /// What was published of one disk, before COMMITTED of a session that had been finished.
    Published(Published),
    /// The destination is still there.
    Keepalive,
}

impl<'a> Answer<'a> {
    /// Decodes a record; `None` for an unknown one that may be skipped.
    pub fn decode(record: &Record<'a>) -> Result<Option<Self>, Malformed> {
        if !matches!(record.header.kind, ACK..=FAILED | HAVE_BITMAP | PUBLISHED | KEEPALIVE) {
            return record.skip_unknown().map(|()| None);
        }
        let mut body = record.plain_body()?;
        let decoded = match record.header.kind {
            ACK => Self::Ack(body.be64("barrier number")?),
            HAVE => Self::Have(disk(&mut body)?, UnitNodes::decode(&mut body)?),
            HAVE_ZEROES => Self::HaveZeroes(disk(&mut body)?, ZeroUnits::decode(&mut body)?),
            HAVE_DONE => Self::HaveDone(disk(&mut body)?),
            READY => Self::Ready(Ready::decode(&mut body)?),
            COMMITTED => Self::Committed(*body.array("session")?),
            HAVE_BITMAP => Self::HaveBitmap(BitmapVersion::decode(&mut body)?, leaves(&mut body)?),
            PUBLISHED => Self::Published(Published::decode(&mut body)?),
            KEEPALIVE => Self::Keepalive,
            _ => {
                let blame = decode_blame(&mut body)?;
                let offset = Some(body.be64("stream offset")?).filter(|at| *at != UNKNOWN_OFFSET);
                Self::Failed { blame, offset, text: reason(&mut body)? }
            }
        };
        body.finish("record")?;
        Ok(Some(decoded))
    }

    /// Appends the whole record.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut body = Writer::new();
        let kind = match self {
            Self::Ack(number) => {
                body.be64(*number);
                ACK
            }
            Self::Have(disk, units) => {
                units.encode(body.be32(disk.0));
                HAVE
            }
            Self::HaveZeroes(disk, units) => {
                units.encode(body.be32(disk.0));
                HAVE_ZEROES
            }
            Self::HaveDone(disk) => {
                body.be32(disk.0);
                HAVE_DONE
            }
            Self::Ready(ready) => {
                ready.encode(&mut body);
                READY
            }
            Self::Committed(session) => {
                body.bytes(session);
                COMMITTED
            }
            Self::Failed { blame, offset, text } => {
                body.be16(hello::blame_code(*blame)).be64(offset.unwrap_or(UNKNOWN_OFFSET));
                body.text16(text, MAX_REFUSAL_TEXT);
                FAILED
            }
            Self::HaveBitmap(version, leaves) => {
                version.encode(&mut body);
                for (leaf, node) in leaves {
                    body.be64(*leaf).bytes(node);
                }
                HAVE_BITMAP
            }
            Self::Published(published) => {
                published.encode(&mut body);
                PUBLISHED
            }
            Self::Keepalive => KEEPALIVE,
        };
        frame::encode(kind, &[&body.into_bytes()], out);
    }
}

impl Ready {
    fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let session = *body.array("session")?;
        let at = body.offset();
        let count = body.be32("number of disks")?;
        let max = body.left().checked_div(36).unwrap_or_default() as u64;
        if u64::from(count) > max {
            let problem = Problem::OutOfRange { value: count.into(), min: 0, max };
            return Err(Malformed::new(at, "number of disks", problem));
        }
        let disks = (0..count)
            .map(|_| Ok((disk(body)?, ContentHash(*body.array("content hash")?))))
            .collect::<Result<_, Malformed>>()?;
        let mut bitmaps = Vec::new();
        while body.left() > 0 {
            let version = BitmapVersion::decode(body)?;
            bitmaps.push((version, BitmapDigest(*body.array("bitmap digest")?)));
        }
        Ok(Self { session, disks, bitmaps })
    }

    fn encode(&self, body: &mut Writer) {
        body.bytes(&self.session).be32(u32::try_from(self.disks.len()).unwrap_or(u32::MAX));
        for (disk, hash) in &self.disks {
            body.be32(disk.0).bytes(&hash.0);
        }
        for (version, digest) in &self.bitmaps {
            version.encode(body);
            body.bytes(&digest.0);
        }
    }
}

impl Published {
    fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let size = body.be64("size")?;
        let flags = body.flags32("disk flags", UNCHANGED | BITMAPS_ALONE)?;
        let is_unchanged = flags & UNCHANGED != 0;
        let is_bitmaps_alone = flags & BITMAPS_ALONE != 0;
        let content = decode_root(body)?;
        let name = body.name16(MAX_DISK_NAME, "disk name")?.to_owned();
        let mut bitmaps = Vec::new();
        while body.left() > 0 {
            let digest = BitmapDigest(*body.array("bitmap digest")?);
            let name = body.name16(MAX_BITMAP_NAME, "bitmap name")?.to_owned();
            let sent_as = body.name16(MAX_BITMAP_NAME, "name of the bitmap as sent")?.to_owned();
            bitmaps.push(PublishedBitmap { name, sent_as, digest });
        }
        Ok(Self { name, size, content, is_unchanged, is_bitmaps_alone, bitmaps })
    }

    fn encode(&self, body: &mut Writer) {
        let unchanged = if self.is_unchanged { UNCHANGED } else { 0 };
        body.be64(self.size).be32(unchanged | alone(self.is_bitmaps_alone));
        body.bytes(&self.content.unwrap_or(UNPROVED).0).text16(&self.name, MAX_DISK_NAME);
        for PublishedBitmap { name, sent_as, digest } in &self.bitmaps {
            body.bytes(&digest.0).text16(name, MAX_BITMAP_NAME).text16(sent_as, MAX_BITMAP_NAME);
        }
    }
}

/// The flag of what went without content.
pub(super) fn alone(is_bitmaps_alone: bool) -> u32 {
    if is_bitmaps_alone { BITMAPS_ALONE } else { 0 }
}

/// Leaves up to the end of the record.
fn leaves(body: &mut Reader<'_>) -> Result<Vec<(u64, Node)>, Malformed> {
    let mut leaves: Vec<(u64, Node)> = Vec::new();
    while body.left() > 0 {
        let at = body.offset();
        let leaf = body.be64("leaf of a bitmap")?;
        if leaves.last().is_some_and(|(before, _)| *before >= leaf) {
            return Err(Malformed::new(at, "leaf of a bitmap", Problem::Other("does not rise")));
        }
        leaves.push((leaf, *body.array("node of a leaf")?));
    }
    Ok(leaves)
}

fn disk(body: &mut Reader<'_>) -> Result<DiskId, Malformed> {
    body.be32("disk number").map(DiskId)
}
