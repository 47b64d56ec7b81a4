//! Descriptors that are waited for with poll(2): a wait ends with the idle limit or a hang-up.
//!
//! A socket's own flags are never changed, since the descriptor may be shared with whoever started
//! us; a pipe is opened anew for that reason, see [`pipe`](Line::pipe).

use std::io::{self, IoSlice, Read, Write};
use std::mem;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mig_core::transport::HangUp;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, sendmsg, shutdown, sockopt,
};

use super::error::{Error, Result};

/// Slices of one vectored write, at most: IOV_MAX.
const MAX_SLICES: usize = 1024;

/// How the descriptor is read, written and woken.
#[derive(Debug)]
enum Kind {
    Socket,
    /// Does not block. The event wakes whoever waits, which only the descriptor's end would.
    Pipe {
        wake: OwnedFd,
    },
    /// A file or a terminal: it answers when it likes.
    Other,
}

/// One descriptor, used from several threads.
#[derive(Debug)]
pub(super) struct Line {
    fd: OwnedFd,
    kind: Kind,
    idle: Duration,
    is_hung_up: AtomicBool,
}

/// How a half is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Read,
    Write,
}

impl Line {
    /// A connected stream socket.
    pub(super) fn socket(fd: OwnedFd, idle: Duration) -> Arc<Self> {
        Arc::new(Self { fd, kind: Kind::Socket, idle, is_hung_up: AtomicBool::new(false) })
    }

    /// One end of a pipe. Opened anew where `/proc` lets us, so that no other holder of the
    /// descriptor finds that it does not block any more; else its own flag is set.
    pub(super) fn pipe(fd: OwnedFd, way: Way, idle: Duration) -> Result<Arc<Self>> {
        let failed = |source: Errno| system("set up a pipe", source);
        let access = if way == Way::Read { OFlags::RDONLY } else { OFlags::WRONLY };
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(own) => own,
            Err(_) => {
                let flags = rustix::fs::fcntl_getfl(&fd).map_err(failed)?;
                rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(failed)?;
                fd
            }
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        let kind = Kind::Pipe { wake };
        Ok(Arc::new(Self { fd, kind, idle, is_hung_up: AtomicBool::new(false) }))
    }

    /// A file, or something else that cannot be waited for.
    pub(super) fn other(fd: OwnedFd) -> Arc<Self> {
        let (kind, idle) = (Kind::Other, Duration::MAX);
        Arc::new(Self { fd, kind, idle, is_hung_up: AtomicBool::new(false) })
    }

    fn is_socket(&self) -> bool {
        matches!(self.kind, Kind::Socket)
    }

    /// Reads what is there, waiting for the first byte. 0 at the end.
    pub(super) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        self.wait_and(PollFlags::IN, || self.try_read(&mut *buf))
    }

    /// Writes what there is room for, waiting until there is some.
    pub(super) fn write_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        if bufs.iter().all(|b| b.is_empty()) {
            return Ok(0);
        }
        self.wait_and(PollFlags::OUT, || self.try_write(bufs))
    }

    /// Tries until it neither would block nor is interrupted.
    fn wait_and(
        &self,
        ready: PollFlags,
        mut attempt: impl FnMut() -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            let result = attempt();
            match result {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(ready)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A socket that was shut down looks like one at its end.
                _ if self.is_hung_up() => return Err(Error::HungUp.into()),
                result => return result,
            }
        }
    }

    /// Reads what is there, or would block.
    pub(super) fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let read = match self.kind {
            Kind::Socket => recv(&self.fd, &mut *buf, RecvFlags::DONTWAIT).map(|(len, _)| len),
            Kind::Pipe { .. } | Kind::Other => rustix::io::read(&self.fd, &mut *buf),
        };
        Ok(read?)
    }

    /// Writes what there is room for, or would block.
    pub(super) fn try_write(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let bufs = bufs.get(..MAX_SLICES).unwrap_or(bufs);
        let written = match self.kind {
            Kind::Socket => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                sendmsg(&self.fd, bufs, &mut SendAncillaryBuffer::default(), flags)
            }
            Kind::Pipe { .. } | Kind::Other => rustix::io::writev(&self.fd, bufs),
        };
        Ok(written?)
    }

    /// Waits until the descriptor is ready, at most for the idle limit.
    pub(super) fn wait(&self, ready: PollFlags) -> io::Result<()> {
        self.wait_for(ready, self.idle)
    }

    /// [`wait`](Self::wait) with another limit.
    pub(super) fn wait_for(&self, ready: PollFlags, limit: Duration) -> io::Result<()> {
        let end = Instant::now().checked_add(limit);
        loop {
            if self.is_hung_up() {
                return Err(Error::HungUp.into());
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let left = left.map(|left| Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            });
            let mut fds = vec_of_two(PollFd::new(&self.fd, ready), self.wake());
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Err(Error::Idle { seconds: limit.as_secs() }.into()),
                Ok(_) if self.is_hung_up() => return Err(Error::HungUp.into()),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn wake(&self) -> Option<PollFd<'_>> {
        match &self.kind {
            Kind::Pipe { wake } => Some(PollFd::new(wake, PollFlags::IN)),
            Kind::Socket | Kind::Other => None,
        }
    }

    pub(super) fn is_hung_up(&self) -> bool {
        self.is_hung_up.load(Ordering::Acquire)
    }

    /// No more will be written.
    pub(super) fn end_writing(&self) {
        if self.is_socket() {
            // A socket that is no longer connected has nobody to be told.
            let _ = shutdown(&self.fd, Shutdown::Write);
        }
    }
}

fn vec_of_two<'a>(first: PollFd<'a>, second: Option<PollFd<'a>>) -> Vec<PollFd<'a>> {
    std::iter::once(first).chain(second).collect()
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl HangUp for Line {
    fn hang_up(&self) {
        self.is_hung_up.store(true, Ordering::Release);
        match &self.kind {
            Kind::Socket => drop(shutdown(&self.fd, Shutdown::Both)),
            // The counter is full only when it says so already.
            Kind::Pipe { wake } => drop(rustix::io::write(wake, &1u64.to_ne_bytes())),
            Kind::Other => {}
        }
    }

    fn fault(&self) -> Option<io::Error> {
        let state = self.is_socket().then(|| sockopt::socket_error(&self.fd))?;
        Some(state.ok()?.err()?.into())
    }
}

/// What the peer sends.
#[derive(Debug)]
pub(super) struct LineReader(pub(super) Arc<Line>);

impl Read for LineReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

/// What goes to the peer. Dropping it tells the peer that no more comes.
#[derive(Debug)]
pub(super) struct LineWriter(pub(super) Arc<Line>);

impl Write for LineWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LineWriter {
    fn drop(&mut self) {
        self.0.end_writing();
    }
}

/// Of a stream that is only read.
#[derive(Debug)]
pub(super) struct NoWriter(pub(super) String);

impl Write for NoWriter {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(Error::OneWay { uri: self.0.clone() }.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Several ends that belong together.
pub(super) struct Ends(pub(super) Vec<Arc<dyn HangUp>>);

impl HangUp for Ends {
    fn hang_up(&self) {
        self.0.iter().for_each(|end| end.hang_up());
    }

    fn fault(&self) -> Option<io::Error> {
        self.0.iter().find_map(|end| end.fault())
    }
}

pub(super) fn system(action: &'static str, source: impl Into<io::Error>) -> Error {
    Error::System { action, source: source.into() }
}

/// Says at the first byte that the peer speaks TLS, which no dialect begins with: it is a peer
/// whose user gave other options, and its bytes would be reported as nonsense.
#[derive(Debug)]
pub(super) struct PlainReader {
    pub(super) line: LineReader,
    pub(super) peer: String,
    pub(super) has_begun: bool,
}

impl Read for PlainReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.line.read(buf)?;
        if !mem::replace(&mut self.has_begun, true) && is_tls(buf.get(..len).unwrap_or_default()) {
            return Err(Error::PeerSpeaksTls { peer: self.peer.clone() }.into());
        }
        Ok(len)
    }
}

/// Whether bytes are the head of a TLS record: an alert or a handshake, version 3.x.
fn is_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [0x15 | 0x16, 0x03, 0x00..=0x04, ..])
}
