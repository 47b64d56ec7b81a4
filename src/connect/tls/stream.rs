//! A connection after its handshake, as a blocking reader and a blocking writer.
//!
//! Both share the state of rustls under a lock, which nobody holds while waiting for the socket:
//! bytes are moved between the two without blocking, and whoever cannot go on waits outside.

use std::io::{self, IoSlice, Read, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mig_core::transport::HangUp;
use rustix::event::PollFlags;
use rustls::Connection;

use super::super::error::Error;
use super::super::limits::{GOODBYE, TLS_BATCH};
use super::super::line::Line;
use super::error::TlsError;

/// How long a writer that failed waits for a reader to find out why.
const EXPLANATION: Duration = Duration::from_millis(200);

/// A connection whose handshake is over: its two halves, and what ends it.
pub(in super::super) fn split(
    mut connection: Connection,
    line: Arc<Line>,
    peer: &str,
) -> (TlsReader, TlsWriter, Arc<dyn HangUp>) {
    connection.set_buffer_limit(Some(TLS_BATCH));
    let shared = Arc::new(Shared {
        connection: Mutex::new(connection),
        received: Mutex::new(Received { bytes: vec![0; TLS_BATCH].into(), unread: 0..0 }),
        fault: Mutex::new(None),
        line,
        peer: peer.to_owned(),
    });
    let hang_up = Arc::clone(&shared);
    (TlsReader(Arc::clone(&shared)), TlsWriter(shared), hang_up)
}

struct Shared {
    connection: Mutex<Connection>,
    /// Held by whoever reads from the socket, also while waiting.
    received: Mutex<Received>,
    /// Why the peer, or this side, ended the connection.
    fault: Mutex<Option<TlsError>>,
    line: Arc<Line>,
    peer: String,
}

/// Ciphertext that was read and not decrypted.
struct Received {
    bytes: Box<[u8]>,
    unread: Range<usize>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The socket as it is, for rustls to write to.
struct Unwaited<'a>(&'a Line);

impl Write for Unwaited<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.try_write(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    /// Sends the ciphertext there is. Whether all of it is gone.
    fn try_send(&self, connection: &mut Connection) -> io::Result<bool> {
        while connection.wants_write() {
            match connection.write_tls(&mut Unwaited(&self.line)) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// Decrypts into `buf` what has been received, as much as fits. `None`: more must come.
    fn decrypt(&self, received: &mut Received, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let mut connection = lock(&self.connection);
        let mut len = 0;
        loop {
            match connection.reader().read(buf.get_mut(len..).unwrap_or_default()) {
                Ok(0) => return Ok(Some(len)),
                Ok(more) => {
                    len += more;
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
            let Some(mut bytes) = received.bytes.get(received.unread.clone()) else { break };
            if bytes.is_empty() {
                break;
            }
            received.unread.start += connection.read_tls(&mut bytes)?;
            if let Err(error) = connection.process_new_packets() {
                // The peer is told why, if it still listens.
                let _ = self.try_send(&mut connection);
                let failed = self.fail(TlsError::of(&error, None));
                // What was decrypted before it is not lost.
                return if len > 0 { Ok(Some(len)) } else { Err(failed) };
            }
            if connection.wants_write() {
                // An answer of the protocol. What does not fit goes with the next write.
                self.try_send(&mut connection)?;
            }
        }
        Ok((len > 0).then_some(len))
    }

    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let received = &mut *lock(&self.received);
        loop {
            if let Some(fault) = lock(&self.fault).clone() {
                return Err(Error::Tls { peer: self.peer.clone(), fault }.into());
            }
            if let Some(len) = self.decrypt(received, buf)? {
                return Ok(len);
            }
            let len = self.line.read(&mut received.bytes)?;
            if len == 0 {
                // Without a goodbye. Whether the stream is complete, the layer above knows.
                return Ok(0);
            }
            received.unread = 0..len;
        }
    }

    fn send(&self) -> io::Result<()> {
        loop {
            // The lock is given back before a failure is looked into, which takes it again.
            let sent = self.try_send(&mut lock(&self.connection));
            match sent {
                Ok(true) => return Ok(()),
                Ok(false) => self.line.wait(PollFlags::OUT)?,
                Err(error) => return Err(self.explain(error)),
            }
        }
    }

    fn write(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.line.is_hung_up() {
            return Err(Error::HungUp.into());
        }
        self.send()?;
        let len = lock(&self.connection).writer().write_vectored(bufs)?;
        self.send()?;
        Ok(len)
    }

    fn fail(&self, fault: TlsError) -> io::Error {
        *lock(&self.fault) = Some(fault.clone());
        Error::Tls { peer: self.peer.clone(), fault }.into()
    }

    /// A peer that refused us has said why before it hung up, and nobody may have read it yet.
    fn explain(&self, error: io::Error) -> io::Error {
        let end = Instant::now() + EXPLANATION;
        while !self.line.is_hung_up() && Instant::now() < end {
            if let Some(fault) = lock(&self.fault).clone() {
                return Error::Tls { peer: self.peer.clone(), fault }.into();
            }
            // Where somebody reads, that one will find it.
            if let Ok(mut received) = self.received.try_lock()
                && received.unread.is_empty()
            {
                match self.line.try_read(&mut received.bytes) {
                    Ok(len) if len > 0 => received.unread = 0..len,
                    _ => return error,
                }
                let mut connection = lock(&self.connection);
                while let Some(mut bytes) = received.bytes.get(received.unread.clone())
                    && !bytes.is_empty()
                    && let Ok(len) = connection.read_tls(&mut bytes)
                {
                    received.unread.start += len;
                    if let Err(found) = connection.process_new_packets() {
                        return self.fail(TlsError::of(&found, None));
                    }
                }
                return error;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        error
    }

    /// Says goodbye, in bounded time, and ends this direction.
    fn close(&self) {
        let goodbye = || {
            lock(&self.connection).send_close_notify();
            let end = Instant::now() + GOODBYE;
            while !self.try_send(&mut lock(&self.connection))? {
                let left = end.saturating_duration_since(Instant::now());
                self.line.wait_for(PollFlags::OUT, left)?;
            }
            io::Result::Ok(())
        };
        if !self.line.is_hung_up() {
            // A peer that is gone needs none.
            let _ = goodbye();
        }
        self.line.end_writing();
    }
}

impl HangUp for Shared {
    /// Says goodbye where that needs no waiting.
    fn hang_up(&self) {
        if let Ok(mut connection) = self.connection.try_lock()
            && !self.line.is_hung_up()
        {
            connection.send_close_notify();
            // A peer that is gone needs none.
            let _ = self.try_send(&mut connection);
        }
        self.line.hang_up();
    }

    fn fault(&self) -> Option<io::Error> {
        self.line.fault()
    }
}

/// What the peer sends, decrypted.
pub(in super::super) struct TlsReader(Arc<Shared>);

impl Read for TlsReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

/// What goes to the peer, encrypted. Dropping it says goodbye.
pub(in super::super) struct TlsWriter(Arc<Shared>);

impl Write for TlsWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.send()
    }
}

impl Drop for TlsWriter {
    fn drop(&mut self) {
        self.0.close();
    }
}
