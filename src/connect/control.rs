//! Where asynchronous code runs: connecting, accepting and handshakes, all of it in bounded time.
//! Streams that are connected are blocking and know nothing of this.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use mig_core::transport::Connection;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::timeout;

use super::error::{Error, Result};
use super::line::{Line, LineReader, LineWriter, PlainReader, system};
use super::tls;

/// A runtime on the calling thread.
pub(super) fn runtime() -> Result<Runtime> {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| system("start a runtime", e))
}

/// Runs a future to its end, also where the caller's thread belongs to a runtime.
pub(super) fn run<T: Send>(
    future: impl Future<Output = Result<T>> + Send,
    limit: Duration,
    late: impl FnOnce() -> Error + Send,
) -> Result<T> {
    let work = move || {
        let runtime = runtime()?;
        let result = runtime.block_on(async { timeout(limit, future).await });
        // A resolver that does not answer is left to itself.
        runtime.shutdown_background();
        result.unwrap_or_else(|_| Err(late()))
    };
    if Handle::try_current().is_err() {
        return work();
    }
    // A runtime does not start inside another one.
    let elsewhere = thread::scope(|scope| scope.spawn(work).join());
    elsewhere.unwrap_or_else(|panic| resume_unwind(panic))
}

/// A socket that is connected and, where it is to be, encrypted.
pub(super) fn connection(
    (socket, tls): (OwnedFd, Option<rustls::Connection>),
    peer: String,
    idle: Duration,
) -> Connection {
    let line = Line::socket(socket, idle);
    match tls {
        Some(tls) => {
            let (reader, writer, line) = tls::split(tls, line, &peer);
            Connection { reader: Box::new(reader), writer: Box::new(writer), line, peer }
        }
        None => {
            let reader = PlainReader {
                line: LineReader(Arc::clone(&line)),
                peer: peer.clone(),
                has_begun: false,
            };
            let writer = Box::new(LineWriter(Arc::clone(&line)));
            Connection { reader: Box::new(reader), writer, line, peer }
        }
    }
}

/// A stream socket of whatever family: nothing but receiving and sending is asked of it.
pub(super) fn stream(socket: OwnedFd) -> Result<UnixStream> {
    let socket = std::os::unix::net::UnixStream::from(socket);
    let set = socket.set_nonblocking(true).and_then(|()| UnixStream::from_std(socket));
    set.map_err(|e| system("set up a socket", e))
}

/// Undoes [`stream`].
pub(super) fn descriptor(io: UnixStream) -> Result<OwnedFd> {
    let socket = io.into_std().map_err(|e| system("set up a socket", e))?;
    Ok(socket.into())
}
