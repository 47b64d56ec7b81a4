//! `fd:N` and `-`: streams that somebody else has made.

use std::io::{self, IsTerminal as _};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use mig_core::transport::{Connection, HangUp};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::net::sockopt::socket_acceptconn;

use super::error::{Error, Result};
use super::line::{Ends, Line, LineReader, LineWriter, NoWriter, Way, system};
use super::socket::encrypt;
use super::{Options, control, inherited, tls};

/// What a descriptor can be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Socket,
    /// A pipe, a file or a terminal, for reading, for writing or, a terminal, for both.
    Plain {
        is_pipe: bool,
        reads: bool,
        writes: bool,
    },
}

/// A descriptor of ours with what it can be used for.
pub(super) struct Descriptor {
    number: i32,
    fd: OwnedFd,
    pub(super) shape: Shape,
}

impl Descriptor {
    /// Takes over what this process was started with.
    pub(super) fn inherited(number: i32) -> Result<Self> {
        let fd = inherited::take(number)?;
        let shape = shape(&fd)?;
        if shape == Shape::Socket && socket_acceptconn(&fd).unwrap_or_default() {
            let reason = "is a listening socket: hand over a connection that was accepted, or \
                          listen with tcp: or unix:";
            return Err(Error::Descriptor { number, reason });
        }
        Ok(Self { number, fd, shape })
    }

    /// Whether nothing comes back from who is dialled through it.
    pub(super) fn is_one_way(&self) -> bool {
        self.shape != Shape::Socket
    }

    /// To the destination.
    pub(super) fn dial(self, options: &Options) -> Result<Connection> {
        let peer = self.peer();
        match self.shape {
            Shape::Socket => match super::socket::client(options, None, &peer)? {
                None => Ok(control::connection((self.fd, None), peer, options.idle)),
                Some(tls) => {
                    let (limit, name) = (options.connect, peer.clone());
                    let late = || Error::Connect {
                        peer: name.clone(),
                        source: io::ErrorKind::TimedOut.into(),
                    };
                    let made = encrypt(Some(&tls), self.fd, &peer, limit);
                    let made = control::run(made, limit, late)?;
                    Ok(control::connection(made, peer, options.idle))
                }
            },
            Shape::Plain { writes: true, .. } => {
                let line = plain(self.fd, self.shape, Way::Write, options)?;
                Ok(one_way(None, Some(line), peer))
            }
            Shape::Plain { .. } => Err(self.fault("cannot be written to")),
        }
    }

    /// From the source.
    pub(super) fn accept(self, options: &Options) -> Result<Connection> {
        let peer = self.peer();
        match self.shape {
            Shape::Socket => match &options.tls {
                None => Ok(control::connection((self.fd, None), peer, options.idle)),
                Some(tls) => {
                    let (limit, config) = (options.connect, tls.server()?);
                    let late = || Error::NoIntroduction { peer: peer.clone(), what: "was slow" };
                    let made = tls::accept(config, self.fd, (&peer, tls.peer()), limit);
                    let (socket, session) = control::run(made, limit, late)?;
                    Ok(control::connection((socket, Some(session)), peer.clone(), options.idle))
                }
            },
            Shape::Plain { reads: true, .. } => {
                let line = plain(self.fd, self.shape, Way::Read, options)?;
                Ok(one_way(Some(line), None, peer))
            }
            Shape::Plain { .. } => Err(self.fault("cannot be read from")),
        }
    }

    fn peer(&self) -> String {
        format!("fd:{}", self.number)
    }

    fn fault(&self, reason: &'static str) -> Error {
        Error::Descriptor { number: self.number, reason }
    }
}

/// Standard output, to a destination that cannot answer, or with `is_two_way` answers on standard
/// input.
pub(super) fn dial_stdio(is_two_way: bool, options: &Options) -> Result<Connection> {
    if is_two_way {
        return both(options);
    }
    let stdout = own(io::stdout())?;
    if stdout.is_terminal() {
        return Err(usage("would write a migration stream to the terminal: redirect it"));
    }
    let shape = shape(&stdout)?;
    let line = plain(stdout, shape, Way::Write, options)?;
    Ok(one_way(None, Some(line), "standard output".to_owned()))
}

/// Standard input; whoever can be answered is answered on standard output.
pub(super) fn accept_stdio(options: &Options) -> Result<Connection> {
    if io::stdin().is_terminal() {
        return Err(usage("would read a migration stream from the terminal: redirect it"));
    }
    both(options)
}

/// Standard input and output.
fn both(options: &Options) -> Result<Connection> {
    pair((own(io::stdin())?, own(io::stdout())?), "standard input".to_owned(), options)
}

/// The input and the output of a process, or the socket that is both.
pub(super) fn pair(
    (stdin, stdout): (OwnedFd, OwnedFd),
    peer: String,
    options: &Options,
) -> Result<Connection> {
    let (input, output) = (shape(&stdin)?, shape(&stdout)?);
    let is_answered_elsewhere = match output {
        Shape::Socket => !is_same(&stdin, &stdout)?,
        Shape::Plain { is_pipe, .. } => is_pipe,
    };
    if input == Shape::Socket && !is_answered_elsewhere {
        return Ok(control::connection((stdin, None), peer, options.idle));
    }
    let reader = plain(stdin, input, Way::Read, options)?;
    let writer = plain(stdout, output, Way::Write, options)?;
    Ok(one_way(Some(reader), Some(writer), peer))
}

fn own(stream: impl AsFd) -> Result<OwnedFd> {
    let copy = stream.as_fd().try_clone_to_owned();
    copy.map_err(|e| system("use standard input and output", e))
}

fn usage(reason: &'static str) -> Error {
    Error::Usage { uri: "-".to_owned(), reason }
}

fn shape(fd: &OwnedFd) -> Result<Shape> {
    let failed = |e: rustix::io::Errno| system("look at a descriptor", e);
    let mode = fstat(fd).map_err(failed)?.st_mode;
    let kind = FileType::from_raw_mode(mode);
    if kind == FileType::Socket {
        return Ok(Shape::Socket);
    }
    let access = fcntl_getfl(fd).map_err(failed)? & OFlags::ACCMODE;
    Ok(Shape::Plain {
        is_pipe: kind == FileType::Fifo,
        reads: access != OFlags::WRONLY,
        writes: access != OFlags::RDONLY,
    })
}

fn is_same(a: &OwnedFd, b: &OwnedFd) -> Result<bool> {
    let id = |fd: &OwnedFd| fstat(fd).map(|s| (s.st_dev, s.st_ino));
    let failed = |e: rustix::io::Errno| system("look at a descriptor", e);
    Ok(id(a).map_err(failed)? == id(b).map_err(failed)?)
}

fn plain(fd: OwnedFd, shape: Shape, way: Way, options: &Options) -> Result<Arc<Line>> {
    match shape {
        Shape::Socket => Ok(Line::socket(fd, options.idle)),
        Shape::Plain { is_pipe: true, .. } => Line::pipe(fd, way, options.idle),
        Shape::Plain { is_pipe: false, .. } => Ok(Line::other(fd)),
    }
}

/// A connection of up to two descriptors.
pub(super) fn one_way(
    reader: Option<Arc<Line>>,
    writer: Option<Arc<Line>>,
    peer: String,
) -> Connection {
    let ends = reader.iter().chain(&writer).map(|end| Arc::clone(end) as Arc<dyn HangUp>);
    let line = Arc::new(Ends(ends.collect()));
    Connection {
        reader: match reader {
            Some(reader) => Box::new(LineReader(reader)),
            None => Box::new(io::empty()),
        },
        writer: match writer {
            Some(writer) => Box::new(LineWriter(writer)),
            None => Box::new(NoWriter(peer.clone())),
        },
        line,
        peer,
    }
}
