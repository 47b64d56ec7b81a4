//! The socket and its connections.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::commands::{self, Controlled};
use super::{MAX_CONNECTIONS, MAX_LINE};

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 8;
/// How often an idle thread looks whether it is to stop.
const TICK: Duration = Duration::from_millis(50);
/// How long a client may leave an answer unread.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// Answers commands on a UNIX socket until it is dropped; then the socket's name is removed.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    is_stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens at `path`, for this user alone. What is left of a server that died is replaced;
    /// anything else that has that name is an error.
    pub fn start(path: &Path, controlled: Arc<dyn Controlled>) -> io::Result<Self> {
        let listener = bind(path)?;
        listener.set_nonblocking(true)?;
        let is_stopped = Arc::new(AtomicBool::new(false));
        let stop = is_stopped.clone();
        let work = move || accept(&listener, &controlled, &stop);
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(work)?;
        Ok(Self { path: path.to_owned(), is_stopped, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_stopped.store(true, Ordering::Release);
        // Nobody is left to tell that it went wrong.
        let _ = std::fs::remove_file(&self.path);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    match bind_private(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            let is_dead = || {
                let answer = UnixStream::connect(path);
                answer.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
            };
            if !is_socket || !is_dead() {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            bind_private(path)
        }
        bound => bound,
    }
}

/// Nobody can connect before the socket is this user's alone: it does not listen until then.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn accept(listener: &UnixListener, controlled: &Arc<dyn Controlled>, stop: &Arc<AtomicBool>) {
    let open = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        while !stop.load(Ordering::Acquire) {
            let Ok((stream, _)) = listener.accept() else {
                std::thread::sleep(TICK);
                continue;
            };
            if open.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
                open.fetch_sub(1, Ordering::AcqRel);
                let _ = refuse(stream);
                continue;
            }
            let open = &open;
            scope.spawn(move || {
                // A client that went away is not our failure.
                let _ = serve(stream, &**controlled, stop);
                open.fetch_sub(1, Ordering::AcqRel);
            });
        }
    });
}

fn refuse(mut stream: UnixStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(TICK))?;
    stream.write_all(format!("{}\r\n", commands::too_many()).as_bytes())
}

/// Answers lines until the client closes, or sends one that is too long.
fn serve(mut stream: UnixStream, controlled: &dyn Controlled, stop: &AtomicBool) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(WRITE_LIMIT))?;
    let mut pending = Vec::new();
    let mut buf = [0; 4096];
    // Looked at each time: a client that never rests must not keep the process from ending.
    while !stop.load(Ordering::Acquire) {
        let len = match stream.read(&mut buf) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(error) if is_tick(&error) => continue,
            Err(error) => return Err(error),
        };
        pending.extend_from_slice(buf.get(..len).unwrap_or_default());
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            if !line.trim_ascii().is_empty() {
                let answer = commands::answer(&line, controlled);
                stream.write_all(format!("{answer}\r\n").as_bytes())?;
            }
        }
        if pending.len() > MAX_LINE {
            return stream.write_all(format!("{}\r\n", commands::too_long()).as_bytes());
        }
    }
    Ok(())
}

fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
