//! Commands at the other end of two pipes: `exec:` and ssh.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::{self, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mig_core::transport::{Connection, HangUp};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::error::{End, Error, Result};
use super::limits::CHILD_LAST_WORD;
use super::line::{Ends, Line, LineReader, LineWriter, Way, system};

/// Which of a command's streams are ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pipes {
    /// Its input. Its output goes where our diagnostics go.
    Input,
    /// Both.
    Both,
}

/// The commands at the other end of connections, once there are some.
#[derive(Debug, Clone, Default)]
pub(super) struct Running(Arc<Mutex<Vec<Arc<Child>>>>);

impl Running {
    /// Starts a command, called `name` in messages, with its pipes as a connection. It takes the
    /// place of those there are.
    pub(super) fn start(
        &self,
        command: Command,
        name: String,
        pipes: Pipes,
        idle: Duration,
    ) -> Result<Connection> {
        self.lock().clear();
        self.start_another(command, name, pipes, idle)
    }

    /// As [`start`](Self::start), beside those there are.
    pub(super) fn start_another(
        &self,
        command: Command,
        name: String,
        pipes: Pipes,
        idle: Duration,
    ) -> Result<Connection> {
        let (child, connection) = Child::start(command, name, pipes, idle)?;
        self.lock().push(child);
        Ok(connection)
    }

    /// Waits until all have ended, which they have to do successfully. At once where there is none.
    pub(super) fn end(&self, limit: Duration) -> Result<()> {
        let children = std::mem::take(&mut *self.lock());
        children.iter().try_for_each(|child| child.end(limit))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Child>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A command that was started. Killed when it is dropped before it has ended.
#[derive(Debug)]
struct Child {
    name: String,
    process: Mutex<process::Child>,
    pidfd: OwnedFd,
}

impl Child {
    fn start(
        mut command: Command,
        name: String,
        pipes: Pipes,
        idle: Duration,
    ) -> Result<(Arc<Self>, Connection)> {
        command.stdin(Stdio::piped());
        command.stdout(match pipes {
            Pipes::Input => Stdio::from(io::stderr()),
            Pipes::Both => Stdio::piped(),
        });
        let failed = |source| Error::Run { command: name.clone(), source };
        let mut process = command.spawn().map_err(failed)?;
        let (stdin, stdout) = (process.stdin.take(), process.stdout.take());
        let pidfd = match pidfd_open(Pid::from_child(&process), PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(errno) => {
                kill(&mut process);
                return Err(system("watch a command", errno));
            }
        };
        let child = Arc::new(Self { name: name.clone(), process: Mutex::new(process), pidfd });
        let line =
            |end: Option<OwnedFd>, way| end.map(|end| Line::pipe(end, way, idle)).transpose();
        let reader = line(stdout.map(Into::into), Way::Read)?;
        let writer = line(stdin.map(Into::into), Way::Write)?;
        // Not the command itself: what it was given it may finish, also when nobody talks to it any
        // more. Who wants it dead drops it.
        let ends = reader.iter().chain(&writer).map(|end| Arc::clone(end) as Arc<dyn HangUp>);
        let ends = ends.collect();
        let connection = Connection {
            reader: match reader {
                Some(line) => Box::new(FromChild { pipe: LineReader(line), child: child.clone() }),
                None => Box::new(io::empty()),
            },
            writer: match writer {
                Some(line) => Box::new(ToChild { pipe: LineWriter(line), child: child.clone() }),
                None => Box::new(io::sink()),
            },
            line: Arc::new(Ends(ends)),
            peer: name,
        };
        Ok((child, connection))
    }

    fn end(&self, limit: Duration) -> Result<()> {
        match self.status(limit)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(self.ended(End::Status(status))),
            None => Err(self.ended(End::Never)),
        }
    }

    /// How it has ended; `None` where it has not within `limit`.
    fn status(&self, limit: Duration) -> Result<Option<ExitStatus>> {
        let failed = |e: io::Error| system("wait for a command", e);
        let end = Instant::now() + limit;
        loop {
            let status = self.process().try_wait().map_err(failed)?;
            let left = end.saturating_duration_since(Instant::now());
            if status.is_some() || left.is_zero() {
                return Ok(status);
            }
            let left = Timespec::try_from(left).map_err(|e| failed(io::Error::other(e)))?;
            let mut fds = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
    }

    /// An error where it has failed: its pipes are closed, so that it ends soon.
    fn last_word(&self) -> Option<Error> {
        let status = self.status(CHILD_LAST_WORD).ok()??;
        (!status.success()).then(|| self.ended(End::Status(status)))
    }

    fn ended(&self, end: End) -> Error {
        Error::Ended { command: self.name.clone(), end }
    }

    fn process(&self) -> std::sync::MutexGuard<'_, process::Child> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn kill(process: &mut process::Child) {
    // It may have ended by itself, and is reaped all the same.
    let _ = process.kill();
    let _ = process.wait();
}

impl Drop for Child {
    fn drop(&mut self) {
        kill(&mut self.process());
    }
}

/// What a command prints. Its end is an error where it failed.
struct FromChild {
    pipe: LineReader,
    child: Arc<Child>,
}

impl Read for FromChild {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.pipe.read(buf)?;
        if len == 0
            && !buf.is_empty()
            && let Some(error) = self.child.last_word()
        {
            return Err(error.into());
        }
        Ok(len)
    }
}

/// What a command reads. One that reads no more says why.
struct ToChild {
    pipe: LineWriter,
    child: Arc<Child>,
}

impl Write for ToChild {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.pipe.write_vectored(bufs).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => self.child.last_word().map_or(error, Into::into),
            _ => error,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
