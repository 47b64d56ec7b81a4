//! How long a cut is waited for (`--reconnect`): the decision, and what it is made from.

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use format_spec::Blame;
use mig_core::stream::Error;
use mig_core::transport::{Connection, Dial, Listen, Nature};

/// Pause between two attempts to connect again.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Decides whether a cut is waited for. Each has the whole limit for itself; an attempt that got no
/// answer belongs to the cut before it, so that a destination that accepts and dies is given up.
#[derive(Debug)]
pub(crate) struct Patience {
    limit: Duration,
    /// Since when there is no connection.
    lost: Option<Instant>,
}

impl Patience {
    /// A limit of zero waits for nothing.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, lost: None }
    }

    /// Whether to try again after an attempt that ended like this. `was_answered`: the peer had
    /// said something. What was never connected was not cut.
    pub(crate) fn may_go_on(&mut self, error: &Error, was_answered: bool, now: Instant) -> bool {
        let may_pass = match error {
            Error::Connection { .. } | Error::Connect(_) | Error::Ended => true,
            // Of several connections one was cut, and the peer saw it first.
            Error::Peer { blame, .. } => *blame == Blame::Transport,
            _ => false,
        };
        // A destination that is busy with somebody else has not answered.
        let is_busy = matches!(error, Error::Connect(e) if e.kind() == io::ErrorKind::ResourceBusy);
        if was_answered && !is_busy {
            self.lost = Some(now);
        }
        may_pass && self.is_waiting(now)
    }

    /// The peer may have missed the last word: it is waited for from now on.
    pub(crate) fn wait_once_more(&mut self, now: Instant) -> bool {
        self.lost = Some(now);
        self.is_waiting(now)
    }

    /// Whether the peer is waited for.
    pub(crate) fn is_waiting(&self, now: Instant) -> bool {
        self.end().is_some_and(|end| now < end)
    }

    /// When it gives up, while there is no connection.
    pub(crate) fn end(&self) -> Option<Instant> {
        self.lost.and_then(|lost| lost.checked_add(self.limit))
    }
}

/// What passed over all connections to a destination.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    read: AtomicU64,
    written: AtomicU64,
    has_ended: AtomicBool,
}

impl Passed {
    /// Counts what passes over a connection.
    pub(crate) fn count(self: &Arc<Self>, connection: Connection) -> Connection {
        let Connection { reader, writer, line, peer } = connection;
        let reader = Box::new(CountedReader(reader, self.clone()));
        let writer = Box::new(CountedWriter(writer, self.clone()));
        Connection { reader, writer, line, peer }
    }

    /// Bytes that the peer said.
    pub(crate) fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Whether more was wanted than came: the peer hung up, or the link was cut.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    /// Bytes that went to the peer.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
}

/// A way to or from a peer on which is counted what passes.
pub(crate) struct Counted<'a, W: ?Sized> {
    pub(crate) way: &'a W,
    pub(crate) passed: Arc<Passed>,
}

impl Dial for Counted<'_, dyn Dial + '_> {
    fn nature(&self) -> Nature {
        self.way.nature()
    }

    fn dial(&self) -> io::Result<Connection> {
        Ok(self.passed.count(self.way.dial()?))
    }
}

impl Listen for Counted<'_, dyn Listen + '_> {
    fn nature(&self) -> Nature {
        self.way.nature()
    }

    fn has_strangers(&self) -> bool {
        self.way.has_strangers()
    }

    fn accept(&self, limit: Option<Duration>) -> io::Result<Connection> {
        Ok(self.passed.count(self.way.accept(limit)?))
    }

    fn put_back(&self, connection: Connection) {
        self.way.put_back(connection);
    }

    fn close(&self) {
        self.way.close();
    }
}

struct CountedReader(Box<dyn Read + Send>, Arc<Passed>);

impl Read for CountedReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buf);
        let len = read.as_ref().map_or(0, |len| *len);
        self.1.read.fetch_add(len as u64, Ordering::Relaxed);
        self.1.has_ended.fetch_or(len == 0 && !buf.is_empty(), Ordering::Relaxed);
        read
    }
}

struct CountedWriter(Box<dyn Write + Send>, Arc<Passed>);

impl CountedWriter {
    fn count(&self, len: usize) -> usize {
        self.1.written.fetch_add(len as u64, Ordering::Relaxed);
        len
    }
}

impl Write for CountedWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf).map(|len| self.count(len))
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(bufs).map(|len| self.count(len))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut() -> Error {
        let source = io::ErrorKind::ConnectionReset.into();
        Error::Connection { action: "write to", channel: 0, offset: 9, source }
    }

    #[test]
    fn each_cut_is_waited_for_and_nothing_else_is() {
        let second = Duration::from_secs(1);
        let now = Instant::now();
        let mut patience = Patience::new(10 * second);
        let refused = || Error::Connect(io::ErrorKind::ConnectionRefused.into());
        assert!(!patience.may_go_on(&refused(), false, now), "it was never there");
        assert!(!patience.may_go_on(&cut(), false, now), "it never answered");
        assert!(patience.may_go_on(&cut(), true, now));
        assert!(patience.may_go_on(&refused(), false, now + 9 * second));
        assert!(patience.may_go_on(&cut(), true, now + 9 * second), "another cut");
        assert!(patience.may_go_on(&cut(), false, now + 18 * second));
        assert_eq!(patience.end(), Some(now + 19 * second));
        assert!(!patience.may_go_on(&refused(), false, now + 19 * second));
        assert!(!patience.may_go_on(&Error::Interrupted, true, now));
        let said = |blame| Error::Peer { blame, text: "so".to_owned() };
        assert!(patience.may_go_on(&said(Blame::Transport), true, now));
        assert!(!patience.may_go_on(&said(Blame::Device), true, now));
        let busy = || Error::Connect(io::ErrorKind::ResourceBusy.into());
        assert!(patience.may_go_on(&busy(), true, now + 9 * second));
        assert!(!patience.may_go_on(&busy(), true, now + 10 * second), "that is no answer");
        assert!(!Patience::new(second).may_go_on(&busy(), true, now), "it was never let in");
        assert!(!Patience::new(Duration::ZERO).may_go_on(&cut(), true, now));
    }
}
