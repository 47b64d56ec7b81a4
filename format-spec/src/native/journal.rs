//! Journals of unfinished destinations and receipts of finished ones. SPEC 10.

use super::answer::{BITMAPS_ALONE, alone};
use super::block::{
    BITMAP_CREATE, BITMAP_REMOVE, BITMAP_UPDATE, BlockRecord, Content, ENABLED, MAX_BITMAP_NAME,
    PERSISTENT, RUN,
};
use super::frame::{self, Record};
use super::units::{UnitNodes, ZeroUnits};
use crate::content_hash::{BitmapDigest, ContentHash};
use crate::{Malformed, Problem, Reader, Writer};

/// First four bytes of a journal.
pub const JOURNAL_MAGIC: &[u8; 4] = b"BFJL";
/// First four bytes of a receipt.
pub const RECEIPT_MAGIC: &[u8; 4] = b"BFRC";
/// Version of both.
pub const VERSION: u32 = 1;
/// Type of [`JournalRecord::Session`].
pub const SESSION: u16 = 0x101;
/// Type of [`JournalRecord::Units`].
pub const UNITS: u16 = 0x102;
/// Type of [`JournalRecord::Zeroes`].
pub const ZEROES: u16 = 0x103;
/// Type of [`JournalRecord::Image`].
pub const IMAGE: u16 = 0x104;
/// Type of [`JournalRecord::Prepared`].
pub const PREPARED: u16 = 0x105;
/// Type of [`JournalRecord::Receipt`].
pub const RECEIPT: u16 = 0x106;
/// Type of [`JournalRecord::ReceiptBitmap`].
pub const RECEIPT_BITMAP: u16 = 0x107;
/// Type of [`JournalRecord::Commit`].
pub const COMMIT: u16 = 0x108;
/// Bytes of a disk below one node of a journal.
pub const UNIT_BYTES: u64 = 1 << 20;
/// Longest description of a destination, in bytes.
pub const MAX_TARGET: usize = 1024;
/// In place of a root where nothing was hashed: what no content has.
pub const UNPROVED: ContentHash = ContentHash([0xff; 32]);

/// Any record of a journal or a receipt. Borrows from the record's body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JournalRecord<'a> {
    /// What the journal is of.
    Session {
        /// The session.
        session: [u8; 16],
        /// Size of the disk in bytes.
        size: u64,
        /// Format and options of the destination. Longer than [`MAX_TARGET`] is cut.
        target: String,
    },
    /// Units that are durable.
    Units(UnitNodes<'a>),
    /// Units that are durable and zero.
    Zeroes(ZeroUnits),
    /// What the image's writer needs to reopen it unfinished.
    Image(&'a [u8]),
    /// The disk is complete, and READY was or will be sent.
    Prepared {
        /// Its root or [`UNPROVED`]; all bytes zero: no longer.
        root: ContentHash,
        /// What its files were like when they were proved, and those that it stands on.
        stamps: Vec<[u8; 16]>,
    },
    /// The source has let go of this session: publication has begun and must be finished.
    Commit([u8; 16]),
    /// A bitmap's life and pieces, as they were received.
    Bitmap(BlockRecord<'a>),
    /// The disk was published.
    Receipt {
        /// The session.
        session: [u8; 16],
        /// Size of the disk in bytes.
        size: u64,
        /// Whether its bitmaps were sent and its content was not.
        is_bitmaps_alone: bool,
        /// Its root when it was published; `None` where it was not proved.
        hash: Option<ContentHash>,
        /// What its files were like then, in the destination's own way: equal where nobody has
        /// written to them since.
        stamp: [u8; 16],
        /// Format and options of the destination, as in [`Session`](Self::Session).
        target: String,
    },
    /// A bitmap that was published with the disk.
    ReceiptBitmap {
        /// Guest bytes per bit.
        granularity: u32,
        /// Whether it was enabled.
        is_enabled: bool,
        /// Whether it is kept with the disk.
        is_persistent: bool,
        /// Its digest when it was published.
        digest: BitmapDigest,
        /// Its name.
        name: &'a str,
    },
}

/// Takes magic and version from the start of a file.
pub fn decode_start(reader: &mut Reader<'_>, magic: &[u8; 4]) -> Result<(), Malformed> {
    let number = |bytes: &[u8; 4]| u64::from(u32::from_be_bytes(*bytes));
    for (field, expected) in [("magic", *magic), ("version", VERSION.to_be_bytes())] {
        let at = reader.offset();
        let found = reader.array(field)?;
        if *found != expected {
            let problem = Problem::Mismatch { value: number(found), expected: number(&expected) };
            return Err(Malformed::new(at, field, problem));
        }
    }
    Ok(())
}

/// Appends magic and version.
pub fn encode_start(magic: &[u8; 4], out: &mut Vec<u8>) {
    out.extend_from_slice(magic);
    out.extend_from_slice(&VERSION.to_be_bytes());
}

impl<'a> JournalRecord<'a> {
    /// Decodes a record; `None` for an unknown one that may be skipped.
    pub fn decode(record: &Record<'a>) -> Result<Option<Self>, Malformed> {
        if matches!(record.header.kind, RUN | BITMAP_CREATE | BITMAP_UPDATE | BITMAP_REMOVE) {
            return bitmap(record);
        }
        if !(SESSION..=COMMIT).contains(&record.header.kind) {
            return record.skip_unknown().map(|()| None);
        }
        let mut body = record.plain_body()?;
        let decoded = match record.header.kind {
            SESSION => {
                let (session, size) = (*body.array("session")?, body.be64("disk size")?);
                Self::Session { session, size, target: body.text16(MAX_TARGET, "target")? }
            }
            UNITS => Self::Units(UnitNodes::decode(&mut body)?),
            ZEROES => Self::Zeroes(ZeroUnits::decode(&mut body)?),
            IMAGE => Self::Image(body.take_rest()),
            PREPARED => {
                let (root, mut stamps) = (ContentHash(*body.array("content hash")?), Vec::new());
                while body.left() > 0 {
                    stamps.push(*body.array("stamp")?);
                }
                Self::Prepared { root, stamps }
            }
            COMMIT => Self::Commit(*body.array("session")?),
            RECEIPT => {
                let (session, size) = (*body.array("session")?, body.be64("disk size")?);
                let is_bitmaps_alone = body.flags32("disk flags", BITMAPS_ALONE)? != 0;
                let (hash, stamp) = (decode_root(&mut body)?, *body.array("stamp")?);
                let target = body.text16(MAX_TARGET, "target")?;
                Self::Receipt { session, size, is_bitmaps_alone, hash, stamp, target }
            }
            _ => {
                let granularity = body.be32("bitmap granularity")?;
                let flags = body.flags32("bitmap flags", ENABLED | PERSISTENT)?;
                Self::ReceiptBitmap {
                    granularity,
                    is_enabled: flags & ENABLED != 0,
                    is_persistent: flags & PERSISTENT != 0,
                    digest: BitmapDigest(*body.array("bitmap digest")?),
                    name: body.name16(MAX_BITMAP_NAME, "bitmap name")?,
                }
            }
        };
        body.finish("record")?;
        Ok(Some(decoded))
    }

    /// Appends the whole record.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut body = Writer::new();
        let kind = match self {
            Self::Bitmap(record) => return record.encode(out),
            Self::Session { session, size, target } => {
                body.bytes(session).be64(*size).text16(target, MAX_TARGET);
                SESSION
            }
            Self::Units(units) => {
                units.encode(&mut body);
                UNITS
            }
            Self::Zeroes(units) => {
                units.encode(&mut body);
                ZEROES
            }
            Self::Image(bytes) => {
                body.bytes(bytes);
                IMAGE
            }
            Self::Prepared { root, stamps } => {
                body.bytes(&root.0).bytes(stamps.as_flattened());
                PREPARED
            }
            Self::Commit(session) => {
                body.bytes(session);
                COMMIT
            }
            Self::Receipt { session, size, is_bitmaps_alone, hash, stamp, target } => {
                body.bytes(session).be64(*size).be32(alone(*is_bitmaps_alone));
                body.bytes(&hash.unwrap_or(UNPROVED).0).bytes(stamp).text16(target, MAX_TARGET);
                RECEIPT
            }
            Self::ReceiptBitmap { granularity, is_enabled, is_persistent, digest, name } => {
                body.be32(*granularity).be32(super::block::flag_bits(*is_enabled, *is_persistent));
                body.bytes(&digest.0).text16(name, MAX_BITMAP_NAME);
                RECEIPT_BITMAP
            }
        };
        frame::encode(kind, &[&body.into_bytes()], out);
    }
}

/// A root, if it is one.
pub(super) fn decode_root(body: &mut Reader<'_>) -> Result<Option<ContentHash>, Malformed> {
    let root = ContentHash(*body.array("content hash")?);
    Ok(Some(root).filter(|root| *root != UNPROVED))
}

/// A record of chapter 6 that may stand in a journal.
fn bitmap<'a>(record: &Record<'a>) -> Result<Option<JournalRecord<'a>>, Malformed> {
    let decoded = BlockRecord::decode(record)?;
    match &decoded {
        Some(BlockRecord::Run(run)) if run.content != Content::None => {
            let problem = Problem::Other("carries content, which has no place in a journal");
            Err(Malformed::new(record.offset, "run", problem))
        }
        _ => Ok(decoded.map(JournalRecord::Bitmap)),
    }
}
