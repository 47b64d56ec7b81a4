//! Connections in this process, with faults.

use std::sync::atomic::{AtomicU64, Ordering};

use format_spec::native::answer::ACK;

use super::*;

/// What happens to the bytes of one direction of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) connection: usize,
    pub(super) from_source: bool,
    pub(super) at: u64,
    pub(super) is_flip: bool,
}

/// The destination's acknowledgements, one of which may be cut off.
#[derive(Default)]
pub(super) struct Acks {
    /// How many were to be said.
    pub(super) said: AtomicU64,
    /// In place of which one the connection ends, if so: what was sent before it has all arrived.
    pub(super) cut_at: Option<u64>,
}

impl Acks {
    /// Whether the connection ends where this is to be written.
    fn cuts(&self, bytes: &[u8]) -> bool {
        let is_ack = bytes.get(4..6) == Some(&ACK.to_be_bytes());
        is_ack && Some(self.said.fetch_add(1, Ordering::Relaxed) + 1) == self.cut_at
    }
}

/// Connections in this process.
pub(super) struct Net {
    pub(super) state: Mutex<NetState>,
    pub(super) changed: Condvar,
    pub(super) nature: Nature,
    pub(super) fault: Option<Fault>,
    pub(super) acks: Arc<Acks>,
    pub(super) patience: Duration,
}

#[derive(Default)]
pub(super) struct NetState {
    pub(super) dialled: usize,
    pub(super) waiting: VecDeque<Connection>,
    pub(super) is_closed: bool,
}

impl Net {
    pub(super) fn new(fault: Option<Fault>) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            nature: Nature { is_one_way: false, max_connections: 8 },
            fault,
            acks: Arc::default(),
            patience: Duration::from_secs(20),
        }
    }

    /// One end of a socket, with the fault of its direction.
    pub(super) fn end(
        &self,
        stream: &UnixStream,
        connection: usize,
        is_source: bool,
    ) -> Connection {
        stream.set_read_timeout(Some(self.patience)).unwrap();
        stream.set_write_timeout(Some(self.patience)).unwrap();
        let is_ours = |f: &Fault| f.connection == connection && f.from_source == is_source;
        let tap = Tap {
            stream: stream.try_clone().unwrap(),
            passed: 0,
            fault: self.fault.filter(is_ours),
            acks: (connection == 0 && !is_source).then(|| self.acks.clone()),
        };
        Connection {
            reader: Box::new(stream.try_clone().unwrap()),
            writer: Box::new(tap),
            line: Arc::new(stream.try_clone().unwrap()),
            peer: format!("connection {connection}"),
        }
    }

    /// A connection whose other end is ours to abuse.
    pub(super) fn stranger(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut state = self.state.lock().unwrap();
        let connection = self.end(&theirs, 99, false);
        state.waiting.push_back(connection);
        self.changed.notify_all();
        ours
    }
}

impl Dial for Net {
    fn nature(&self) -> Nature {
        self.nature
    }

    fn dial(&self) -> io::Result<Connection> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut state = self.state.lock().unwrap();
        let connection = state.dialled;
        state.dialled += 1;
        state.waiting.push_back(self.end(&theirs, connection, false));
        self.changed.notify_all();
        Ok(self.end(&ours, connection, true))
    }
}

impl Listen for Net {
    fn nature(&self) -> Nature {
        self.nature
    }

    fn accept(&self, limit: Option<Duration>) -> io::Result<Connection> {
        let idle = |s: &mut NetState| s.waiting.is_empty() && !s.is_closed;
        let limit = limit.unwrap_or(self.patience);
        let state = self.state.lock().unwrap();
        let mut state = self.changed.wait_timeout_while(state, limit, idle).unwrap().0;
        match state.waiting.pop_front() {
            Some(connection) => Ok(connection),
            None if state.is_closed => Err(io::Error::other("closed")),
            None => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn close(&self) {
        self.state.lock().unwrap().is_closed = true;
        self.changed.notify_all();
    }
}

/// A writer that cuts its connection, or flips a bit, behind a number of bytes.
struct Tap {
    stream: UnixStream,
    passed: u64,
    fault: Option<Fault>,
    acks: Option<Arc<Acks>>,
}

impl Write for Tap {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.acks.as_ref().is_some_and(|acks| acks.cuts(bytes)) {
            self.stream.shutdown(std::net::Shutdown::Both)?;
        }
        let Some(fault) = self.fault else { return self.stream.write(bytes) };
        let before = usize::try_from(fault.at - self.passed.min(fault.at)).unwrap();
        let mut bytes = bytes.to_vec();
        if self.passed <= fault.at && before < bytes.len() {
            if fault.is_flip {
                bytes[before] ^= 0x10;
            } else if before == 0 {
                self.stream.shutdown(std::net::Shutdown::Both)?;
            } else {
                bytes.truncate(before);
            }
        }
        let len = self.stream.write(&bytes)?;
        self.passed += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
