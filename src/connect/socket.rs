//! Connecting over TCP and Unix sockets.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mig_core::transport::{Connection, Dial, Nature};
use rustls::ClientConfig;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::time::timeout;

use super::error::{Error, Result};
use super::limits::{KEEPALIVE, MAX_CONNECTIONS};
use super::line::system;
use super::{Options, control, tls};

/// Who is at the other end.
#[derive(Debug, Clone)]
pub(super) enum Place {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// Makes connections to one place.
pub(super) struct SocketDialer {
    place: Place,
    /// How the peer proves itself, and its name.
    tls: Option<(Arc<ClientConfig>, String)>,
    idle: Duration,
    limit: Duration,
}

impl SocketDialer {
    pub(super) fn new(place: Place, options: &Options) -> Result<Self> {
        let host = match &place {
            Place::Tcp { host, .. } => Some(host.as_str()),
            Place::Unix(_) => None,
        };
        let tls = client(options, host, &place.to_string())?;
        Ok(Self { place, tls, idle: options.idle, limit: options.connect })
    }

    async fn connect(&self) -> Result<(OwnedFd, String)> {
        match &self.place {
            Place::Tcp { host, port } => tcp(host, *port, self.limit, self.idle).await,
            Place::Unix(path) => {
                let peer = self.place.to_string();
                let stream = UnixStream::connect(path).await.and_then(UnixStream::into_std);
                let stream = stream.map_err(|source| Error::Connect { peer: peer.clone(), source });
                Ok((stream?.into(), peer))
            }
        }
    }
}

/// What TLS needs to connect to `place`.
pub(super) fn client(
    options: &Options,
    host: Option<&str>,
    place: &str,
) -> Result<Option<(Arc<ClientConfig>, String)>> {
    let Some(tls) = &options.tls else { return Ok(None) };
    let name = tls.name(host).ok_or_else(|| Error::Usage {
        uri: place.to_owned(),
        reason: "says no name that the peer's certificate must have: use --tls-peer",
    })?;
    Ok(Some((tls.client()?, name.to_owned())))
}

impl Dial for SocketDialer {
    fn nature(&self) -> Nature {
        Nature { is_one_way: false, max_connections: MAX_CONNECTIONS }
    }

    fn dial(&self) -> io::Result<Connection> {
        let connect = async {
            let (socket, peer) = self.connect().await?;
            let (socket, session) = encrypt(self.tls.as_ref(), socket, &peer, self.limit).await?;
            Ok(control::connection((socket, session), peer, self.idle))
        };
        let late = || Error::Connect {
            peer: self.place.to_string(),
            source: io::ErrorKind::TimedOut.into(),
        };
        Ok(control::run(connect, self.limit, late)?)
    }
}

/// A connected socket as it shall be used.
pub(super) async fn encrypt(
    tls: Option<&(Arc<ClientConfig>, String)>,
    socket: OwnedFd,
    peer: &str,
    limit: Duration,
) -> Result<(OwnedFd, Option<rustls::Connection>)> {
    let Some((config, name)) = tls else { return Ok((socket, None)) };
    let made = tls::connect(Arc::clone(config), socket, (peer, name), limit).await;
    made.map(|(socket, session)| (socket, Some(session)))
}

/// Tries all addresses of a name in turn; each gets its share of the time that is left.
async fn tcp(host: &str, port: u16, limit: Duration, idle: Duration) -> Result<(OwnedFd, String)> {
    let end = Instant::now() + limit;
    let found = lookup_host((host, port)).await;
    let no_address = |source| Error::Resolve { host: host.to_owned(), source };
    let addresses: Vec<SocketAddr> = found.map_err(no_address)?.collect();
    let mut failed = no_address(io::ErrorKind::NotFound.into());
    let mut tries = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    for address in addresses {
        let share = end.saturating_duration_since(Instant::now()) / tries.max(1);
        tries = tries.saturating_sub(1);
        let connected = timeout(share, TcpStream::connect(address)).await;
        match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => {
                let stream = stream.into_std().map_err(|e| system("set up a socket", e))?;
                tune(&stream, idle)?;
                return Ok((stream.into(), format!("tcp:{address}")));
            }
            Err(source) => {
                tracing::debug!(%address, %source, "no connection");
                failed = Error::Connect { peer: peer_name(host, address), source };
            }
        }
    }
    Err(failed)
}

/// `tcp:HOST:PORT`, with the address where HOST is a name.
fn peer_name(host: &str, address: SocketAddr) -> String {
    if host.parse::<std::net::IpAddr>().is_ok() {
        return format!("tcp:{address}");
    }
    format!("tcp:{host}:{} ({})", address.port(), address.ip())
}

/// What every TCP connection has: no waiting for more to send, and an end when the peer is gone.
pub(super) fn tune(socket: &impl AsFd, idle: Duration) -> Result<()> {
    let socket = SockRef::from(socket);
    let (silence, interval) = KEEPALIVE;
    let keepalive = TcpKeepalive::new().with_time(silence).with_interval(interval);
    socket
        .set_tcp_nodelay(true)
        .and_then(|()| socket.set_tcp_keepalive(&keepalive))
        .and_then(|()| socket.set_tcp_user_timeout(Some(idle.min(MAX_USER_TIMEOUT))))
        .map_err(|e| system("set up a socket", e))
}

/// The kernel counts milliseconds in 31 bits.
const MAX_USER_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let uri = match self.clone() {
            Self::Tcp { host, port } => super::Uri::Tcp { host, port },
            Self::Unix(path) => super::Uri::Unix(path),
        };
        uri.fmt(f)
    }
}
