//! How a source that waits for the outcome takes its leave.
//!
//! A QEMU with a return path closes only when it has read SHUT, or when it has failed or was
//! cancelled and goes on with its guest: then what was stored of its bitmaps is stale. There is no
//! answer to SHUT. That it closes in order is all there is to know; one that is cancelled between
//! reading SHUT and closing cannot be told from one that has completed.

use std::io::{self, Read, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Instant;

use format_spec::Writer;
use format_spec::qemu::reply::Reply;
use mig_core::transport::HangUp;

use super::super::error::{Error, Result};
use super::limits::{LINGER, LOOK_INTERVAL, SETTLE};
use crate::Observer;

/// What became of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parting {
    /// It has completed, or never waited to hear of it.
    Done,
    /// It was told, and did not end the connection.
    Unknown,
}

/// The connection of a source whose stream is complete.
pub(super) struct Leave<'c> {
    writer: &'c mut dyn Write,
    line: &'c dyn HangUp,
    /// How its direction ended; `None` where the source does not wait.
    heard: Option<Receiver<io::Result<()>>>,
}

/// Calls `body` with the connection of a source, whose direction is listened to meanwhile if it
/// `awaits` the outcome. Then the connection is over.
pub(super) fn with_leave<'c, T>(
    reader: impl Read + Send,
    (writer, line): (&'c mut dyn Write, &'c dyn HangUp),
    awaits: bool,
    body: impl FnOnce(&mut Leave<'c>) -> T,
) -> T {
    if !awaits {
        return body(&mut Leave { writer, line, heard: None });
    }
    let (tell, heard) = mpsc::channel();
    std::thread::scope(|scope| {
        let _ended = HangsUp(line);
        // Nobody listens any more where the outcome was clear before.
        scope.spawn(move || drop(tell.send(read_to_end(reader))));
        body(&mut Leave { writer, line, heard: Some(heard) })
    })
}

impl Leave<'_> {
    /// Fails where the source has left before it was told.
    pub(super) fn is_there(&self) -> Result<()> {
        match self.heard.as_ref().map(Receiver::try_recv) {
            Some(Ok(end)) => Err(gone(end.err())),
            Some(Err(_)) | None => Ok(()),
        }
    }

    /// The last answer of the return path. Where all went well, waits until the source has taken
    /// note of it.
    pub(super) fn tell(&mut self, is_good: bool, observer: &dyn Observer) -> Result<Parting> {
        if self.heard.is_none() {
            return Ok(Parting::Done);
        }
        let mut out = Writer::new();
        Reply::Shut(u32::from(!is_good)).encode(&mut out);
        let told = self.writer.write_all(&out.into_bytes()).and_then(|()| self.writer.flush());
        told.map_err(|error| gone(Some(error)))?;
        if is_good { self.wait(observer) } else { Ok(Parting::Done) }
    }

    fn wait(&self, observer: &dyn Observer) -> Result<Parting> {
        let Some(heard) = &self.heard else { return Ok(Parting::Done) };
        let end = Instant::now() + LINGER;
        loop {
            let heard = heard.recv_timeout(LOOK_INTERVAL);
            if observer.is_cancelled() {
                return Err(Error::Interrupted);
            }
            match heard {
                Ok(Ok(())) => break,
                Ok(Err(error)) => return Err(gone(Some(error))),
                Err(RecvTimeoutError::Disconnected) => return Ok(Parting::Unknown),
                Err(RecvTimeoutError::Timeout) if Instant::now() >= end => {
                    return Ok(Parting::Unknown);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        // Who closes with an answer unread resets the connection, which shows a little later.
        std::thread::sleep(SETTLE);
        self.line.fault().map_or(Ok(Parting::Done), |fault| Err(gone(Some(fault))))
    }
}

fn gone(source: Option<io::Error>) -> Error {
    let closed = || io::Error::new(io::ErrorKind::UnexpectedEof, "the source closed it");
    Error::Left { source: source.unwrap_or_else(closed) }
}

fn read_to_end(mut reader: impl Read) -> io::Result<()> {
    let mut dropped = [0; 4096];
    loop {
        match reader.read(&mut dropped) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // It is waited for by whoever listens, and not by the transport.
            Err(error) if is_idle(error.kind()) => {}
            Err(error) => return Err(error),
        }
    }
}

fn is_idle(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::Interrupted | io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}

/// Ends the waiting of whoever listens, after a panic too.
struct HangsUp<'c>(&'c dyn HangUp);

impl Drop for HangsUp<'_> {
    fn drop(&mut self) {
        self.0.hang_up();
    }
}
