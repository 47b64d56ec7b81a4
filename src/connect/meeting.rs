//! Further connections over ssh: each comes through an ssh of its own, at whose other end a process
//! hands its input and output over to the one that has the first connection, and waits. They meet
//! at a name in the abstract namespace, which leaves nothing behind when a process is killed; only
//! processes of the same user meet.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mig_core::transport::{Connection, Dial, Listen, Nature};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Uid, geteuid};

use super::Options;
use super::descriptor::pair;
use super::error::{Error, Result};
use super::held::Held;
use super::limits::{INTRODUCTION, MAX_CONNECTIONS};
use super::line::system;
use super::once::Once;

/// How often a waiting thread looks whether it is over.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The first connection, and where the others come to.
pub(super) struct Meeting {
    first: Once,
    /// Whether the first connection was asked for.
    has_begun: AtomicBool,
    is_closed: AtomicBool,
    name: String,
    listener: UnixListener,
    options: Options,
}

impl Meeting {
    /// Waits at `name` from now on.
    pub(super) fn new(first: Once, name: &str, options: &Options) -> Result<Self> {
        let failed = |source| Error::Listen { uri: name.to_owned(), source };
        let listener = address(name).and_then(|at| UnixListener::bind_addr(&at)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            first,
            has_begun: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
            name: name.to_owned(),
            listener,
            options: options.clone(),
        })
    }

    /// The next one that comes.
    fn further(&self, limit: Option<Duration>) -> io::Result<Connection> {
        let begun = Instant::now();
        loop {
            if self.is_closed.load(Ordering::Acquire) {
                return Err(Error::Closed { uri: self.name.clone() }.into());
            }
            match self.listener.accept() {
                Ok((stream, _)) => match self.take_over(stream) {
                    Ok(connection) => return Ok(connection),
                    Err(error) => self.options.refused.tell(&error),
                },
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let left = limit.map(|limit| limit.saturating_sub(begun.elapsed()));
                    if left.is_some_and(|left| left.is_zero()) {
                        let seconds = limit.unwrap_or_default().as_secs();
                        return Err(Error::NobodyCame { uri: self.name.clone(), seconds }.into());
                    }
                    self.wait(left.unwrap_or(LOOK_INTERVAL).min(LOOK_INTERVAL))?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn wait(&self, limit: Duration) -> io::Result<()> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        let mut fds = [PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// What a process hands over, as a connection; the process lives until it is dropped.
    fn take_over(&self, stream: UnixStream) -> Result<Connection> {
        let peer = "a further ssh".to_owned();
        let stranger = |what| Error::NoIntroduction { peer: peer.clone(), what };
        if owner(&stream)? != geteuid() {
            return Err(stranger("is another user's"));
        }
        let timeout = stream.set_read_timeout(Some(INTRODUCTION));
        let received = timeout.and_then(|()| stream.set_nonblocking(false));
        let handed = received.and_then(|()| receive(&stream)).map_err(|e| system("wait for", e))?;
        let [stdin, stdout] =
            <[OwnedFd; 2]>::try_from(handed).map_err(|_| stranger("hands nothing over"))?;
        let mut connection = pair((stdin, stdout), peer, &self.options)?;
        // That process waits until both directions are dropped.
        let stream = Arc::new(stream);
        connection.reader = Box::new(Held { end: connection.reader, _with: stream.clone() });
        connection.writer = Box::new(Held { end: connection.writer, _with: stream });
        Ok(connection)
    }
}

impl Dial for Meeting {
    fn nature(&self) -> Nature {
        Nature { max_connections: MAX_CONNECTIONS, ..Dial::nature(&self.first) }
    }

    fn dial(&self) -> io::Result<Connection> {
        if self.has_begun.swap(true, Ordering::AcqRel) {
            return self.further(Some(self.options.connect));
        }
        self.first.dial()
    }
}

impl Listen for Meeting {
    fn nature(&self) -> Nature {
        Dial::nature(self)
    }

    fn has_strangers(&self) -> bool {
        false
    }

    fn accept(&self, limit: Option<Duration>) -> io::Result<Connection> {
        if self.has_begun.swap(true, Ordering::AcqRel) {
            return self.further(limit);
        }
        self.first.accept(limit)
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.first.close();
    }
}

/// Hands standard input and output over to the process that waits at `name`, or will soon, and
/// returns when that one is through with them, or has ended.
pub fn meet(name: &str) -> Result<()> {
    let failed = |source| Error::Connect { peer: name.to_owned(), source };
    let address = address(name).map_err(failed)?;
    let begun = Instant::now();
    let mut stream = loop {
        match UnixStream::connect_addr(&address) {
            Ok(stream) => break stream,
            // It was started at the same time.
            Err(e)
                if e.kind() == io::ErrorKind::ConnectionRefused
                    && begun.elapsed() < INTRODUCTION =>
            {
                std::thread::sleep(LOOK_INTERVAL);
            }
            Err(error) => return Err(failed(error)),
        }
    };
    // Whoever took the name after its owner had ended gets nothing.
    if owner(&stream)? != geteuid() {
        let what = "is another user's";
        return Err(Error::NoIntroduction { peer: name.to_owned(), what });
    }
    send(&stream).map_err(failed)?;
    // Nothing comes but the end.
    io::copy(&mut stream, &mut io::sink()).map(drop).map_err(failed)
}

/// The user at the other end.
fn owner(stream: &UnixStream) -> Result<Uid> {
    let failed = |errno: rustix::io::Errno| system("look at who connects", errno);
    Ok(socket_peercred(stream).map_err(failed)?.uid)
}

fn address(name: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(name)
}

fn send(stream: &UnixStream) -> io::Result<()> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let fds = [stdin.as_fd(), stdout.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    sendmsg(stream, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(stream: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut handed = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            handed.extend(fds);
        }
    }
    Ok(handed)
}
