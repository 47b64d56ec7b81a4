//! Connections: where a stream comes from and goes to.
//!
//! [`Uri`] and [`Location`] say where, in QEMU's and in scp's words; [`dial`] and [`listen`] make
//! of it what the engine knows as [`Dial`] and [`Listen`]. Once connected, a stream is blocking,
//! with an idle limit and a way to hang up; asynchronous code runs only until then. Nothing here
//! knows what is in the stream, but for the magic that tells a stream at rest from other files.

mod accept;
mod answer;
mod bind;
mod child;
mod control;
mod descriptor;
mod error;
mod file;
mod held;
mod inherited;
pub mod limits;
mod line;
mod location;
mod meeting;
mod once;
mod socket;
mod ssh;
mod tls;
mod uri;

use std::ffi::OsString;
use std::io;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

pub use mig_core::transport::{Connection, Dial, HangUp, Listen, Nature};

pub use self::answer::run_ssh;
pub use self::error::{End, Error, Result};
pub use self::location::{Location, LocationError, LocationFault, Remote};
pub use self::meeting::meet;
pub use self::ssh::{REMOTE, SSH};
pub use self::tls::{Tls, TlsError};
pub use self::uri::{Uri, UriError, UriFault};

use self::accept::SocketListener;
use self::child::{Pipes, Running};
use self::descriptor::Descriptor;
use self::meeting::Meeting;
use self::once::Once;
use self::socket::{Place, SocketDialer};
use self::ssh::Ssh;

/// How connections are made, and what bounds them.
#[derive(Debug, Clone)]
pub struct Options {
    /// Encrypts, with a certificate on both sides.
    pub tls: Option<Tls>,
    /// Whether `exec:` may run commands.
    pub allows_exec: bool,
    /// Whether who is dialled through `-` or `exec:` answers.
    pub is_two_way: bool,
    /// Where further connections come to when the first one is `-`; see [`meet`].
    pub meeting: Option<String>,
    /// Longest time in which a read or write moves no byte.
    pub idle: Duration,
    /// Longest time to connect, the handshake included.
    pub connect: Duration,
    /// Longest time an accepted connection may take to introduce itself.
    pub introduction: Duration,
    /// Whether a peer that has said so much, without TLS, has introduced itself. It is asked of the
    /// first [`limits::MAX_INTRODUCTION`] bytes at most.
    pub introduced: fn(&[u8]) -> bool,
    /// Who is told of connections that a listener turned away.
    pub refused: Refused,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tls: None,
            allows_exec: false,
            is_two_way: false,
            meeting: None,
            idle: limits::IDLE,
            connect: limits::CONNECT,
            introduction: limits::INTRODUCTION,
            introduced: |said| !said.is_empty(),
            refused: Refused::default(),
        }
    }
}

/// Hears why a connection was turned away.
type Tell = dyn Fn(&Error) + Send + Sync;

/// Who is told of connections that a listener turned away: they are no reason to stop, and the user
/// of a peer that got its certificates wrong needs to know.
#[derive(Clone, Default)]
pub struct Refused(Option<Arc<Tell>>);

impl Refused {
    /// Calls `tell` with the reason, on the thread that accepts.
    pub fn new(tell: impl Fn(&Error) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(tell)))
    }

    fn tell(&self, error: &Error) {
        tracing::info!(%error, "connection turned away");
        if let Some(tell) = &self.0 {
            tell(error);
        }
    }
}

impl std::fmt::Debug for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Refused")
    }
}

/// Makes connections to one destination.
pub struct Dialer {
    inner: Box<dyn Dial>,
    running: Running,
    idle: Duration,
}

/// Accepts connections at one place.
pub struct Listener {
    inner: Inner,
    uri: Uri,
    running: Running,
    idle: Duration,
}

enum Inner {
    Sockets(Box<SocketListener>),
    /// What nobody can come to who was not asked.
    Other(Box<dyn Listen>),
}

/// Prepares to connect to a destination. Nothing is connected yet.
pub fn dial(uri: &Uri, options: &Options) -> Result<Dialer> {
    refuse_tls_without_socket(uri, options)?;
    let running = Running::default();
    let inner: Box<dyn Dial> = match uri.clone() {
        Uri::Tcp { port: 0, .. } => return Err(usage(uri, "needs the port of the destination")),
        Uri::Tcp { host, .. } if host.is_empty() => return Err(usage(uri, "needs a host")),
        Uri::Tcp { host, port } => Box::new(SocketDialer::new(Place::Tcp { host, port }, options)?),
        Uri::Unix(path) => Box::new(SocketDialer::new(Place::Unix(path), options)?),
        Uri::Fd(number) => {
            let descriptor = Descriptor::inherited(number)?;
            let (is_one_way, options) = (descriptor.is_one_way(), options.clone());
            Box::new(once(uri, is_one_way, move || descriptor.dial(&options)))
        }
        Uri::File { path, offset } => {
            Box::new(once(uri, true, move || file::create(&path, offset)))
        }
        Uri::Exec(command) => {
            let pipes = if options.is_two_way { Pipes::Both } else { Pipes::Input };
            Box::new(exec(uri, command, pipes, (&running, options))?)
        }
        Uri::Stdio => {
            let (is_two_way, own) = (options.is_two_way, options.clone());
            let make = move || descriptor::dial_stdio(is_two_way, &own);
            let first = once(uri, !is_two_way, make);
            match &options.meeting {
                Some(name) => Box::new(Meeting::new(first, name, options)?),
                None => Box::new(first),
            }
        }
    };
    Ok(Dialer { inner, running, idle: options.idle })
}

/// Runs `bitferry` with `args` at another host, over ssh, and dials it; further connections to it
/// go through an ssh each, `channels` in all. When the first connection is gone it is run anew.
pub fn dial_ssh(
    destination: &str,
    (args, channels): (Vec<OsString>, u16),
    options: &Options,
) -> Dialer {
    let running = Running::default();
    let inner = Box::new(Ssh::new(destination, (args, channels), (&running, options.idle)));
    Dialer { inner, running, idle: options.idle }
}

/// Listens. Sockets are bound now, so that a peer may connect as soon as this returns.
pub fn listen(uri: &Uri, options: &Options) -> Result<Listener> {
    refuse_tls_without_socket(uri, options)?;
    let running = Running::default();
    let mut listening = uri.clone();
    let mut bound = |bound| {
        let listener = SocketListener::new(bound, options)?;
        listening = listener.uri().clone();
        Ok::<_, Error>(Inner::Sockets(Box::new(listener)))
    };
    let inner = match uri.clone() {
        Uri::Tcp { host, port } => bound(bind::tcp(&host, port)?)?,
        Uri::Unix(path) => bound(bind::unix(&path)?)?,
        Uri::Fd(number) => {
            let descriptor = Descriptor::inherited(number)?;
            let (is_one_way, options) = (descriptor.is_one_way(), options.clone());
            Inner::Other(Box::new(once(uri, is_one_way, move || descriptor.accept(&options))))
        }
        Uri::File { path, offset } => {
            Inner::Other(Box::new(once(uri, true, move || file::open(&path, offset))))
        }
        Uri::Exec(command) => {
            Inner::Other(Box::new(exec(uri, command, Pipes::Both, (&running, options))?))
        }
        Uri::Stdio => {
            let first = options.clone();
            let first = once(uri, false, move || descriptor::accept_stdio(&first));
            match &options.meeting {
                Some(name) => Inner::Other(Box::new(Meeting::new(first, name, options)?)),
                None => Inner::Other(Box::new(first)),
            }
        }
    };
    Ok(Listener { inner, uri: listening, running, idle: options.idle })
}

/// Runs `bitferry` with `args` at another host, over ssh, and takes what it sends, as [`dial_ssh`]
/// does.
pub fn listen_ssh(
    destination: &str,
    (args, channels): (Vec<OsString>, u16),
    options: &Options,
) -> Listener {
    let running = Running::default();
    let ssh = Ssh::new(destination, (args, channels), (&running, options.idle));
    let inner = Inner::Other(Box::new(ssh));
    Listener { inner, uri: Uri::Exec(ssh::name(destination)), running, idle: options.idle }
}

fn once(
    uri: &Uri,
    is_one_way: bool,
    make: impl FnOnce() -> Result<Connection> + Send + 'static,
) -> Once {
    Once::new(uri.to_string(), is_one_way, make)
}

fn exec(
    uri: &Uri,
    command: String,
    pipes: Pipes,
    (running, options): (&Running, &Options),
) -> Result<Once> {
    if !options.allows_exec {
        return Err(Error::ExecNotAllowed { uri: uri.to_string() });
    }
    let (running, idle) = (running.clone(), options.idle);
    Ok(once(uri, pipes == Pipes::Input, move || {
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(&command);
        running.start(shell, command, pipes, idle)
    }))
}

fn usage(uri: &Uri, reason: &'static str) -> Error {
    Error::Usage { uri: uri.to_string(), reason }
}

fn refuse_tls_without_socket(uri: &Uri, options: &Options) -> Result<()> {
    match uri {
        Uri::File { .. } | Uri::Exec(_) | Uri::Stdio if options.tls.is_some() => {
            Err(usage(uri, "cannot be encrypted: TLS is for tcp:, unix: and sockets"))
        }
        _ => Ok(()),
    }
}

impl Dialer {
    /// After the connection was dropped: waits until a command at its other end has ended, which it
    /// has to do successfully. At once where there is none.
    pub fn end(&self) -> Result<()> {
        self.running.end(self.idle)
    }
}

impl Dial for Dialer {
    fn nature(&self) -> Nature {
        self.inner.nature()
    }

    fn dial(&self) -> io::Result<Connection> {
        self.inner.dial()
    }
}

impl Listener {
    /// Where it listens; with the port that was chosen where 0 was asked for.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// From now on a connection that has not introduced itself is handed out too: QEMU's preempt
    /// channel begins in silence.
    pub fn expect_silence(&self) {
        if let Inner::Sockets(listener) = &self.inner {
            listener.expect_silence();
        }
    }

    /// As [`Dialer::end`].
    pub fn end(&self) -> Result<()> {
        self.running.end(self.idle)
    }

    fn inner(&self) -> &dyn Listen {
        match &self.inner {
            Inner::Sockets(listener) => &**listener,
            Inner::Other(other) => &**other,
        }
    }
}

impl Listen for Listener {
    fn nature(&self) -> Nature {
        self.inner().nature()
    }

    fn has_strangers(&self) -> bool {
        self.inner().has_strangers()
    }

    fn accept(&self, limit: Option<Duration>) -> io::Result<Connection> {
        self.inner().accept(limit)
    }

    fn close(&self) {
        self.inner().close();
    }
}
