//! Accepting over TCP and Unix sockets.
//!
//! Whoever connects has to introduce itself before it is handed out: by a handshake where there is
//! TLS, else by its first words, since the source of a migration speaks first; what they have to be
//! the user of the listener says. Many do so at once, so that one that hangs holds nobody up; how
//! many is bounded, and the oldest is closed for a new one.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use mig_core::transport::{Connection, Listen, Nature};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use rustls::ServerConfig;
use tokio::io::Interest;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use super::bind::Bound;
use super::error::{Error, Result};
use super::limits::{MAX_CONNECTIONS, MAX_INTRODUCTION, MAX_INTRODUCTIONS};
use super::{Options, Refused, Uri, control, socket, tls};

/// Accepts connections at one place.
pub(super) struct SocketListener {
    uri: Uri,
    state: Mutex<Accepting>,
    /// The listening socket, to be closed while somebody waits.
    socket: OwnedFd,
    is_closed: AtomicBool,
    introduction: Arc<Introduction>,
    refused: Refused,
    _bound: Bound,
}

/// What a connection goes through before it is handed out.
struct Introduction {
    /// Encrypts; and the name that the peer has to prove.
    tls: Option<(Arc<ServerConfig>, Option<String>)>,
    /// Whether the first words are waited for where there is no TLS.
    wants_words: AtomicBool,
    /// Whether these are enough.
    introduced: fn(&[u8]) -> bool,
    limit: Duration,
    idle: Duration,
}

/// Used by one thread at a time.
struct Accepting {
    // Dropped before the runtime that they belong to.
    introductions: JoinSet<Result<Connection>>,
    ages: VecDeque<AbortHandle>,
    listener: Listener,
    runtime: Runtime,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, String),
}

impl SocketListener {
    /// Listens where `bound` is bound.
    pub(super) fn new(bound: Bound, options: &Options) -> Result<Self> {
        let uri = bound.uri.clone();
        let failed = |source| Error::Listen { uri: uri.to_string(), source };
        let tls = match &options.tls {
            Some(tls) => Some((tls.server()?, tls.peer().map(str::to_owned))),
            None => None,
        };
        let socket = bound.socket.try_clone().map_err(failed)?;
        let runtime = control::runtime()?;
        let listener = {
            let _inside = runtime.enter();
            let socket = bound.socket.try_clone().map_err(failed)?;
            socket.set_nonblocking(true).map_err(failed)?;
            match &uri {
                Uri::Tcp { .. } => TcpListener::from_std(socket.into()).map(Listener::Tcp),
                _ => UnixListener::from_std(OwnedFd::from(socket).into())
                    .map(|listener| Listener::Unix(listener, uri.to_string())),
            }
            .map_err(failed)?
        };
        let (introductions, ages) = (JoinSet::new(), VecDeque::new());
        Ok(Self {
            uri,
            state: Mutex::new(Accepting { introductions, ages, listener, runtime }),
            socket: socket.into(),
            is_closed: AtomicBool::new(false),
            introduction: Arc::new(Introduction {
                tls,
                wants_words: AtomicBool::new(true),
                introduced: options.introduced,
                limit: options.introduction,
                idle: options.idle,
            }),
            refused: options.refused.clone(),
            _bound: bound,
        })
    }

    /// Where it listens, with the port that was chosen.
    pub(super) fn uri(&self) -> &Uri {
        &self.uri
    }

    /// From now on a connection without TLS is handed out though it has not introduced itself.
    pub(super) fn expect_silence(&self) {
        self.introduction.wants_words.store(false, Ordering::Relaxed);
    }

    fn closed(&self) -> io::Error {
        Error::Closed { uri: self.uri.to_string() }.into()
    }
}

impl Listen for SocketListener {
    fn nature(&self) -> Nature {
        Nature { is_one_way: false, max_connections: MAX_CONNECTIONS }
    }

    fn accept(&self, limit: Option<Duration>) -> io::Result<Connection> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Accepting { introductions, ages, listener, runtime } = &mut *state;
        let step = |cx: &mut Context<'_>| self.poll(cx, listener, introductions, ages);
        let next = std::future::poll_fn(step);
        runtime.block_on(async {
            match limit {
                Some(limit) => timeout(limit, next).await.unwrap_or_else(|_| {
                    let (uri, seconds) = (self.uri.to_string(), limit.as_secs());
                    Err(Error::NobodyCame { uri, seconds }.into())
                }),
                None => next.await,
            }
        })
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        // Wakes who waits, and refuses whoever connects from now on.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

impl SocketListener {
    /// One step: hands out who has introduced itself, lets in who waits.
    fn poll(
        &self,
        cx: &mut Context<'_>,
        listener: &Listener,
        introductions: &mut JoinSet<Result<Connection>>,
        ages: &mut VecDeque<AbortHandle>,
    ) -> Poll<io::Result<Connection>> {
        loop {
            if self.is_closed.load(Ordering::Acquire) {
                return Poll::Ready(Err(self.closed()));
            }
            match introductions.poll_join_next(cx) {
                Poll::Ready(Some(Ok(Ok(connection)))) => return Poll::Ready(Ok(connection)),
                Poll::Ready(Some(Ok(Err(error)))) => {
                    self.refused.tell(&error);
                    continue;
                }
                // Closed for a newer one.
                Poll::Ready(Some(Err(_))) => continue,
                Poll::Ready(None) | Poll::Pending => {}
            }
            let (socket, peer) = match listener.poll_accept(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(accepted)) => accepted,
                Poll::Ready(Err(_)) if self.is_closed.load(Ordering::Acquire) => continue,
                Poll::Ready(Err(error)) if is_passing(&error) => continue,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            };
            ages.retain(|age| !age.is_finished());
            while ages.len() >= MAX_INTRODUCTIONS {
                if let Some(oldest) = ages.pop_front() {
                    oldest.abort();
                }
            }
            let introduction = Arc::clone(&self.introduction);
            ages.push_back(introductions.spawn(introduction.hear(socket, peer)));
        }
    }
}

/// Failures of a connection that was about to be accepted, not of the listener.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted)
}

impl Listener {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(OwnedFd, String)>> {
        match self {
            Self::Tcp(listener) => listener.poll_accept(cx).map(|accepted| {
                let (stream, address) = accepted?;
                Ok((stream.into_std()?.into(), format!("tcp:{address}")))
            }),
            Self::Unix(listener, name) => listener.poll_accept(cx).map(|accepted| {
                let (stream, _) = accepted?;
                Ok((stream.into_std()?.into(), name.clone()))
            }),
        }
    }
}

impl Introduction {
    async fn hear(self: Arc<Self>, socket: OwnedFd, peer: String) -> Result<Connection> {
        if peer.starts_with("tcp:") {
            socket::tune(&socket, self.idle)?;
        }
        let made = match &self.tls {
            Some((config, name)) => {
                let who = (peer.as_str(), name.as_deref());
                let made = tls::accept(Arc::clone(config), socket, who, self.limit).await;
                made.map(|(socket, session)| (socket, Some(session)))?
            }
            None if self.wants_words.load(Ordering::Relaxed) => {
                (self.first_words(socket, &peer).await?, None)
            }
            None => (socket, None),
        };
        Ok(control::connection(made, peer, self.idle))
    }

    /// Waits for the first words, and leaves them where they are.
    async fn first_words(&self, socket: OwnedFd, peer: &str) -> Result<OwnedFd> {
        let socket = control::stream(socket)?;
        let what = match timeout(self.limit, self.is_heard(&socket)).await {
            Ok(Ok(Words::Enough)) => return control::descriptor(socket),
            Ok(Ok(Words::None) | Err(_)) => "hung up without a word",
            Ok(Ok(Words::Few)) => "hung up before it had said what it wants",
            Err(_) if self.peek(&socket).is_ok_and(|said| said != Words::None) => {
                "did not say what it wants"
            }
            Err(_) => "said nothing",
        };
        Err(Error::NoIntroduction { peer: peer.to_owned(), what })
    }

    /// Waits until enough was said, or nothing more will be.
    async fn is_heard(&self, socket: &UnixStream) -> io::Result<Words> {
        loop {
            let ready = socket.ready(Interest::READABLE).await?;
            let mut said = Words::None;
            // What is there stays there: only what comes next is news.
            let heard = socket.try_io(Interest::READABLE, || {
                said = self.peek(socket)?;
                if said == Words::Enough { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
            });
            match heard {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                Err(_) if !ready.is_read_closed() => {}
                _ => return Ok(said),
            }
        }
    }

    /// What was said so far.
    fn peek(&self, socket: &UnixStream) -> io::Result<Words> {
        let mut said = [0; MAX_INTRODUCTION];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let len = match recv(socket.as_fd(), &mut said, flags) {
            Ok((len, _)) => len,
            Err(Errno::AGAIN) => 0,
            Err(error) => return Err(error.into()),
        };
        Ok(match said.get(..len).unwrap_or_default() {
            [] => Words::None,
            said if said.len() == MAX_INTRODUCTION || (self.introduced)(said) => Words::Enough,
            _ => Words::Few,
        })
    }
}

/// How much a connection has said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Words {
    None,
    Few,
    Enough,
}
