//! Places to listen at: addresses of this host, paths of Unix sockets.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

use super::Uri;
use super::error::{Error, Result};
use super::limits::BACKLOG;

/// A listening socket, and what it leaves in the file system.
pub(super) struct Bound {
    pub(super) socket: Socket,
    /// Where it really listens.
    pub(super) uri: Uri,
    _path: Option<SocketPath>,
}

/// Listens at an address of this host. An empty host means all of them; of a name's addresses the
/// first that works is taken.
pub(super) fn tcp(host: &str, port: u16) -> Result<Bound> {
    let asked = Uri::Tcp { host: host.to_owned(), port };
    let failed = |source| Error::Listen { uri: asked.to_string(), source };
    let addresses: Vec<SocketAddr> = if host.is_empty() {
        // Version 6 takes those of version 4 too, where there is version 6.
        vec![(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()]
    } else {
        let found = (host, port).to_socket_addrs();
        found.map_err(|source| Error::Resolve { host: host.to_owned(), source })?.collect()
    };
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match listen_at(address, host.is_empty()) {
            Ok((socket, port)) => {
                let uri = Uri::Tcp { host: host.to_owned(), port };
                return Ok(Bound { socket, uri, _path: None });
            }
            Err(source) => last = source,
        }
    }
    Err(failed(last))
}

fn listen_at(address: SocketAddr, is_any: bool) -> io::Result<(Socket, u16)> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if is_any && address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // A port is free again as soon as its last owner is gone.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(backlog())?;
    let bound = socket.local_addr()?.as_socket().map_or(0, |a| a.port());
    Ok((socket, bound))
}

/// Listens at a path. What a listener that is gone left there is removed; anything else stays and
/// is an error.
pub(super) fn unix(path: &Path) -> Result<Bound> {
    let uri = Uri::Unix(path.to_owned());
    let failed = |source| Error::Listen { uri: uri.to_string(), source };
    let address = SockAddr::unix(path).map_err(failed)?;
    let new = || Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed);
    let socket = new()?;
    match socket.bind(&address) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_abandoned(path, &new()?, &address) => {
            std::fs::remove_file(path).and_then(|()| socket.bind(&address)).map_err(failed)?;
        }
        bound => bound.map_err(failed)?,
    }
    let left = SocketPath::of(path).map_err(failed)?;
    socket.listen(backlog()).map_err(failed)?;
    Ok(Bound { socket, uri: Uri::Unix(path.to_owned()), _path: Some(left) })
}

fn backlog() -> i32 {
    i32::try_from(BACKLOG).unwrap_or(i32::MAX)
}

/// Whether a socket stands there that nobody listens at.
fn is_abandoned(path: &Path, probe: &Socket, address: &SockAddr) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    // Not to wait for a listener that is there and busy.
    let is_ready = probe.set_nonblocking(true).is_ok();
    is_socket && is_ready && probe.connect(address).is_err_and(refused)
}

/// The name of a socket, removed at the end unless another one stands there by then.
struct SocketPath {
    path: PathBuf,
    id: (u64, u64),
}

impl SocketPath {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), id: identity(path)? })
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()))
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|id| id == self.id)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(%error, "{} stays behind", self.path.display());
        }
    }
}
