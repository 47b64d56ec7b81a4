//! Connected byte streams, whatever carries them: sockets, TLS, pipes, files.
//!
//! The engine sees only this. How a stream comes about (addresses, certificates, child processes)
//! belongs to whoever implements [`Dial`] and [`Listen`].

use std::io::{self, Read, Write};
use std::sync::Arc;
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

    /// Waits for one more connection. `None` as a limit waits until one comes or the listener is
    /// closed. Fails with [`io::ErrorKind::TimedOut`] when the limit is over.
    fn accept(&self, limit: Option<Duration>) -> io::Result<Connection>;

    /// Makes a waiting [`accept`](Listen::accept) and all later ones fail.
    fn close(&self);
}
