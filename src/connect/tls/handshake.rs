//! The handshake of one connection, for either role, in bounded time.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, Connection, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::super::control::{descriptor, stream};
use super::super::error::{Error, Result};
use super::super::limits::FAREWELL;
use super::error::TlsError;
use super::files::server_name;

/// Connects: the peer has to prove to be `name`.
pub(in super::super) async fn connect(
    config: Arc<ClientConfig>,
    socket: OwnedFd,
    (peer, name): (&str, &str),
    limit: Duration,
) -> Result<(OwnedFd, Connection)> {
    let io = stream(socket)?;
    let handshake = tokio_rustls::TlsConnector::from(config).connect(server_name(name)?, io);
    let result = timeout(limit, handshake.into_fallible()).await;
    let (io, connection) = finish(result, peer, Some(name), limit).await?.into_inner();
    Ok((descriptor(io)?, Connection::Client(connection)))
}

/// Accepts a peer that shows a certificate; `name` is what that has to be for, as the configuration
/// has it too.
pub(in super::super) async fn accept(
    config: Arc<ServerConfig>,
    socket: OwnedFd,
    (peer, name): (&str, Option<&str>),
    limit: Duration,
) -> Result<(OwnedFd, Connection)> {
    let io = stream(socket)?;
    let handshake = tokio_rustls::TlsAcceptor::from(config).accept(io);
    let result = timeout(limit, handshake.into_fallible()).await;
    let (io, connection) = finish(result, peer, name, limit).await?.into_inner();
    Ok((descriptor(io)?, Connection::Server(connection)))
}

/// Says what a handshake came to, and lets a refused peer read why.
async fn finish<T>(
    result: Result<Result<T, (io::Error, UnixStream)>, tokio::time::error::Elapsed>,
    peer: &str,
    name: Option<&str>,
    limit: Duration,
) -> Result<T> {
    let fault = match result {
        Ok(Ok(stream)) => return Ok(stream),
        Ok(Err((error, io))) => {
            farewell(io).await;
            TlsError::of_io(&error, name)
        }
        Err(_) => TlsError::Slow { seconds: limit.as_secs() },
    };
    Err(Error::Tls { peer: peer.to_owned(), fault })
}

/// Closing a socket that holds unread bytes resets the connection, and the alert with it.
async fn farewell(mut io: UnixStream) {
    let (limit, bytes) = FAREWELL;
    let say_and_hear = async {
        // A peer that is gone needs no farewell.
        let _ = io.shutdown().await;
        let mut sink = vec![0; 4096];
        let mut heard = 0;
        while heard < bytes {
            match io.read(&mut sink).await {
                Ok(0) | Err(_) => break,
                Ok(len) => heard += len,
            }
        }
    };
    let _ = timeout(limit, say_and_hear).await;
}
