//! The return path: what a destination answers on the main connection. SPEC 4.4.

use super::{Step, attempt};
use crate::{Malformed, Problem, Reader, Writer};

/// The destination is done; 0 is success.
pub const SHUT: u16 = 1;
/// Answer to a PING.
pub const PONG: u16 = 2;
/// Pages are wanted, of a named block.
pub const REQ_PAGES_ID: u16 = 3;
/// Pages are wanted, of the block before.
pub const REQ_PAGES: u16 = 4;
/// Which pages of a block have arrived.
pub const RECV_BITMAP: u16 = 5;
/// Go on after a cut.
pub const RESUME_ACK: u16 = 6;
/// The guest may be stopped. Since QEMU 8.1.
pub const SWITCHOVER_ACK: u16 = 7;
/// Longest message.
pub const MAX_MESSAGE: u16 = 512;
/// Value of [`Reply::ResumeAck`].
pub const RESUME_VALUE: u32 = 1;
/// What ends the bits of a [`Reply::RecvBitmap`].
pub const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;
/// Largest bitmap of received pages: that of a RAM block of 16 TiB.
pub const MAX_BITMAP: u64 = 1 << 29;
/// Most bits that come as one item, in bytes.
const BITMAP_PART: u64 = 64 << 10;

/// An answer, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply<'a> {
    /// The destination is done; 0 is success.
    Shut(u32),
    /// Answer to a PING with this value.
    Pong(u32),
    /// Pages are wanted.
    ReqPages {
        /// The block; `None`: the one of the request before.
        block: Option<&'a str>,
        /// Byte offset in the block.
        offset: u64,
        /// Length in bytes.
        len: u32,
    },
    /// Which pages of a block have arrived: so many bytes of [`Reply::Bits`] follow.
    RecvBitmap {
        /// The block.
        block: &'a str,
        /// Bytes of bits.
        len: u64,
    },
    /// Bits of pages, page `n` in byte `n / 8`, least significant first; set: arrived.
    Bits(&'a [u8]),
    /// The bits were whole.
    BitsEnd,
    /// Go on after a cut.
    ResumeAck,
    /// The guest may be stopped.
    SwitchoverAck,
}

/// Takes the return path apart.
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    offset: u64,
    /// Bytes of bits that are still to come, while there are any or their end mark is.
    bits_left: Option<u64>,
    has_block: bool,
}

impl Decoder {
    /// Bytes taken so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether the return path may end here: between messages.
    pub fn may_end(&self) -> bool {
        self.bits_left.is_none()
    }

    /// Takes the next item from what has arrived.
    pub fn next<'a>(&mut self, input: &'a [u8]) -> Result<Step<Reply<'a>>, Malformed> {
        let step = match self.bits_left {
            Some(left) => attempt(input, self.offset, |reader| decode_bits(reader, left))?,
            None => attempt(input, self.offset, decode_message)?,
        };
        if let Step::Item(reply, len) = &step {
            self.check(reply)?;
            self.bits_left = match (reply, self.bits_left) {
                (Reply::RecvBitmap { len, .. }, _) => Some(*len),
                (Reply::Bits(bits), Some(left)) => Some(left.saturating_sub(bits.len() as u64)),
                _ => None,
            };
            self.offset = self.offset.saturating_add(*len as u64);
        }
        Ok(step)
    }

    fn check(&mut self, reply: &Reply<'_>) -> Result<(), Malformed> {
        match reply {
            Reply::ReqPages { block: None, .. } if !self.has_block => {
                let problem = Problem::Other("is left out where none came before");
                Err(Malformed::new(self.offset, "RAM block name", problem))
            }
            Reply::ReqPages { .. } => {
                self.has_block = true;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl<'a> Reply<'a> {
    /// Writes the answer or the part of one.
    pub fn encode(&self, out: &mut Writer) {
        let mut payload = Writer::new();
        let kind = match self {
            Self::Bits(bits) => {
                out.bytes(bits);
                return;
            }
            Self::BitsEnd => {
                out.be64(BITMAP_END);
                return;
            }
            Self::Shut(status) => {
                payload.be32(*status);
                SHUT
            }
            Self::Pong(value) => {
                payload.be32(*value);
                PONG
            }
            Self::ReqPages { block, offset, len } => {
                payload.be64(*offset).be32(*len);
                block.map_or(REQ_PAGES, |block| {
                    payload.text8(block);
                    REQ_PAGES_ID
                })
            }
            Self::RecvBitmap { block, .. } => {
                payload.text8(block);
                RECV_BITMAP
            }
            Self::ResumeAck => {
                payload.be32(RESUME_VALUE);
                RESUME_ACK
            }
            Self::SwitchoverAck => SWITCHOVER_ACK,
        };
        out.be16(kind).be16(u16::try_from(payload.len()).unwrap_or(u16::MAX));
        out.bytes(&payload.into_bytes());
        if let Self::RecvBitmap { len, .. } = self {
            out.be64(*len);
        }
    }

    fn decode_payload(kind: u16, payload: &mut Reader<'a>, at: u64) -> Result<Self, Malformed> {
        Ok(match kind {
            SHUT => Self::Shut(payload.be32("SHUT status")?),
            PONG => Self::Pong(payload.be32("PONG value")?),
            REQ_PAGES | REQ_PAGES_ID => {
                let offset = payload.be64("offset of requested pages")?;
                let len = payload.be32("length of requested pages")?;
                let named = kind == REQ_PAGES_ID;
                let block = named.then(|| payload.name8("RAM block name")).transpose()?;
                Self::ReqPages { block, offset, len }
            }
            RECV_BITMAP => Self::RecvBitmap { block: payload.name8("RAM block name")?, len: 0 },
            RESUME_ACK => {
                let at = payload.offset();
                let value = payload.be32("RESUME_ACK value")?;
                if value != RESUME_VALUE {
                    let (value, expected) = (value.into(), RESUME_VALUE.into());
                    let problem = Problem::Mismatch { value, expected };
                    return Err(Malformed::new(at, "RESUME_ACK value", problem));
                }
                Self::ResumeAck
            }
            SWITCHOVER_ACK => Self::SwitchoverAck,
            value => {
                let problem = Problem::Unknown { value: value.into() };
                return Err(Malformed::new(at, "return path message", problem));
            }
        })
    }
}

fn decode_message<'a>(reader: &mut Reader<'a>) -> Result<Reply<'a>, Malformed> {
    let at = reader.offset();
    let kind = reader.be16("return path message")?;
    let len_at = reader.offset();
    let len = reader.be16("length of a return path message")?;
    if len > MAX_MESSAGE {
        let (value, max) = (len.into(), MAX_MESSAGE.into());
        let problem = Problem::OutOfRange { value, min: 0, max };
        return Err(Malformed::new(len_at, "length of a return path message", problem));
    }
    let mut payload = reader.sub(len.into(), "return path message")?;
    let reply =
        Reply::decode_payload(kind, &mut payload, at).map_err(|error| error.inside(len.into()))?;
    payload.finish("return path message")?;
    let Reply::RecvBitmap { block, .. } = reply else { return Ok(reply) };
    let len_at = reader.offset();
    let len = reader.be64("size of a bitmap of received pages")?;
    if len > MAX_BITMAP || !len.is_multiple_of(8) {
        let problem = Problem::OutOfRange { value: len, min: 0, max: MAX_BITMAP };
        return Err(Malformed::new(len_at, "size of a bitmap of received pages", problem));
    }
    Ok(Reply::RecvBitmap { block, len })
}

fn decode_bits<'a>(reader: &mut Reader<'a>, left: u64) -> Result<Reply<'a>, Malformed> {
    if left > 0 {
        let have = (reader.left() as u64).max(1);
        let len = usize::try_from(left.min(have).min(BITMAP_PART)).unwrap_or(usize::MAX);
        return reader.take(len, "bitmap of received pages").map(Reply::Bits);
    }
    let at = reader.offset();
    let mark = reader.be64("end of a bitmap of received pages")?;
    if mark != BITMAP_END {
        let problem = Problem::Mismatch { value: mark, expected: BITMAP_END };
        return Err(Malformed::new(at, "end of a bitmap of received pages", problem));
    }
    Ok(Reply::BitsEnd)
}
