//! The reading half of one connection.

use std::io::{self, BufReader, Read};
use std::time::{Duration, Instant};

use format_spec::native::frame::{HEADER_BYTES, Header, MAX_BODY, Record};
use format_spec::native::hello::{self, Hello, PREFIX_BYTES};
use format_spec::qemu::container::{self, SectionKind};
use format_spec::{Malformed, Problem, Reader};

use super::arrival::{Arrival, Buffers};
use super::{Error, Method, Result, Unpacker};
use crate::heart::within;
use crate::transport::HangUp;

/// Heads are read through a buffer of this size, bodies into their own.
const HEAD_BYTES: usize = 16 << 10;
/// Bytes before the plain content of a compressed body.
const PLAIN_LEN_BYTES: usize = 4;

/// Reads one connection.
pub struct StreamReader {
    stream: BufReader<Box<dyn Read + Send>>,
    channel: u16,
    offset: u64,
    /// What was chosen; the context begins with the first compressed record.
    method: Option<Method>,
    unpacker: Option<Unpacker>,
    /// A body as it came, while it is inflated.
    packed: Vec<u8>,
}

impl std::fmt::Debug for StreamReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamReader").field("offset", &self.offset).finish_non_exhaustive()
    }
}

/// An element of the native container, up to its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Element {
    /// First part of a section, which it names.
    Start {
        /// Its number from now on.
        id: u32,
        /// Its name.
        name: String,
        /// Which of several of that name.
        instance: u32,
        /// Version of its records.
        version: u32,
    },
    /// A further part of this section.
    Part(u32),
    /// The last part of this section.
    End(u32),
    /// The stream ends.
    Eof,
}

impl StreamReader {
    /// A reader at the start of connection `channel`.
    pub fn new(stream: Box<dyn Read + Send>, channel: u16) -> Self {
        let stream = BufReader::with_capacity(HEAD_BYTES, stream);
        Self { stream, channel, offset: 0, method: None, unpacker: None, packed: Vec::new() }
    }

    /// Which connection this turned out to be, once its JOIN was read.
    pub fn set_channel(&mut self, channel: u16) {
        self.channel = channel;
    }

    /// Which connection this is.
    pub fn channel(&self) -> u16 {
        self.channel
    }

    /// Compressed records of this method may come.
    pub fn decompress(&mut self, method: Method) {
        self.method = Some(method);
    }

    /// Bytes read so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Reads the hello with which the peer opens.
    pub fn hello(&mut self) -> Result<Hello> {
        let prefix = self.array::<PREFIX_BYTES>()?;
        let header = hello::decode_prefix(&prefix).map_err(|e| self.malformed(e))?;
        let mut rest = vec![0; header.rest_len()];
        self.fill(&mut rest)?;
        Hello::decode(header, &rest).map_err(|e| self.malformed(e))
    }

    /// The same in bounded time: `line` is hung up when it is over, and the error says why.
    pub fn hello_within(&mut self, limit: Duration, line: &dyn HangUp) -> Result<Hello> {
        let begun = Instant::now();
        within(limit, line, || self.hello()).map_err(|error| match error {
            Error::Connection { action, channel, offset, .. } if begun.elapsed() >= limit => {
                let late = format!("the peer did not answer within {} seconds", limit.as_secs());
                let source = io::Error::new(io::ErrorKind::TimedOut, late);
                Error::Connection { action, channel, offset, source }
            }
            other => other,
        })
    }

    /// What was not read yet.
    pub fn into_rest(self) -> Box<dyn Read + Send> {
        Box::new(self.stream)
    }

    /// Reads magic and version of the container.
    pub fn start(&mut self) -> Result<()> {
        let at = self.offset;
        let bytes = self.array::<8>()?;
        container::decode_start(&mut Reader::new(&bytes, at)).map_err(|e| self.malformed(e))
    }

    /// Reads the next element, up to its body. Those that only QEMU writes are errors.
    pub fn element(&mut self) -> Result<Element> {
        let at = self.offset;
        let mut bytes = self.array::<1>()?.to_vec();
        match bytes.first().copied().unwrap_or_default() {
            container::START => {
                bytes.extend(self.array::<5>()?);
                let mut rest = vec![0; usize::from(bytes.last().copied().unwrap_or_default()) + 8];
                self.fill(&mut rest)?;
                bytes.extend(rest);
            }
            container::PART | container::END => bytes.extend(self.array::<4>()?),
            container::EOF => {}
            kind => {
                let problem = Problem::Unknown { value: kind.into() };
                return Err(self.malformed(Malformed::new(at, "element type", problem)));
            }
        }
        let decoded = container::Element::decode(&mut Reader::new(&bytes, at));
        let container::Element::Section(section) = decoded.map_err(|e| self.malformed(e))? else {
            return Ok(Element::Eof);
        };
        Ok(match (section.kind, section.name) {
            (SectionKind::Part, _) => Element::Part(section.id),
            (SectionKind::End, _) => Element::End(section.id),
            (_, name) => Element::Start {
                id: section.id,
                name: name.map(|n| n.name.to_owned()).unwrap_or_default(),
                instance: name.map(|n| n.instance).unwrap_or_default(),
                version: name.map(|n| n.version).unwrap_or_default(),
            },
        })
    }

    /// Reads the mark after a section's body.
    pub fn footer(&mut self, id: u32) -> Result<()> {
        let at = self.offset;
        let bytes = self.array::<5>()?;
        container::decode_footer(&mut Reader::new(&bytes, at), id).map_err(|e| self.malformed(e))
    }

    /// Reads the next record into one of `buffers`. Its meaning depends on where the stream is.
    pub fn record(&mut self, buffers: &Buffers) -> Result<Arrival> {
        let at = self.offset;
        let bytes = self.array::<HEADER_BYTES>()?;
        let header = Header::decode(&bytes, at).map_err(|e| self.malformed(e))?;
        if header.is_compressed() {
            return self.compressed(header, buffers);
        }
        let (offset, channel) = (self.offset, self.channel);
        let mut body = buffers.take(header.rest_len())?;
        self.fill(body.bytes_mut())?;
        let checked = Record::from_parts(header, body.bytes(), offset).map(|_| ());
        checked.map_err(|e| self.malformed(e))?;
        Ok(Arrival { header, channel, offset, body })
    }

    fn compressed(&mut self, header: Header, buffers: &Buffers) -> Result<Arrival> {
        let offset = self.offset;
        let mut packed = std::mem::take(&mut self.packed);
        if packed.len() < header.rest_len() {
            packed.resize(header.rest_len(), 0);
        }
        let rest = packed.get_mut(..header.rest_len()).unwrap_or_default();
        let arrival = self.fill(rest).and_then(|()| {
            let record = Record::from_parts(header, rest, offset);
            self.inflate(&record.map_err(|e| self.malformed(e))?, buffers)
        });
        self.packed = packed;
        arrival
    }

    fn inflate(&mut self, record: &Record<'_>, buffers: &Buffers) -> Result<Arrival> {
        let (at, channel) = (record.offset, self.channel);
        let bad = |problem| {
            let source = Malformed::new(at, "compressed body", problem);
            Error::Malformed { channel, source }
        };
        let Some(method) = self.method else {
            return Err(bad(Problem::Other("comes where no compression was chosen")));
        };
        if !record.header.has_checksum() {
            return Err(bad(Problem::Other("has no checksum")));
        }
        let mut body = Reader::new(record.body, at);
        let plain_len = body.be32("length of the plain body").map_err(|e| self.malformed(e))?;
        let Ok(plain_len @ 0..=MAX_BODY) = usize::try_from(plain_len) else {
            let (value, max) = (plain_len.into(), MAX_BODY as u64);
            return Err(bad(Problem::OutOfRange { value, min: 0, max }));
        };
        let mut plain = buffers.take(plain_len)?;
        let fresh = || Unpacker::new(method).map_err(|e| self.failed(e));
        if self.unpacker.is_none() {
            self.unpacker = Some(fresh()?);
        }
        let packed = record.body.get(PLAIN_LEN_BYTES..).unwrap_or_default();
        if let Some(unpacker) = &mut self.unpacker {
            unpacker.unpack(packed, plain.bytes_mut()).map_err(bad)?;
        }
        let flags = record.header.flags & !format_spec::native::frame::COMPRESSED;
        let header = Header { body_len: plain_len, flags, ..record.header };
        Ok(Arrival { header, channel, offset: at, body: plain })
    }

    /// Reads and forgets what comes until the connection ends or `limit` bytes have passed.
    pub fn drain(&mut self, limit: u64) {
        let mut bytes = [0; 4096];
        let mut left = limit;
        while left > 0 {
            match self.stream.read(&mut bytes) {
                Ok(0) => return,
                Ok(len) => left = left.saturating_sub(len as u64),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.stream.read_exact(bytes).map_err(|e| self.failed(e))?;
        self.offset = self.offset.saturating_add(bytes.len() as u64);
        Ok(())
    }

    fn malformed(&self, source: Malformed) -> Error {
        Error::Malformed { channel: self.channel, source }
    }

    fn failed(&self, source: io::Error) -> Error {
        let (channel, offset) = (self.channel, self.offset);
        Error::Connection { action: "read from", channel, offset, source }
    }
}
