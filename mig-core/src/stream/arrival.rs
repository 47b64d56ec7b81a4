//! Bodies of records, in buffers whose number is bounded.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use format_spec::native::block::RUN_HEAD_BYTES;
use format_spec::native::frame::{Header, Record};

use super::{Error, Result};
use crate::block::{PAGE_BYTES, on_page};

/// Where in a page a body begins: so that the content of a run, behind its head, begins on the
/// next one. The system copies faster from there and to there.
const SHIFT: usize = PAGE_BYTES - RUN_HEAD_BYTES;

/// A fixed number of buffers. Taking one waits until one is free: that is what bounds the memory
/// of a destination and slows a source that is too fast for it.
#[derive(Debug, Clone)]
pub struct Buffers(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    has_free: Condvar,
}

#[derive(Debug)]
struct State {
    free: Vec<Vec<u8>>,
    is_closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffers {
    /// `count` buffers, at least one. They get their memory when they are used.
    pub fn new(count: usize) -> Self {
        let state = State { free: vec![Vec::new(); count.max(1)], is_closed: false };
        Self(Arc::new(Shared { state: Mutex::new(state), has_free: Condvar::new() }))
    }

    /// Waits for a buffer of `len` bytes; its content is anything. `len` was held against a limit.
    pub fn take(&self, len: usize) -> Result<Buffer> {
        let none = |s: &mut State| s.free.is_empty() && !s.is_closed;
        let waited = self.0.has_free.wait_while(self.0.lock(), none);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let bytes = state.free.pop().filter(|_| !state.is_closed).ok_or(Error::Ended)?;
        drop(state);
        let mut buffer = Buffer { bytes, start: 0, len, home: self.0.clone() };
        // It only ever grows: its bytes are not cleared for every record.
        let room = on_page(&mut buffer.bytes, len.saturating_add(SHIFT)).as_ptr().addr();
        buffer.start = room.saturating_sub(buffer.bytes.as_ptr().addr()).saturating_add(SHIFT);
        Ok(buffer)
    }

    /// Makes everybody who waits fail.
    pub fn close(&self) {
        self.0.lock().is_closed = true;
        self.0.has_free.notify_all();
    }
}

/// A buffer that goes home when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    /// Where the body begins.
    start: usize,
    len: usize,
    home: Arc<Shared>,
}

impl Buffer {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(self.start..self.start.saturating_add(self.len)).unwrap_or_default()
    }

    /// Its bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let range = self.start..self.start.saturating_add(self.len);
        self.bytes.get_mut(range).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.home.lock().free.push(std::mem::take(&mut self.bytes));
        self.home.has_free.notify_one();
    }
}

/// A record that has arrived, checksums right, inflated.
#[derive(Debug)]
pub struct Arrival {
    /// What stood before it; not compressed any more.
    pub header: Header,
    /// Which connection it came on: 0 is main.
    pub channel: u16,
    /// Where its body stands in that connection's stream.
    pub offset: u64,
    /// Body and what follows it.
    pub(super) body: Buffer,
}

impl Arrival {
    /// The record, borrowed.
    pub fn record(&self) -> Record<'_> {
        let body = self.body.bytes().get(..self.header.body_len).unwrap_or_default();
        Record { header: self.header, body, offset: self.offset }
    }

    /// An error about this record: well formed, and senseless.
    pub fn protocol(&self, reason: impl Into<String>) -> Error {
        Error::protocol(self.channel, self.offset, reason)
    }

    /// An error about this record's bytes.
    pub fn malformed(&self, source: format_spec::Malformed) -> Error {
        Error::Malformed { channel: self.channel, source }
    }
}
