//! The bytes on their way out: small records are gathered, content goes to the system from where
//! it lies.

use std::io::{self, Write};

use format_spec::Writer;

use crate::qemu::{Error, Result};

/// Records that are gathered before they are handed to the system.
const GATHER_BYTES: usize = 64 << 10;

/// A writer that counts.
#[derive(Debug)]
pub(super) struct Stream<W> {
    writer: W,
    offset: u64,
    gathered: Vec<u8>,
}

impl<W: Write> Stream<W> {
    /// A stream at its start.
    pub(super) fn new(writer: W) -> Self {
        Self { writer, offset: 0, gathered: Vec::new() }
    }

    /// Bytes written so far, gathered ones included.
    pub(super) fn offset(&self) -> u64 {
        self.offset.saturating_add(self.gathered.len() as u64)
    }

    /// Writes what `encode` makes; small.
    pub(super) fn write(&mut self, encode: impl FnOnce(&mut Writer)) -> Result<()> {
        let mut out = Writer::new();
        encode(&mut out);
        self.gathered.extend_from_slice(&out.into_bytes());
        if self.gathered.len() >= GATHER_BYTES { self.hand_over() } else { Ok(()) }
    }

    /// Writes what `encode` makes and content behind it.
    pub(super) fn content(&mut self, encode: impl FnOnce(&mut Writer), bytes: &[u8]) -> Result<()> {
        self.write(encode)?;
        self.hand_over()?;
        self.put(bytes)
    }

    /// Hands everything to the system.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.hand_over()?;
        self.writer.flush().map_err(self.failed())
    }

    fn hand_over(&mut self) -> Result<()> {
        let mut gathered = std::mem::take(&mut self.gathered);
        let written = self.put(&gathered);
        gathered.clear();
        self.gathered = gathered;
        written
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(self.failed())?;
        self.offset = self.offset.saturating_add(bytes.len() as u64);
        Ok(())
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> Error + use<W> {
        let offset = self.offset;
        move |source| Error::Connection { action: "write to", offset, source }
    }
}
