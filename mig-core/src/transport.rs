//! Connected byte streams, whatever carries them: sockets, TLS, pipes, files.
//!
//! The engine sees only this. How a stream comes about (addresses, certificates, child processes)
//! belongs to whoever implements [`Dial`] and [`Listen`].

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A connected byte stream. Both directions may be used at the same time from different threads.
///
/// A read or write that moves no byte for as long as the transport's idle limit fails with
/// [`io::ErrorKind::TimedOut`]; one that [`HangUp::hang_up`] interrupts fails at once.
pub struct Connection {
    /// What the peer sends. Of a one-way stream that is written: always at its end.
    pub reader: Box<dyn Read + Send>,
    /// What goes to the peer. Supports vectored writes where the transport does. Of a one-way
    /// stream that is read: every write fails.
    pub writer: Box<dyn Write + Send>,
    /// Ends both directions from any thread.
    pub line: Arc<dyn HangUp>,
    /// Who is at the other end, for messages: an address, a path, a command.
    pub peer: String,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// The way to end a connection from outside.
pub trait HangUp: Send + Sync {
    /// Ends both directions. Whoever waits in a read or write is woken with an error or the end of
    /// the stream. Idempotent.
    fn hang_up(&self);

    /// Why the transport failed, where it says so outside of reads and writes: a socket that was
    /// reset after the peer had closed it, which tells that it had not read all that was sent.
    /// Asking may clear it.
    fn fault(&self) -> Option<io::Error> {
        None
    }
}

/// What a transport can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nature {
    /// Whether nothing comes back: a file, a pipe in one direction.
    pub is_one_way: bool,
    /// Most connections to the same peer: 1 for pipes and files.
    pub max_connections: u16,
}

/// Makes connections to one destination.
pub trait Dial: Send + Sync {
    /// What the transport can carry.
    fn nature(&self) -> Nature;

    /// Makes one more connection, in bounded time.
    fn dial(&self) -> io::Result<Connection>;
}

/// Accepts connections at one place.
pub trait Listen: Send + Sync {
    /// What the transport can carry.
    fn nature(&self) -> Nature;

    /// Whether anybody may connect, so that who turns out to be somebody else is turned away and
    /// another one waited for. Where not, who comes was asked for, and comes in its own time.
    fn has_strangers(&self) -> bool {
        self.nature().max_connections > 1
    }

    /// Waits for one more connection. `None` as a limit waits until one comes or the listener is
    /// closed. Fails with [`io::ErrorKind::TimedOut`] when the limit is over.
    fn accept(&self, limit: Option<Duration>) -> io::Result<Connection>;

    /// Takes back a connection that is not for now: the next [`accept`](Listen::accept) answers it.
    /// Where that cannot be, it is hung up.
    fn put_back(&self, connection: Connection) {
        connection.line.hang_up();
    }

    /// Makes a waiting [`accept`](Listen::accept) and all later ones fail.
    fn close(&self);
}

/// One connection that is made already, as a place to dial or to listen at.
#[derive(Debug)]
pub struct Single {
    connection: Mutex<Option<Connection>>,
    nature: Nature,
}

impl Single {
    /// A connection in both directions.
    pub fn new(connection: Connection) -> Self {
        Self::with_nature(connection, Nature { is_one_way: false, max_connections: 1 })
    }

    /// A connection of some nature.
    pub fn with_nature(connection: Connection, nature: Nature) -> Self {
        Self { connection: Mutex::new(Some(connection)), nature }
    }

    fn take(&self) -> io::Result<Connection> {
        let taken = self.connection.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.ok_or_else(|| io::Error::other("there is only one connection"))
    }
}

impl Dial for Single {
    fn nature(&self) -> Nature {
        self.nature
    }

    fn dial(&self) -> io::Result<Connection> {
        self.take()
    }
}

impl Listen for Single {
    fn nature(&self) -> Nature {
        self.nature
    }

    fn accept(&self, _limit: Option<Duration>) -> io::Result<Connection> {
        self.take()
    }

    fn close(&self) {}
}

impl HangUp for UnixStream {
    fn hang_up(&self) {
        // It may have ended already.
        let _ = self.shutdown(Shutdown::Both);
    }

    fn fault(&self) -> Option<io::Error> {
        self.take_error().ok().flatten()
    }
}

impl Connection {
    /// A local socket. Its time limits are the caller's to set.
    pub fn from_unix(stream: UnixStream, peer: &str) -> io::Result<Self> {
        Ok(Self {
            reader: Box::new(stream.try_clone()?),
            writer: Box::new(stream.try_clone()?),
            line: Arc::new(stream),
            peer: peer.to_owned(),
        })
    }
}
