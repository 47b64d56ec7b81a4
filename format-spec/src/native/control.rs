//! Records of the section `bitferry`, version 1: what drives the others. SPEC 8 and 9.

use super::frame::{self, OPTIONAL, Record};
use super::hello::{self, MAX_REFUSAL_TEXT};
use crate::{Blame, Malformed, Problem, Reader, Writer};

/// Name of the section.
pub const SECTION: &str = "bitferry";
/// Version of the section.
pub const SECTION_VERSION: u32 = 1;
/// Everything before it is applied before anything after it, on all connections.
pub const BARRIER: u16 = 1;
/// All was sent: make it durable and prove it.
pub const PREPARE: u16 = 2;
/// The source has let go: publish.
pub const COMMIT: u16 = 3;
/// The source gives up.
pub const ABORT: u16 = 4;
/// This side is still there.
pub const KEEPALIVE: u16 = OPTIONAL | 5;
/// Barrier flag: sync before the answer.
pub const DURABLE: u32 = 0x1;

/// Any record of the section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// The section's body ends here.
    End,
    /// A barrier, written on every connection.
    Barrier {
        /// Counts from 1.
        number: u64,
        /// Whether the destination syncs before it answers.
        is_durable: bool,
    },
    /// All was sent: make it durable and prove it. With the session.
    Prepare([u8; 16]),
    /// The source has let go: publish. With the session.
    Commit([u8; 16]),
    /// The source gives up.
    Abort {
        /// Whose fault it is, as the source sees it.
        blame: Blame,
        /// For the user. Longer than [`MAX_REFUSAL_TEXT`] is cut.
        text: String,
    },
    /// This side is still there.
    Keepalive,
}

impl Control {
    /// Decodes a record; `None` for an unknown one that may be skipped.
    pub fn decode(record: &Record<'_>) -> Result<Option<Self>, Malformed> {
        if record.header.is_end() {
            return Ok(Some(Self::End));
        }
        if !(BARRIER..=ABORT).contains(&record.header.kind) && record.header.kind != KEEPALIVE {
            return record.skip_unknown().map(|()| None);
        }
        let mut body = record.plain_body()?;
        let decoded = match record.header.kind {
            BARRIER => {
                let at = body.offset();
                let number = body.be64("barrier number")?;
                if number == 0 {
                    let problem = Problem::OutOfRange { value: 0, min: 1, max: u64::MAX };
                    return Err(Malformed::new(at, "barrier number", problem));
                }
                let flags = body.flags32("barrier flags", DURABLE)?;
                Self::Barrier { number, is_durable: flags & DURABLE != 0 }
            }
            PREPARE => Self::Prepare(*body.array("session")?),
            COMMIT => Self::Commit(*body.array("session")?),
            KEEPALIVE => Self::Keepalive,
            _ => {
                let (blame, text) = (decode_blame(&mut body)?, reason(&mut body)?);
                Self::Abort { blame, text }
            }
        };
        body.finish("record")?;
        Ok(Some(decoded))
    }

    /// Appends the whole record.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut body = Writer::new();
        let kind = match self {
            Self::End => return frame::encode_end(out),
            Self::Barrier { number, is_durable } => {
                body.be64(*number).be32(if *is_durable { DURABLE } else { 0 });
                BARRIER
            }
            Self::Prepare(session) => {
                body.bytes(session);
                PREPARE
            }
            Self::Commit(session) => {
                body.bytes(session);
                COMMIT
            }
            Self::Abort { blame, text } => {
                body.be16(hello::blame_code(*blame)).text16(text, MAX_REFUSAL_TEXT);
                ABORT
            }
            Self::Keepalive => KEEPALIVE,
        };
        frame::encode(kind, &[&body.into_bytes()], out);
    }
}

/// A blame as it is on the wire.
pub(super) fn decode_blame(body: &mut Reader<'_>) -> Result<Blame, Malformed> {
    let at = body.offset();
    let code = body.be16("blame")?;
    hello::blame_from(code).ok_or_else(|| {
        Malformed::new(at, "blame", Problem::OutOfRange { value: code.into(), min: 1, max: 7 })
    })
}

/// Words for the user.
pub(super) fn reason(body: &mut Reader<'_>) -> Result<String, Malformed> {
    body.text16(MAX_REFUSAL_TEXT, "reason")
}
