//! A stream to QEMU: sections open and close, and the destination says how it ended.
//!
//! It knows names, chunks and bits, and no images: whoever drives it decides what is sent when.
//! [`run`](super::run) drives it for disks at rest. For a running guest the order is the same:
//! [`start_blocks`](Session::start_blocks), then [`blocks`](Session::blocks) as often as there is
//! something new (a chunk may be sent again, the last one counts), then, *with the guest paused*,
//! what is left, the bitmaps as they are by then ([`start_bitmaps`](Session::start_bitmaps),
//! [`end_bitmaps`](Session::end_bitmaps)), and [`finish`](Session::finish).

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use format_spec::Writer;
use format_spec::qemu::command::Command;
use format_spec::qemu::configuration::{Configuration, Subsection};
use format_spec::qemu::container::{
    Element, Section, SectionKind, SectionName, encode_footer, encode_start,
};
use format_spec::qemu::reply::{Decoder, Reply};
use format_spec::qemu::{Step, block, dirty_bitmap};
use mig_core::transport::{Connection, HangUp};

use super::stream::Stream;
use crate::qemu::buffer::Buffer;
use crate::qemu::{Error, Result};

/// Number of the `block` section in our streams. QEMU takes 0 for another one.
const BLOCK_ID: u32 = 1;
/// Number of the `dirty-bitmap` section in our streams.
const BITMAP_ID: u32 = 2;
/// A description of no devices. Without one QEMU warns, and succeeds all the same.
const VMDESCRIPTION: &[u8] = b"{}";
/// How long a destination that may have everything is still listened to by who wants to stop.
const LAST_WORD: Duration = Duration::from_millis(500);
/// What the last PING carries.
const LAST_PING: u32 = 0x6266_6572;
/// What is said of a destination that is gone before it has everything.
const WORDLESS: &str =
    "it closed the connection without a word: it failed or died, and its own messages say why";
/// What is said of one that is gone afterwards.
const UNSAID: &str = "it closed the connection without saying how the migration ended";

/// How a stream begins.
#[derive(Debug, Clone, Default)]
pub struct Greeting {
    /// Machine type; an empty one fits every destination.
    pub machine: String,
    /// The machine's UUID, which the destination compares with its own if it has one.
    pub uuid: Option<[u8; 16]>,
    /// Whether nothing comes back.
    pub is_one_way: bool,
}

/// How a stream ended.
#[derive(Debug)]
pub enum Ending {
    /// The destination says that it loaded everything, which it also says of bitmaps that it
    /// dropped.
    Loaded,
    /// Nothing comes back on this connection.
    Unheard,
    /// It may have everything, and did not say how it ended: why. It may run already.
    Unknown(String),
    /// The same, and it was waited for as long as anything is.
    Expired(String),
}

/// What the destination says in the end.
enum Word {
    /// PONG with the value of [`LAST_PING`].
    Alive,
    /// SHUT 0.
    Loaded,
    /// SHUT with another status.
    Failed(String),
    /// It closed the connection.
    Gone,
}

/// A stream that is being written. Dropping it hangs up, and the destination fails.
pub struct Session {
    pub(super) stream: Stream<Box<dyn Write + Send>>,
    replies: Buffer<Box<dyn Read + Send>>,
    line: Arc<dyn HangUp>,
    is_one_way: bool,
    /// Whether the end may have gone out.
    has_ended: Arc<AtomicBool>,
    /// The last names on the wire, which are not repeated.
    names: Names,
}

#[derive(Debug, Default)]
pub(super) struct Names {
    device: String,
    bitmap: String,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("offset", &self.stream.offset()).finish_non_exhaustive()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.line.hang_up();
    }
}

impl Session {
    /// Begins the stream on a fresh connection.
    pub fn open(connection: Connection, greeting: &Greeting) -> Result<Self> {
        let Connection { reader, writer, line, .. } = connection;
        let mut session = Self {
            stream: Stream::new(writer),
            replies: Buffer::new(reader),
            line,
            is_one_way: greeting.is_one_way,
            has_ended: Arc::default(),
            names: Names::default(),
        };
        session.stream.write(|out| {
            encode_start(out);
            let subsections = greeting.uuid.map(Subsection::Uuid).into_iter().collect();
            let configuration = Configuration { machine: &greeting.machine, subsections };
            Element::Configuration(configuration).encode(out);
            if !greeting.is_one_way {
                Element::Command(Command::OpenReturnPath).encode(out);
            }
        })?;
        Ok(session)
    }

    /// What ends its waiting from another thread.
    pub fn breaker(&self) -> Breaker {
        let (line, has_ended) = (self.line.clone(), self.has_ended.clone());
        Breaker { line, has_ended, cancelled: None }
    }

    /// Bytes of the stream so far.
    pub fn wire_bytes(&self) -> u64 {
        self.stream.offset()
    }

    /// Announces that disks come. Once, before their chunks.
    pub fn start_blocks(&mut self) -> Result<()> {
        self.section(SectionKind::Start, BLOCK_ID, Kind::Blocks, |out| {
            block::Record::end().encode(out)
        })
    }

    /// The disks are done. Once, after their last chunk.
    pub fn end_blocks(&mut self) -> Result<()> {
        self.section(SectionKind::End, BLOCK_ID, Kind::Blocks, |out| {
            block::Record::progress(100).encode(out);
            block::Record::end().encode(out);
        })
    }

    /// Opens a part of the `block` section, to which `body` writes records.
    pub(super) fn block_part<T>(
        &mut self,
        body: impl FnOnce(&mut Stream<Box<dyn Write + Send>>) -> Result<T>,
    ) -> Result<T> {
        self.stream.write(|out| head(SectionKind::Part, BLOCK_ID, Kind::Blocks).encode(out))?;
        let done = body(&mut self.stream)?;
        self.stream.write(|out| {
            block::Record::end().encode(out);
            encode_footer(BLOCK_ID, out);
        })?;
        Ok(done)
    }

    /// Opens the `dirty-bitmap` section and writes the records that `body` makes.
    pub(super) fn bitmap_section(
        &mut self,
        kind: SectionKind,
        body: impl FnOnce(&mut Names, &mut Stream<Box<dyn Write + Send>>) -> Result<()>,
    ) -> Result<()> {
        self.stream.write(|out| head(kind, BITMAP_ID, Kind::Bitmaps).encode(out))?;
        body(&mut self.names, &mut self.stream)?;
        self.stream.write(|out| {
            dirty_bitmap::Record::end().encode(out);
            encode_footer(BITMAP_ID, out);
        })
    }

    fn section(
        &mut self,
        kind: SectionKind,
        id: u32,
        which: Kind,
        body: impl FnOnce(&mut Writer),
    ) -> Result<()> {
        self.stream.write(|out| {
            head(kind, id, which).encode(out);
            body(out);
            encode_footer(id, out);
        })
    }

    /// Ends the stream and waits for what the destination says. It may take its time: it flushes
    /// its disks first. An error is definite: the end did not go out, or the destination says that
    /// it failed. Once the end may have arrived, nothing else than the destination's own word is
    /// proof that it did not take over; hence it has to say before that it has got so far.
    pub fn finish(&mut self) -> Result<Ending> {
        self.settle()?;
        self.has_ended.store(true, Ordering::Release);
        match self.write_end() {
            // What a file or a pipe does not take is nowhere.
            Err(error) if self.is_one_way => return Err(error),
            Ok(()) if self.is_one_way => return Ok(Ending::Unheard),
            Err(error) if is_expired(&error) => {
                return Ok(Ending::Expired(crate::report::error_chain(&error)));
            }
            Ok(()) | Err(_) => {}
        }
        match self.hear() {
            Ok(Word::Loaded) => Ok(Ending::Loaded),
            Ok(Word::Failed(said)) => Err(Error::Peer(said)),
            Ok(Word::Gone | Word::Alive) => Ok(Ending::Unknown(UNSAID.to_owned())),
            Err(error) if is_expired(&error) => {
                Ok(Ending::Expired(crate::report::error_chain(&error)))
            }
            Err(error) => Ok(Ending::Unknown(crate::report::error_chain(&error))),
        }
    }

    /// Waits until the destination has taken everything up to here: what it fails or dies of (the
    /// machine, the UUID, a bitmap) it has failed of by then, and nobody has to wonder whether it
    /// took over.
    fn settle(&mut self) -> Result<()> {
        if !self.is_one_way {
            let ping = Element::Command(Command::Ping(LAST_PING));
            self.stream.write(|out| ping.encode(out))?;
        }
        self.stream.flush()?;
        if self.is_one_way {
            return Ok(());
        }
        match self.hear()? {
            Word::Alive => Ok(()),
            Word::Failed(said) => Err(Error::Peer(said)),
            Word::Gone => Err(Error::Peer(WORDLESS.to_owned())),
            Word::Loaded => Err(Error::Peer("it says that it is done before it is".to_owned())),
        }
    }

    /// From the first byte of this the destination may take over.
    fn write_end(&mut self) -> Result<()> {
        self.stream.write(|out| {
            Element::Eof.encode(out);
            let len = u32::try_from(VMDESCRIPTION.len()).unwrap_or(0);
            Element::VmDescription(len).encode(out);
            out.bytes(VMDESCRIPTION);
        })?;
        self.stream.flush()
    }

    /// A connection that broke while it was written to may hold the reason in the other direction.
    pub fn reason_of(&mut self, error: Error) -> Error {
        match error {
            // It was waited for long enough.
            Error::Connection { .. } if is_expired(&error) => error,
            Error::Connection { .. } if !self.is_one_way => match self.hear() {
                Ok(Word::Failed(said)) => Error::Peer(said),
                Ok(Word::Gone) => Error::Peer(WORDLESS.to_owned()),
                Ok(Word::Loaded | Word::Alive) | Err(_) => error,
            },
            error => error,
        }
    }

    /// Reads the return path up to SHUT, or the answer to the last PING.
    fn hear(&mut self) -> Result<Word> {
        let mut decoder = Decoder::default();
        loop {
            let offset = decoder.offset();
            let len = match decoder.next(self.replies.bytes())? {
                Step::Item(reply, len) => {
                    match reply {
                        Reply::Pong(LAST_PING) => {
                            self.replies.consume(len);
                            return Ok(Word::Alive);
                        }
                        Reply::Shut(0) => return Ok(Word::Loaded),
                        Reply::Shut(status) => {
                            return Ok(Word::Failed(format!("it answers SHUT {status}")));
                        }
                        // Nobody asked, and it does no harm.
                        Reply::Pong(_) | Reply::SwitchoverAck => {}
                        other => return Err(out_of_place(&other, offset)),
                    }
                    len
                }
                Step::Need(_) if self.replies.is_whole() => return Ok(Word::Gone),
                Step::Need(needed) => {
                    let failed = |source| Error::Connection { action: "read from", offset, source };
                    self.replies.fill(needed).map_err(failed)?;
                    0
                }
            };
            self.replies.consume(len);
        }
    }
}

/// Whether the connection was waited for as long as it may be.
fn is_expired(error: &Error) -> bool {
    use std::io::ErrorKind::{TimedOut, WouldBlock};
    // A socket of the standard library says that it would block.
    matches!(error, Error::Connection { source, .. }
        if matches!(source.kind(), TimedOut | WouldBlock))
}

/// Ends the waiting of a [`Session`] whose user wants to stop.
pub struct Breaker {
    line: Arc<dyn HangUp>,
    has_ended: Arc<AtomicBool>,
    cancelled: Option<Instant>,
}

impl std::fmt::Debug for Breaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Breaker").field("cancelled", &self.cancelled).finish_non_exhaustive()
    }
}

impl Breaker {
    /// Hangs up if the user wants to stop; to be called again and again. A destination that may
    /// have everything gets a moment to say so, for without its word nobody knows.
    pub fn beat(&mut self, is_cancelled: bool) {
        if !is_cancelled {
            return;
        }
        let since = *self.cancelled.get_or_insert_with(Instant::now);
        if !self.has_ended.load(Ordering::Acquire) || since.elapsed() >= LAST_WORD {
            self.line.hang_up();
        }
    }
}

impl Names {
    /// What must be said to speak of this bitmap after the one before. A bitmap of the same name
    /// on another device is another one.
    pub(super) fn tell<'a>(
        &mut self,
        device: &'a str,
        bitmap: &'a str,
    ) -> (Option<&'a str>, Option<&'a str>) {
        let device = told(&mut self.device, device);
        if device.is_some() {
            self.bitmap.clear();
        }
        (device, told(&mut self.bitmap, bitmap))
    }
}

fn told<'a>(last: &mut String, name: &'a str) -> Option<&'a str> {
    if last == name {
        return None;
    }
    name.clone_into(last);
    Some(name)
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Blocks,
    Bitmaps,
}

fn head(kind: SectionKind, id: u32, which: Kind) -> Section<'static> {
    let (name, version) = match which {
        Kind::Blocks => (block::SECTION, block::SECTION_VERSION),
        Kind::Bitmaps => (dirty_bitmap::SECTION, dirty_bitmap::SECTION_VERSION),
    };
    let is_first = matches!(kind, SectionKind::Start | SectionKind::Full);
    let name = is_first.then_some(SectionName { name, instance: 0, version });
    Section { id, kind, name }
}

fn out_of_place(reply: &Reply<'_>, offset: u64) -> Error {
    let what = match reply {
        Reply::ReqPages { .. } => "asks for pages of memory",
        Reply::RecvBitmap { .. } | Reply::Bits(_) | Reply::BitsEnd => "sends a bitmap of pages",
        _ => "goes on after a cut that was none",
    };
    let reason = format!("it {what}, and no memory was sent");
    Error::Protocol { offset, reason }
}
