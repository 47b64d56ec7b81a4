//! Records through a blocking stream. The codecs are in `format-spec`; here are only the buffers.

use std::io::{self, Read, Write};

use format_spec::native::block::Run;
use format_spec::native::frame::{HEADER_BYTES, Header, Record};
use format_spec::native::hello::{self, Hello, PREFIX_BYTES};

use super::error::{Error, Result};

/// Records that are gathered before they are handed to the system. Content passes by this buffer.
const GATHER_BYTES: usize = 64 << 10;

/// Reads records, one at a time, into one buffer of at most
/// [`MAX_BODY`](format_spec::native::frame::MAX_BODY) and a checksum.
#[derive(Debug)]
pub(super) struct RecordReader<R> {
    stream: R,
    offset: u64,
    buffer: Vec<u8>,
}

impl<R: Read> RecordReader<R> {
    /// A reader at the start of a stream.
    pub(super) fn new(stream: R) -> Self {
        Self { stream, offset: 0, buffer: Vec::new() }
    }

    /// Reads the hello with which the peer opens.
    pub(super) fn hello(&mut self) -> Result<Hello> {
        let mut prefix = [0; PREFIX_BYTES];
        self.fill(&mut prefix)?;
        let header = hello::decode_prefix(&prefix)?;
        self.fill_buffer(header.rest_len())?;
        Ok(Hello::decode(header, self.read_bytes(header.rest_len()))?)
    }

    /// Reads the next record, checksums checked. Its meaning depends on where the stream is.
    pub(super) fn record(&mut self) -> Result<Record<'_>> {
        let mut bytes = [0; HEADER_BYTES];
        let header_at = self.offset;
        self.fill(&mut bytes)?;
        let header = Header::decode(&bytes, header_at)?;
        let body_at = self.offset;
        self.fill_buffer(header.rest_len())?;
        Ok(Record::from_parts(header, self.read_bytes(header.rest_len()), body_at)?)
    }

    fn read_bytes(&self, len: usize) -> &[u8] {
        self.buffer.get(..len).unwrap_or_default()
    }

    /// Fills the first `len` bytes of the buffer, which only ever grows: its bytes are not cleared
    /// for every record. `len` comes from a checked header.
    fn fill_buffer(&mut self, len: usize) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        let filled = self.fill(buffer.get_mut(..len).unwrap_or_default());
        self.buffer = buffer;
        filled
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        let offset = self.offset;
        self.stream.read_exact(bytes).map_err(|source| Error::Connection {
            action: "read from",
            offset,
            source,
        })?;
        self.offset = self.offset.saturating_add(bytes.len() as u64);
        Ok(())
    }
}

/// Writes records. Small ones are gathered; content goes to the system from where it lies.
#[derive(Debug)]
pub(super) struct RecordWriter<W> {
    stream: W,
    offset: u64,
    gathered: Vec<u8>,
}

impl<W: Write> RecordWriter<W> {
    /// A writer at the start of a stream.
    pub(super) fn new(stream: W) -> Self {
        Self { stream, offset: 0, gathered: Vec::new() }
    }

    /// Bytes written so far, gathered ones included.
    pub(super) fn offset(&self) -> u64 {
        self.offset.saturating_add(self.gathered.len() as u64)
    }

    /// Writes a hello, at once.
    pub(super) fn hello(&mut self, hello: &Hello) -> Result<()> {
        self.gathered.extend_from_slice(&hello.encode());
        self.flush()
    }

    /// Writes a record without content, which `encode` appends.
    pub(super) fn record(&mut self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        encode(&mut self.gathered);
        if self.gathered.len() >= GATHER_BYTES { self.flush() } else { Ok(()) }
    }

    /// Writes a run whose content is `bytes`.
    pub(super) fn run(&mut self, run: &Run<'_>, bytes: &[u8]) -> Result<()> {
        let checksum = run.encode_head(&mut self.gathered);
        self.flush()?;
        self.write(bytes)?;
        self.gathered.extend_from_slice(&checksum);
        Ok(())
    }

    /// Hands everything to the system.
    pub(super) fn flush(&mut self) -> Result<()> {
        let mut gathered = std::mem::take(&mut self.gathered);
        let written = self.write(&gathered);
        gathered.clear();
        self.gathered = gathered;
        written
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let offset = self.offset;
        let failed = |source: io::Error| Error::Connection { action: "write to", offset, source };
        self.stream.write_all(bytes).and_then(|()| self.stream.flush()).map_err(failed)?;
        self.offset = self.offset.saturating_add(bytes.len() as u64);
        Ok(())
    }
}
