//! The first bytes of the first connection say which dialect it speaks (SPEC 4.1), and whether it
//! is a migration at all: a whole offer, or the first section of a QEMU.

use std::io::{Cursor, Read as _};
use std::time::Instant;

use format_spec::native::hello::{self, Hello, PREFIX_BYTES};
use format_spec::qemu::container::{self, Element};
use format_spec::qemu::stream::{Decoder, Item};
use format_spec::qemu::{Step, multifd};
use format_spec::{Malformed, Problem};
use mig_core::heart::Heart;
use mig_core::limits::HELLO_LIMIT;
use mig_core::stream::Error as Stream;
use mig_core::transport::{Connection, HangUp};

use super::arrivals::LOOK_INTERVAL;
use crate::Observer;
use crate::incoming::is_worth_an_answer;

/// What a source speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// bitferry's own.
    Native,
    /// QEMU's.
    Qemu,
}

impl std::fmt::Display for Dialect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Qemu => "qemu",
        })
    }
}

/// How the reason ends where somebody speaks that is no source at all.
pub const NO_MIGRATION: &str = "as no migration does";

/// Bytes of a magic.
const MAGIC_BYTES: usize = 4;
/// Bytes of magic and version, the same in both dialects.
const START_BYTES: usize = 8;
/// First bytes that are looked at: a QEMU that opens with more is let in by what these say.
const MAX_OPENING: usize = PREFIX_BYTES + hello::MAX_HELLO;

/// What a connection's first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// Not enough: so many are needed at least.
    Needs(usize),
    /// A migration begins.
    Is(Dialect),
}

/// Whether a source's first bytes are enough to tell what it is, be it no migration at all: what a
/// listener waits for before it hands a connection out
/// ([`Options::introduced`](crate::connect::Options::introduced)). Pure.
pub fn is_introduced(said: &[u8]) -> bool {
    !matches!(look(said), Ok(Look::Needs(_)))
}

/// What the first bytes of a connection are. Pure.
fn look(said: &[u8]) -> Result<Look, Stream> {
    let Some(magic) = said.first_chunk::<MAGIC_BYTES>() else {
        return Ok(Look::Needs(MAGIC_BYTES));
    };
    let malformed = |source| Stream::Malformed { channel: 0, source };
    if magic == hello::MAGIC {
        return match native(said).map_err(malformed)? {
            Ok(look) => Ok(look),
            Err(Hello::Join(_)) => Err(Stream::Stray),
            Err(_) => Err(Stream::protocol(0, 0, "a migration opens with an offer")),
        };
    }
    if magic == container::MAGIC {
        return qemu(said).map_err(malformed);
    }
    if *magic == multifd::MAGIC.to_be_bytes() {
        let reason = "it is a data connection of a QEMU with the capability multifd, which must \
                      be off at the source: everything comes on one connection here";
        return Err(Stream::protocol(0, 0, reason));
    }
    let reason = format!("it begins with {magic:02x?}, {NO_MIGRATION}");
    Err(Stream::protocol(0, 0, reason))
}

/// A hello, as far as it has come; one that is no offer is handed back.
fn native(said: &[u8]) -> Result<Result<Look, Hello>, Malformed> {
    let mut prefix = [0; PREFIX_BYTES];
    let known = said.get(..PREFIX_BYTES).unwrap_or(said);
    prefix.iter_mut().zip(known).for_each(|(to, from)| *to = *from);
    if known.len() < START_BYTES {
        return Ok(Ok(Look::Needs(START_BYTES)));
    }
    let header = match hello::decode_prefix(&prefix) {
        // Another version may say anything behind its number.
        Err(error) if known.len() == PREFIX_BYTES || error.field == "hello version" => {
            return Err(error);
        }
        Ok(header) if known.len() == PREFIX_BYTES => header,
        _ => return Ok(Ok(Look::Needs(PREFIX_BYTES))),
    };
    let whole = PREFIX_BYTES.saturating_add(header.rest_len());
    let Some(rest) = said.get(PREFIX_BYTES..whole) else { return Ok(Ok(Look::Needs(whole))) };
    match Hello::decode(header, rest)? {
        Hello::Offer(_) => Ok(Ok(Look::Is(Dialect::Native))),
        other => Ok(Err(other)),
    }
}

/// The start of a QEMU's stream, and its first element up to its body.
fn qemu(said: &[u8]) -> Result<Look, Malformed> {
    let mut decoder = Decoder::new();
    let start = match decoder.next(said, false)? {
        Step::Item(_, len) => len,
        Step::Need(needed) => return Ok(Look::Needs(needed)),
    };
    match decoder.next(said.get(start..).unwrap_or_default(), false)? {
        Step::Item(Item::Element(Element::Eof), _) => {
            let problem = Problem::Other("ends before it has begun");
            Err(Malformed::new(decoder.offset(), "stream", problem))
        }
        Step::Need(needed) if start.saturating_add(needed) <= MAX_OPENING => {
            Ok(Look::Needs(start.saturating_add(needed)))
        }
        Step::Item(..) | Step::Need(_) => Ok(Look::Is(Dialect::Qemu)),
    }
}

/// A connection that is no migration's first one.
pub(super) struct Stranger {
    /// Why not.
    pub(super) error: Stream,
    /// It, where it would understand an answer; else it was hung up.
    pub(super) to_tell: Option<Connection>,
}

/// Reads what a source opens with, in bounded time, and puts it back.
pub(super) fn recognise(
    connection: Connection,
    observer: &dyn Observer,
) -> Result<(Dialect, Connection), Box<Stranger>> {
    let Connection { mut reader, writer, line, peer } = connection;
    let mut said = Vec::new();
    let heard: Result<_, Stream> = patiently(&*line, observer, || {
        loop {
            let needed = match look(&said)? {
                Look::Is(dialect) => return Ok(dialect),
                Look::Needs(needed) => needed,
            };
            let known = said.len();
            said.resize(needed, 0);
            let read = reader.read_exact(said.get_mut(known..).unwrap_or_default());
            let (action, offset) = ("read from", known as u64);
            read.map_err(|source| Stream::Connection { action, channel: 0, offset, source })?;
        }
    });
    let is_ours = said.starts_with(hello::MAGIC);
    let reader = Box::new(Cursor::new(said).chain(reader));
    let connection = Connection { reader, writer, line, peer };
    match heard {
        Ok(dialect) => Ok((dialect, connection)),
        Err(error) if is_ours && is_worth_an_answer(&error) => {
            Err(Box::new(Stranger { error, to_tell: Some(connection) }))
        }
        Err(error) => {
            connection.line.hang_up();
            Err(Box::new(Stranger { error, to_tell: None }))
        }
    }
}

/// Calls `body`, and hangs up the line when that takes too long or the user wants to stop.
fn patiently<T>(line: &dyn HangUp, observer: &dyn Observer, body: impl FnOnce() -> T) -> T {
    let (over, begun) = (Heart::new(), Instant::now());
    std::thread::scope(|scope| {
        let _stopping = over.stop_on_drop();
        scope.spawn(|| {
            over.run(LOOK_INTERVAL, || {
                if observer.is_cancelled() || begun.elapsed() >= HELLO_LIMIT {
                    line.hang_up();
                }
            });
        });
        body()
    })
}

#[cfg(test)]
mod tests {
    use format_spec::Writer;
    use format_spec::native::hello::{Join, Offer};

    use super::*;

    fn offer() -> Vec<u8> {
        let (features, required) = (0, 0);
        let program = "a source".to_owned();
        let (session, is_one_way, channels) = ([7; 16], false, 1);
        let offer = Offer { session, is_one_way, features, required, channels, program };
        Hello::Offer(offer).encode()
    }

    /// How many bytes say what it is, and what is told then.
    fn decided(whole: &[u8]) -> (usize, Result<Dialect, String>) {
        for len in 0..=whole.len() {
            let said = &whole[..len];
            match look(said) {
                Ok(Look::Needs(needed)) => {
                    assert!(needed > len && needed <= MAX_OPENING && !is_introduced(said));
                }
                told => {
                    assert!(is_introduced(said));
                    let dialect = |look| match look {
                        Look::Is(dialect) => dialect,
                        Look::Needs(_) => unreachable!(),
                    };
                    return (len, told.map(dialect).map_err(|e| crate::report::error_chain(&e)));
                }
            }
        }
        panic!("{whole:02x?} says nothing");
    }

    #[test]
    fn nothing_is_a_migration_before_its_opening_is_whole() {
        let whole = offer();
        assert_eq!(decided(&whole), (whole.len(), Ok(Dialect::Native)));
        let mut start = Writer::new();
        container::encode_start(&mut start);
        let start = start.into_bytes();
        let command = [&start[..], &[container::COMMAND, 0, 1, 0, 0]].concat();
        assert_eq!(decided(&command), (command.len(), Ok(Dialect::Qemu)));
        // One section's name, in full.
        let name = b"\x01\x00\x00\x00\x02\x03ram\x00\x00\x00\x00\x00\x00\x00\x04";
        let section = [&start[..], name].concat();
        assert_eq!(decided(&section), (section.len(), Ok(Dialect::Qemu)));
    }

    #[test]
    fn what_is_no_migration_is_known_as_soon_as_it_can_be() {
        let told = |bytes: &[u8]| match decided(bytes) {
            (len, Err(told)) => (len, told),
            found => panic!("{found:?}"),
        };
        let mut newer = offer();
        newer[7] = 2;
        let join = Hello::Join(Join { session: [7; 16], ticket: [8; 16], channel: 1 }).encode();
        let mut noise = offer();
        noise[8..].fill(0xff);
        for (bytes, len, says) in [
            (&b"GET / HTTP/1.0"[..], 4, "as no migration does"),
            (&b"BFRX"[..], 4, "as no migration does"),
            (&b"\x11\x22\x33\x44"[..], 4, "multifd"),
            (&newer, 8, "version"),
            (&noise, PREFIX_BYTES, "malformed"),
            (&join, join.len(), "a further connection"),
            (&b"QEVM\0\0\0\x02"[..], 8, "version"),
            (&b"QEVM\0\0\0\x03\xff"[..], 9, "malformed"),
            (&b"QEVM\0\0\0\x03\x00"[..], 9, "ends before it has begun"),
        ] {
            let (found, told) = told(bytes);
            assert!(found == len && told.contains(says), "{found}: {told}");
        }
    }
}
