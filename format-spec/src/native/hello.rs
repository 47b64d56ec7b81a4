//! The first bytes of a native connection. SPEC 4.1.

use super::frame::{self, HEADER_BYTES, Header, Record};
use crate::{Blame, Malformed, Problem, Reader, Writer};

/// First four bytes of every native connection.
pub const MAGIC: &[u8; 4] = b"BFRY";
/// The one version.
pub const VERSION: u32 = 1;
/// Largest body of a hello.
pub const MAX_HELLO: usize = 4096;
/// Record type of [`Offer`].
pub const OFFER: u16 = 1;
/// Record type of [`Choice`].
pub const CHOICE: u16 = 2;
/// Record type of [`Refusal`].
pub const REFUSAL: u16 = 3;
/// Record type of [`Join`].
pub const JOIN: u16 = 4;
/// Offer flag: no answer is read.
pub const ONE_WAY: u32 = 0x1;
/// Feature: more than one connection.
pub const MULTI_CHANNEL: u64 = 0x1;
/// Feature: records compressed with zstd.
pub const ZSTD: u64 = 0x2;
/// Feature: records compressed with zlib.
pub const ZLIB: u64 = 0x4;
/// Feature: an interrupted transfer goes on (SPEC 10).
pub const RESUME: u64 = 0x8;
/// Most connections of one session.
pub const MAX_CHANNELS: u16 = 255;
/// Longest text of a refusal, in bytes.
pub const MAX_REFUSAL_TEXT: usize = 1024;
/// Bytes from the start of a hello to its body: magic, version, record header.
pub const PREFIX_BYTES: usize = 8 + HEADER_BYTES;

/// What the source wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Equal in every attempt of the same command.
    pub session: [u8; 16],
    /// Whether no answer will be read.
    pub is_one_way: bool,
    /// Features offered, known bits or not.
    pub features: u64,
    /// Features without which it makes no sense; among `features`.
    pub required: u64,
    /// Connections wanted, 1 to [`MAX_CHANNELS`].
    pub channels: u16,
    /// The program's name and version, at most 255 bytes.
    pub program: String,
}

/// What the destination knows of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// Nothing.
    Fresh,
    /// A journal: part of it arrived.
    Resumable,
    /// Everything arrived and was proved; COMMIT is waited for.
    Ready,
    /// It was committed; the receipt says so.
    Committed,
}

impl SessionState {
    const ALL: [Self; 4] = [Self::Fresh, Self::Resumable, Self::Ready, Self::Committed];
}

/// What the destination grants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// As offered.
    pub session: [u8; 16],
    /// Repeated by each [`Join`].
    pub ticket: [u8; 16],
    /// What the destination knows of the session.
    pub state: SessionState,
    /// Features chosen.
    pub features: u64,
    /// Connections granted.
    pub channels: u16,
    /// The program's name and version, at most 255 bytes.
    pub program: String,
}

/// Why the destination refuses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Whose fault it is, as the destination sees it.
    pub blame: Blame,
    /// For the user. Longer than [`MAX_REFUSAL_TEXT`] is cut.
    pub text: String,
}

/// A further connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Join {
    /// As offered.
    pub session: [u8; 16],
    /// As chosen.
    pub ticket: [u8; 16],
    /// Which connection this is, from 1.
    pub channel: u16,
}

/// Any hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hello {
    /// From the source, on the first connection.
    Offer(Offer),
    /// The answer.
    Choice(Choice),
    /// The other answer.
    Refusal(Refusal),
    /// From the source, on further connections.
    Join(Join),
}

/// Checks the first [`PREFIX_BYTES`] of a connection; the header says how much is still to be read
/// before [`Hello::decode`].
pub fn decode_prefix(bytes: &[u8; PREFIX_BYTES]) -> Result<Header, Malformed> {
    let mut reader = Reader::new(bytes, 0);
    let magic: &[u8; 4] = reader.array("hello magic")?;
    if magic != MAGIC {
        let problem = Problem::Mismatch {
            value: u32::from_be_bytes(*magic).into(),
            expected: u32::from_be_bytes(*MAGIC).into(),
        };
        return Err(Malformed::new(0, "hello magic", problem));
    }
    let version = reader.be32("hello version")?;
    if version != VERSION {
        let problem = Problem::Mismatch { value: version.into(), expected: VERSION.into() };
        return Err(Malformed::new(4, "hello version", problem));
    }
    let header = Header::decode(reader.array("hello header")?, 8)?;
    if header.body_len > MAX_HELLO {
        let problem =
            Problem::OutOfRange { value: header.body_len as u64, min: 0, max: MAX_HELLO as u64 };
        return Err(Malformed::new(8, "hello length", problem));
    }
    Ok(header)
}

impl Hello {
    /// Decodes the body that follows a prefix: [`Header::rest_len`] bytes.
    pub fn decode(header: Header, rest: &[u8]) -> Result<Self, Malformed> {
        Self::of_record(&Record::from_parts(header, rest, PREFIX_BYTES as u64)?)
    }

    /// Decodes the record that a hello is behind its magic and version.
    pub fn of_record(record: &Record<'_>) -> Result<Self, Malformed> {
        let mut body = record.plain_body()?;
        match record.header.kind {
            OFFER => Offer::decode(&mut body).map(Self::Offer),
            CHOICE => Choice::decode(&mut body).map(Self::Choice),
            REFUSAL => Refusal::decode(&mut body).map(Self::Refusal),
            JOIN => Join::decode(&mut body).map(Self::Join),
            kind => {
                let problem = Problem::Unknown { value: kind.into() };
                Err(Malformed::new(12, "hello type", problem))
            }
        }
    }

    /// All bytes of the hello.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::new();
        let kind = match self {
            Self::Offer(offer) => offer.encode(&mut body),
            Self::Choice(choice) => choice.encode(&mut body),
            Self::Refusal(refusal) => refusal.encode(&mut body),
            Self::Join(join) => join.encode(&mut body),
        };
        let mut out = Writer::new();
        out.bytes(MAGIC).be32(VERSION);
        let mut out = out.into_bytes();
        frame::encode(kind, &[&body.into_bytes()], &mut out);
        out
    }
}

impl Offer {
    fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let session = *body.array("session")?;
        let flags = body.flags32("offer flags", ONE_WAY)?;
        let features = body.be64("features offered")?;
        let required_at = body.offset();
        let required = body.be64("features required")?;
        if required & !features != 0 {
            let problem = Problem::Other("are not all offered");
            return Err(Malformed::new(required_at, "features required", problem));
        }
        let channels = channels(body, "connections wanted", 1)?;
        let program = body.text8("program")?;
        Ok(Self {
            session,
            is_one_way: flags & ONE_WAY != 0,
            features,
            required,
            channels,
            program,
        })
    }

    fn encode(&self, body: &mut Writer) -> u16 {
        body.bytes(&self.session).be32(if self.is_one_way { ONE_WAY } else { 0 });
        body.be64(self.features).be64(self.required).be16(self.channels).text8(&self.program);
        OFFER
    }

    /// Checks an answer against what was offered.
    pub fn accepts(&self, choice: &Choice) -> Result<(), Malformed> {
        let bad = |at: u64, field, problem| Err(Malformed::new(at, field, problem));
        let at = PREFIX_BYTES as u64;
        if choice.session != self.session {
            return bad(at, "session", Problem::Other("is not the one offered"));
        }
        if choice.features & !self.features != 0 || self.required & !choice.features != 0 {
            let problem = Problem::Mismatch { value: choice.features, expected: self.features };
            return bad(at.saturating_add(34), "features chosen", problem);
        }
        // One connection has one compression stream.
        if choice.features & ZSTD != 0 && choice.features & ZLIB != 0 {
            let problem = Problem::Other("has both zstd and zlib");
            return bad(at.saturating_add(34), "features chosen", problem);
        }
        let max = if choice.features & MULTI_CHANNEL == 0 { 1 } else { self.channels };
        if choice.channels > max {
            let value = choice.channels.into();
            let problem = Problem::OutOfRange { value, min: 1, max: max.into() };
            return bad(at.saturating_add(42), "connections granted", problem);
        }
        Ok(())
    }
}

impl Choice {
    fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let session = *body.array("session")?;
        let ticket = *body.array("ticket")?;
        let state_at = body.offset();
        let number = body.be16("session state")?;
        let Some(state) = SessionState::ALL.get(usize::from(number)).copied() else {
            let problem = Problem::OutOfRange { value: number.into(), min: 0, max: 3 };
            return Err(Malformed::new(state_at, "session state", problem));
        };
        let features = body.be64("features chosen")?;
        let channels = channels(body, "connections granted", 1)?;
        let program = body.text8("program")?;
        Ok(Self { session, ticket, state, features, channels, program })
    }

    fn encode(&self, body: &mut Writer) -> u16 {
        let state = match self.state {
            SessionState::Fresh => 0,
            SessionState::Resumable => 1,
            SessionState::Ready => 2,
            SessionState::Committed => 3,
        };
        body.bytes(&self.session).bytes(&self.ticket).be16(state);
        body.be64(self.features).be16(self.channels).text8(&self.program);
        CHOICE
    }
}

impl Refusal {
    fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let at = body.offset();
        let code = body.be16("blame")?;
        let Some(blame) = blame_from(code) else {
            let problem = Problem::OutOfRange { value: code.into(), min: 1, max: 7 };
            return Err(Malformed::new(at, "blame", problem));
        };
        let text = body.text16(MAX_REFUSAL_TEXT, "refusal text")?;
        Ok(Self { blame, text })
    }

    fn encode(&self, body: &mut Writer) -> u16 {
        body.be16(blame_code(self.blame)).text16(&self.text, MAX_REFUSAL_TEXT);
        REFUSAL
    }
}

impl Join {
    fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let session = *body.array("session")?;
        let ticket = *body.array("ticket")?;
        let channel = channels(body, "channel", 1)?;
        Ok(Self { session, ticket, channel })
    }

    fn encode(&self, body: &mut Writer) -> u16 {
        body.bytes(&self.session).bytes(&self.ticket).be16(self.channel);
        JOIN
    }
}

fn channels(body: &mut Reader<'_>, field: &'static str, min: u16) -> Result<u16, Malformed> {
    let at = body.offset();
    let value = body.be16(field)?;
    if (min..=MAX_CHANNELS).contains(&value) {
        return Ok(value);
    }
    let (value, min, max) = (value.into(), min.into(), MAX_CHANNELS.into());
    Err(Malformed::new(at, field, Problem::OutOfRange { value, min, max }))
}

/// The number that stands for a blame on the wire.
pub fn blame_code(blame: Blame) -> u16 {
    match blame {
        Blame::Caller => 1,
        Blame::Bytes => 2,
        Blame::PeerBehaviour => 3,
        Blame::PeerFeatures => 4,
        Blame::Device => 5,
        Blame::Transport => 6,
        Blame::WouldLose => 7,
        Blame::Mismatch => 8,
    }
}

/// The blame that a number on the wire stands for.
pub fn blame_from(code: u16) -> Option<Blame> {
    Some(match code {
        1 => Blame::Caller,
        2 => Blame::Bytes,
        3 => Blame::PeerBehaviour,
        4 => Blame::PeerFeatures,
        5 => Blame::Device,
        6 => Blame::Transport,
        7 => Blame::WouldLose,
        8 => Blame::Mismatch,
        _ => return None,
    })
}
