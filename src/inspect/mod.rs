//! Any captured migration stream, record by record: QEMU's dialect and ours, the main connection,
//! multifd channels, the postcopy-preempt channel and the return path.
//!
//! What stands before an error is shown all the same. Memory does not grow with the stream.

mod decoders;
mod json;
mod native;
mod text;

use std::io::{self, Read, Write};
use std::str::FromStr;

use format_spec::qemu::{MAX_ITEM, Step, cut_off};
use format_spec::{Malformed, Problem};

use self::decoders::{Decoders, Seen};
use crate::Error;
use crate::qemu::Buffer;

/// Bytes that tell what a stream is.
const PROBE_BYTES: usize = 8;
/// First bytes of what has no inner form that are shown.
const SHOWN_BYTES: usize = 8;

/// What a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The main connection, from source to destination; also one that goes on after a cut.
    Main,
    /// A multifd channel.
    Channel,
    /// The second connection of postcopy-preempt.
    Preempt,
    /// What a destination answers.
    ReturnPath,
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Ok(match text {
            "main" => Self::Main,
            "channel" => Self::Channel,
            "preempt" => Self::Preempt,
            "return-path" => Self::ReturnPath,
            _ => {
                let known = "main, channel, preempt or return-path";
                return Err(Error::Usage { reason: format!("{text:?} is not {known}") });
            }
        })
    }
}

impl Kind {
    /// What a stream is by its first bytes. A main connection is told by its magic, or by the
    /// RECV_BITMAP with which it goes on after a cut; a channel by its magic; a return path by the
    /// type and the length of its first message. A preempt channel begins with an offset, whose
    /// upper bytes are zero.
    pub fn of(first: &[u8]) -> Option<Self> {
        Some(match first {
            [b'Q', b'E', b'V', b'M', ..] | [b'B', b'F', b'R', b'Y', ..] | [8, 0, 10, ..] => {
                Self::Main
            }
            [0x11, 0x22, 0x33, 0x44, ..] => Self::Channel,
            [0, 1 | 2 | 6, 0, 4, ..] | [0, 3 | 5, ..] | [0, 4, 0, 12, ..] | [0, 7, 0, 0, ..] => {
                Self::ReturnPath
            }
            [0, 0, _, _, _, _, _, _, ..] => Self::Preempt,
            _ => return None,
        })
    }
}

/// How a stream is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A line for each record; runs of alike ones are counted.
    Text,
    /// One document, with every record.
    Json,
}

/// How far a stream could be read.
#[derive(Debug)]
pub struct Inspection {
    /// What it is, or was taken for.
    pub kind: Option<Kind>,
    /// Bytes that were understood.
    pub bytes: u64,
    /// Why not all of it, if so.
    pub stopped: Option<Stop>,
}

/// Why a stream was not read to its end.
#[derive(Debug)]
pub enum Stop {
    /// It is not well formed.
    Malformed(Malformed),
    /// It could not be read.
    Input(io::Error),
}

/// Who is shown the records.
trait View {
    /// The stream begins.
    fn begin(&mut self, _kind: Option<Kind>) -> io::Result<()> {
        Ok(())
    }

    /// A record that stands at byte `at`.
    fn record(&mut self, at: u64, seen: &Seen<'_>) -> io::Result<()>;

    /// The stream has ended, as it says.
    fn end(&mut self, inspection: &Inspection) -> io::Result<()>;
}

/// Shows a stream; `kind` where it is not to be told by its first bytes. Fails only where `out`
/// does.
pub fn run(
    input: impl Read,
    kind: Option<Kind>,
    form: Form,
    out: &mut dyn Write,
) -> io::Result<Inspection> {
    let mut buffer = Buffer::new(input);
    match form {
        Form::Text => show(&mut buffer, kind, &mut text::Text::new(out)),
        Form::Json => show(&mut buffer, kind, &mut json::Json::new(out)),
    }
}

fn show<R: Read>(
    buffer: &mut Buffer<R>,
    kind: Option<Kind>,
    view: &mut impl View,
) -> io::Result<Inspection> {
    let probed = buffer.fill(PROBE_BYTES);
    let kind = kind.or_else(|| Kind::of(buffer.bytes()));
    view.begin(kind)?;
    let mut inspection = Inspection { kind, bytes: 0, stopped: probed.err().map(Stop::Input) };
    if inspection.stopped.is_none() {
        inspection.stopped = match kind {
            Some(kind) => records(buffer, kind, view, &mut inspection.bytes)?,
            None => Some(Stop::Malformed(unknown(buffer.bytes()))),
        };
    }
    view.end(&inspection)?;
    Ok(inspection)
}

fn unknown(first: &[u8]) -> Malformed {
    if first.is_empty() {
        return cut_off(0, PROBE_BYTES, 0);
    }
    let problem = Problem::Other("begin no stream that is known here; --as says what it is");
    Malformed::new(0, "first bytes of the stream", problem)
}

fn records<R: Read>(
    buffer: &mut Buffer<R>,
    kind: Kind,
    view: &mut impl View,
    bytes: &mut u64,
) -> io::Result<Option<Stop>> {
    let mut decoders = Decoders::new(kind, buffer.bytes());
    let mut raw = Raw::default();
    loop {
        let at = decoders.offset();
        let needed = match decoders.next(buffer.bytes(), buffer.is_whole()) {
            Ok(Step::Item(seen, len)) => {
                match seen.raw() {
                    Some(bytes) => raw.add(at, bytes),
                    None => {
                        raw.tell(view)?;
                        view.record(at, &seen)?;
                    }
                }
                buffer.consume(len);
                *bytes = decoders.offset();
                continue;
            }
            Ok(Step::Need(needed)) => needed.min(MAX_ITEM),
            Err(error) => {
                raw.tell(view)?;
                return Ok(Some(Stop::Malformed(error)));
            }
        };
        if buffer.is_whole() {
            raw.tell(view)?;
            let left = buffer.bytes().len();
            if left == 0 && decoders.may_end() {
                return Ok(None);
            }
            return Ok(Some(Stop::Malformed(cut_off(at, needed, left))));
        }
        if let Err(error) = buffer.fill(needed) {
            raw.tell(view)?;
            return Ok(Some(Stop::Input(error)));
        }
    }
}

/// Bytes without inner form, which come in parts that depend on the reads.
#[derive(Debug, Default)]
struct Raw {
    at: u64,
    len: u64,
    first: Vec<u8>,
}

impl Raw {
    fn add(&mut self, at: u64, bytes: &[u8]) {
        if self.len == 0 {
            self.at = at;
            self.first.clear();
        }
        self.len = self.len.saturating_add(bytes.len() as u64);
        let room = SHOWN_BYTES.saturating_sub(self.first.len());
        self.first.extend(bytes.iter().take(room));
    }

    fn tell(&mut self, view: &mut impl View) -> io::Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        let told = view.record(self.at, &Seen::Raw { len: self.len, first: &self.first });
        self.len = 0;
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_tell_what_a_stream_is() {
        for (first, kind) in [
            (&b"QEVM\0\0\0\x03"[..], Some(Kind::Main)),
            (b"BFRY\0\0\0\x01", Some(Kind::Main)),
            (b"\x08\0\x0a\0\x03\x02m0", Some(Kind::Main)),
            (b"\x11\x22\x33\x44\0\0\0\x01", Some(Kind::Channel)),
            (b"\0\x02\0\x04\0\0\0\x01", Some(Kind::ReturnPath)),
            (b"\0\x01\0\x04\0\0\0\0", Some(Kind::ReturnPath)),
            (b"\0\x03\0\x13\0\0\0\0", Some(Kind::ReturnPath)),
            (b"\0\0\0\0\0\x08\x60\x08", Some(Kind::Preempt)),
            (b"\0\0", None),
            (b"<html>\n\n", None),
            (b"", None),
        ] {
            assert_eq!(Kind::of(first), kind, "{first:x?}");
        }
    }
}
