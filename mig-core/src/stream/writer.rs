//! The writing half of one connection.

use std::io::{self, IoSlice, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use format_spec::Writer;
use format_spec::native::frame::{self, CHECKSUM, COMPRESSED, Header};
use format_spec::native::hello::Hello;

use super::{Compression, Error, Packer, Result};
use crate::limits::GATHER_BYTES;

/// Bodies shorter than this are not worth compressing.
const MIN_COMPRESSED: usize = 512;

/// Writes one connection. Small things are gathered; content goes to the system from where it lies,
/// together with what was gathered before it.
pub struct StreamWriter {
    stream: Box<dyn Write + Send>,
    channel: u16,
    /// Bytes handed to the system. Shared, so that it can be read while somebody writes.
    written: Arc<AtomicU64>,
    gathered: Vec<u8>,
    packer: Option<Packer>,
    packed: Vec<u8>,
}

impl std::fmt::Debug for StreamWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamWriter").field("channel", &self.channel).finish_non_exhaustive()
    }
}

impl StreamWriter {
    /// A writer at the start of connection `channel`.
    pub fn new(stream: Box<dyn Write + Send>, channel: u16) -> Self {
        Self {
            stream,
            channel,
            written: Arc::default(),
            gathered: Vec::new(),
            packer: None,
            packed: Vec::new(),
        }
    }

    /// Content is compressed from now on.
    pub fn compress(&mut self, compression: Compression) -> Result<()> {
        self.packer = Some(Packer::new(compression).map_err(|e| self.failed(e))?);
        Ok(())
    }

    /// The counter of the bytes that were handed to the system.
    pub fn written(&self) -> Arc<AtomicU64> {
        self.written.clone()
    }

    /// Offset of what comes next.
    pub fn offset(&self) -> u64 {
        self.written.load(Ordering::Relaxed).saturating_add(self.gathered.len() as u64)
    }

    /// Writes a hello, at once.
    pub fn hello(&mut self, hello: &Hello) -> Result<()> {
        self.gathered.extend_from_slice(&hello.encode());
        self.flush()
    }

    /// Writes what `encode` appends: parts of the container.
    pub fn element(&mut self, encode: impl FnOnce(&mut Writer)) -> Result<()> {
        let mut out = Writer::new();
        encode(&mut out);
        self.gathered.extend_from_slice(&out.into_bytes());
        self.gather()
    }

    /// Writes a record without content, which `encode` appends.
    pub fn record(&mut self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        encode(&mut self.gathered);
        self.gather()
    }

    /// Writes a record whose body is `head` and `content`, together at most
    /// [`MAX_BODY`](frame::MAX_BODY); compressed, if that was chosen.
    pub fn content(&mut self, kind: u16, head: &[u8], content: &[u8]) -> Result<()> {
        let plain_len = head.len().saturating_add(content.len());
        if self.packer.is_some() && plain_len >= MIN_COMPRESSED {
            return self.packed_content(kind, plain_len, &[head, content]);
        }
        let header = Header { body_len: plain_len, kind, flags: CHECKSUM };
        self.gathered.extend_from_slice(&header.encode());
        self.gathered.extend_from_slice(head);
        self.write_with(content, frame::checksum(&[head, content]))
    }

    fn packed_content(&mut self, kind: u16, plain_len: usize, parts: &[&[u8]]) -> Result<()> {
        let mut packed = std::mem::take(&mut self.packed);
        packed.clear();
        packed.extend_from_slice(&u32::try_from(plain_len).unwrap_or(u32::MAX).to_be_bytes());
        if let Some(packer) = &mut self.packer {
            packer.pack(parts, &mut packed).map_err(|e| self.failed(e))?;
        }
        let header = Header { body_len: packed.len(), kind, flags: CHECKSUM | COMPRESSED };
        self.gathered.extend_from_slice(&header.encode());
        let written = self.write_with(&packed, frame::checksum(&[&packed]));
        self.packed = packed;
        written
    }

    /// Writes what was gathered, then `content`, then its checksum, in one go.
    fn write_with(&mut self, content: &[u8], checksum: u32) -> Result<()> {
        let checksum = checksum.to_be_bytes();
        if content.len() < GATHER_BYTES {
            self.gathered.extend_from_slice(content);
            self.gathered.extend_from_slice(&checksum);
            return self.gather();
        }
        let gathered = std::mem::take(&mut self.gathered);
        let result = self.write(&[&gathered, content, &checksum]);
        self.gathered = gathered;
        self.gathered.clear();
        result
    }

    fn gather(&mut self) -> Result<()> {
        if self.gathered.len() >= GATHER_BYTES { self.flush() } else { Ok(()) }
    }

    /// Hands everything to the system.
    pub fn flush(&mut self) -> Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let gathered = std::mem::take(&mut self.gathered);
        let result = self.write(&[&gathered]);
        self.gathered = gathered;
        self.gathered.clear();
        result
    }

    fn write(&mut self, parts: &[&[u8]]) -> Result<()> {
        let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut left = slices.as_mut_slice();
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            let len = match self.stream.write_vectored(left) {
                Ok(0) => return Err(self.failed(io::ErrorKind::WriteZero.into())),
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.failed(e)),
            };
            self.written.fetch_add(len as u64, Ordering::Relaxed);
            IoSlice::advance_slices(&mut left, len);
        }
        self.stream.flush().map_err(|e| self.failed(e))
    }

    fn failed(&self, source: io::Error) -> Error {
        let offset = self.written.load(Ordering::Relaxed);
        Error::Connection { action: "write to", channel: self.channel, offset, source }
    }
}
