//! A transport between two threads whose connections are cut behind a number of bytes.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use mig_core::transport::{Connection, Dial, HangUp, Listen, Nature};

/// Both ends. The n-th connection that is dialled is cut at the n-th number, the last one counts
/// for all that follow.
pub(super) struct Line {
    to: Mutex<Sender<UnixStream>>,
    from: Mutex<Receiver<UnixStream>>,
    cuts: Vec<u64>,
    dialled: AtomicUsize,
}

impl Line {
    pub(super) fn new() -> Self {
        Self::cut_at(vec![u64::MAX])
    }

    pub(super) fn cut_at(cuts: Vec<u64>) -> Self {
        let (to, from) = channel();
        let (to, from) = (Mutex::new(to), Mutex::new(from));
        Self { to, from, cuts, dialled: AtomicUsize::new(0) }
    }
}

const NATURE: Nature = Nature { is_one_way: false, max_connections: 16 };

impl Dial for Line {
    fn nature(&self) -> Nature {
        NATURE
    }

    fn dial(&self) -> io::Result<Connection> {
        let (ours, theirs) = UnixStream::pair()?;
        for stream in [&ours, &theirs] {
            stream.set_read_timeout(Some(Duration::from_secs(60)))?;
            stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        }
        self.to.lock().unwrap().send(theirs).unwrap();
        let n = self.dialled.fetch_add(1, Ordering::Relaxed);
        let left = self.cuts[n.min(self.cuts.len() - 1)];
        let mut connection = Connection::from_unix(ours.try_clone()?, "the other thread")?;
        connection.writer = Box::new(Cut { stream: ours, left });
        Ok(connection)
    }
}

impl Listen for Line {
    fn nature(&self) -> Nature {
        NATURE
    }

    fn accept(&self, limit: Option<Duration>) -> io::Result<Connection> {
        let limit = limit.unwrap_or(Duration::from_secs(60));
        let stream =
            self.from.lock().unwrap().recv_timeout(limit).map_err(|error| match error {
                RecvTimeoutError::Timeout => io::ErrorKind::TimedOut.into(),
                RecvTimeoutError::Disconnected => io::Error::other("gone"),
            })?;
        Connection::from_unix(stream, "the other thread")
    }

    fn close(&self) {}
}

struct Cut {
    stream: UnixStream,
    left: u64,
}

impl Write for Cut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
        if room == 0 && !bytes.is_empty() {
            self.stream.hang_up();
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let len = self.stream.write(&bytes[..room])?;
        self.left -= len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
