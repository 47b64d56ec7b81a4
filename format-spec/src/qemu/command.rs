//! Commands of the source to the destination. SPEC 4.3.

use super::container::COMMAND;
use crate::{Malformed, Problem, Reader, Writer};

/// The destination may answer on the same connection.
pub const OPEN_RETURN_PATH: u16 = 1;
/// Answer with PONG.
pub const PING: u16 = 2;
/// Postcopy may follow.
pub const POSTCOPY_ADVISE: u16 = 3;
/// Listen for page requests of the guest.
pub const POSTCOPY_LISTEN: u16 = 4;
/// Start the guest.
pub const POSTCOPY_RUN: u16 = 5;
/// Forget ranges of memory.
pub const POSTCOPY_RAM_DISCARD: u16 = 6;
/// Nested elements follow.
pub const PACKAGED: u16 = 7;
/// Not ours.
pub const ENABLE_COLO: u16 = 8;
/// Go on after a cut.
pub const POSTCOPY_RESUME: u16 = 9;
/// Say which pages of a block have arrived.
pub const RECV_BITMAP: u16 = 10;
/// The guest is about to be stopped. Since QEMU 10.0.
pub const SWITCHOVER_START: u16 = 11;
/// Bytes of one range in [`Command::PostcopyRamDiscard`].
const RANGE_BYTES: usize = 16;

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command<'a> {
    /// The destination may answer on the same connection.
    OpenReturnPath,
    /// Answer with PONG and this value.
    Ping(u32),
    /// Postcopy may follow: of memory with these page sizes (of all blocks or-ed; of the target),
    /// or of bitmaps alone.
    PostcopyAdvise(Option<(u64, u64)>),
    /// Listen for page requests of the guest.
    PostcopyListen,
    /// Start the guest.
    PostcopyRun,
    /// Forget ranges of a RAM block.
    PostcopyRamDiscard {
        /// The block.
        block: &'a str,
        /// Pairs of offset and length in bytes, big-endian, at least one.
        ranges: &'a [[u8; RANGE_BYTES]],
    },
    /// So many bytes of nested elements follow the command.
    Packaged(u32),
    /// Not ours.
    EnableColo,
    /// Go on after a cut.
    PostcopyResume,
    /// Say which pages of this RAM block have arrived.
    RecvBitmap(&'a str),
    /// The guest is about to be stopped.
    SwitchoverStart,
}

impl<'a> Command<'a> {
    /// Takes what follows the element type.
    pub(super) fn decode(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        let at = reader.offset();
        let number = reader.be16("command")?;
        let len = reader.be16("command length")?;
        let mut payload = reader.sub(len.into(), "command payload")?;
        let command = Self::decode_payload(number, &mut payload, at)
            .map_err(|error| error.inside(len.into()))?;
        payload.finish("command")?;
        Ok(command)
    }

    fn decode_payload(number: u16, payload: &mut Reader<'a>, at: u64) -> Result<Self, Malformed> {
        Ok(match number {
            OPEN_RETURN_PATH => Self::OpenReturnPath,
            PING => Self::Ping(payload.be32("PING value")?),
            POSTCOPY_ADVISE if payload.left() == 0 => Self::PostcopyAdvise(None),
            POSTCOPY_ADVISE => Self::PostcopyAdvise(Some((
                payload.be64("page sizes of all RAM blocks")?,
                payload.be64("page size of the target")?,
            ))),
            POSTCOPY_LISTEN => Self::PostcopyListen,
            POSTCOPY_RUN => Self::PostcopyRun,
            POSTCOPY_RAM_DISCARD => Self::decode_discard(payload)?,
            PACKAGED => Self::Packaged(payload.be32("PACKAGED size")?),
            ENABLE_COLO => Self::EnableColo,
            POSTCOPY_RESUME => Self::PostcopyResume,
            RECV_BITMAP => Self::RecvBitmap(payload.name8("RAM block name")?),
            SWITCHOVER_START => Self::SwitchoverStart,
            value => {
                let problem = Problem::Unknown { value: value.into() };
                return Err(Malformed::new(at, "command", problem));
            }
        })
    }

    fn decode_discard(payload: &mut Reader<'a>) -> Result<Self, Malformed> {
        expect_zero(payload, "RAM_DISCARD version")?;
        let block = payload.name8("RAM block name")?;
        expect_zero(payload, "RAM_DISCARD name end")?;
        let at = payload.offset();
        let (ranges, rest) = payload.take_rest().as_chunks();
        if ranges.is_empty() || !rest.is_empty() {
            let problem = Problem::Other("are not whole, or there is none");
            return Err(Malformed::new(at, "RAM_DISCARD ranges", problem));
        }
        Ok(Self::PostcopyRamDiscard { block, ranges })
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        match self {
            Self::OpenReturnPath => OPEN_RETURN_PATH,
            Self::Ping(_) => PING,
            Self::PostcopyAdvise(_) => POSTCOPY_ADVISE,
            Self::PostcopyListen => POSTCOPY_LISTEN,
            Self::PostcopyRun => POSTCOPY_RUN,
            Self::PostcopyRamDiscard { .. } => POSTCOPY_RAM_DISCARD,
            Self::Packaged(_) => PACKAGED,
            Self::EnableColo => ENABLE_COLO,
            Self::PostcopyResume => POSTCOPY_RESUME,
            Self::RecvBitmap(_) => RECV_BITMAP,
            Self::SwitchoverStart => SWITCHOVER_START,
        }
    }

    /// Writes the element, type included.
    pub fn encode(&self, out: &mut Writer) {
        let mut payload = Writer::new();
        match self {
            Self::Ping(value) | Self::Packaged(value) => {
                payload.be32(*value);
            }
            Self::PostcopyAdvise(Some((blocks, target))) => {
                payload.be64(*blocks).be64(*target);
            }
            Self::PostcopyRamDiscard { block, ranges } => {
                payload.u8(0).text8(block).u8(0).bytes(ranges.as_flattened());
            }
            Self::RecvBitmap(block) => {
                payload.text8(block);
            }
            _ => {}
        }
        out.u8(COMMAND).be16(self.number());
        out.be16(u16::try_from(payload.len()).unwrap_or(u16::MAX)).bytes(&payload.into_bytes());
    }
}

fn expect_zero(reader: &mut Reader<'_>, field: &'static str) -> Result<(), Malformed> {
    let at = reader.offset();
    match reader.u8(field)? {
        0 => Ok(()),
        value => {
            let problem = Problem::Mismatch { value: value.into(), expected: 0 };
            Err(Malformed::new(at, field, problem))
        }
    }
}
