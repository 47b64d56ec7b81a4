//! The second process.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bitferry::receive::receive_image;
use bitferry::{Error, Result};
use mig_core::transport::{Connection, Single};

/// How long either side waits for the other before it gives up. Making an image durable on a slow
/// disk is the longest silence.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tells this program that it is the second process, and where the image goes. Not an option:
/// nobody should meet it in a completion.
const TARGET: &str = "BITFERRY_DEMO_DESTINATION";

/// A running second process; killed if it is dropped.
#[derive(Debug)]
pub(super) struct Destination {
    child: Child,
    socket: UnixStream,
}

impl Destination {
    /// Starts this program again, to receive into `target`.
    pub(super) fn start(target: &Path) -> Result<Self> {
        let program = std::env::current_exe().map_err(failed("find", "this program"))?;
        let (ours, theirs) = UnixStream::pair().map_err(failed("make", "a socket pair"))?;
        set_patience(&ours)?;
        set_patience(&theirs)?;
        let child = Command::new(program)
            .arg("demo")
            .env(TARGET, target)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .map_err(failed("start", "a second process"))?;
        Ok(Self { child, socket: ours })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The connection.
    pub(super) fn connection(&self) -> Result<Single> {
        let socket = self.socket.try_clone();
        let connection = socket.and_then(|s| Connection::from_unix(s, "the second process"));
        connection.map(Single::new).map_err(failed("duplicate", "the connection"))
    }

    /// Waits for the process, once the transfer has ended as `sent` says.
    pub(super) fn end<T>(mut self, sent: Result<T>) -> Result<T> {
        let sent = sent?;
        let status = self.child.wait().map_err(failed("wait for", "the second process"))?;
        if status.success() {
            return Ok(sent);
        }
        let source = io::Error::other(format!("it ended with {status}"));
        Err(failed("trust", "the second process")(source))
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        // It has ended already, or must not outlive the demo.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where to receive, if this is the second process.
pub(super) fn asked_for() -> Option<PathBuf> {
    std::env::var_os(TARGET).map(PathBuf::from)
}

/// What the second process does.
pub(super) fn be(target: &Path) -> super::Outcome {
    let fd = io::stdin().as_fd().try_clone_to_owned();
    let socket = UnixStream::from(fd.map_err(failed("take", "standard input"))?);
    let connection = Connection::from_unix(socket, "the first process");
    let connection = connection.map_err(failed("set up", "the connection"))?;
    receive_image(&Single::new(connection), target)?;
    Ok(0)
}

fn set_patience(socket: &UnixStream) -> Result<()> {
    let set = socket
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| socket.set_write_timeout(Some(PATIENCE)));
    set.map_err(failed("set up", "the connection"))
}

fn failed(action: &'static str, what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::File { action, path: what.into(), source }
}
