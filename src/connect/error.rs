//! Why a connection did not come about or ended, whose fault it is, what to do.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use format_spec::Blame;

use super::location::LocationError;
use super::tls::TlsError;
use super::uri::UriError;

/// Result of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a connection did not come about or ended. Where a contract asks for an [`io::Error`], it
/// holds one of these: see [`Error::find`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A URI that is none.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// An operand that names a host in a way that nothing can be done with.
    #[error(transparent)]
    Location(#[from] LocationError),
    /// What was asked makes no sense with this transport.
    #[error("{uri} {reason}")]
    Usage {
        /// The transport.
        uri: String,
        /// What and why.
        reason: &'static str,
    },
    /// `exec:` runs a command, and nobody has allowed it.
    #[error("{uri} would run a command, which is not allowed")]
    ExecNotAllowed {
        /// The transport.
        uri: String,
    },
    /// A name has no address.
    #[error("cannot find the address of {host:?}")]
    Resolve {
        /// The name.
        host: String,
        /// The system's answer.
        source: io::Error,
    },
    /// Nobody could be reached.
    #[error("cannot connect to {peer}")]
    Connect {
        /// Who, with the address of the last try.
        peer: String,
        /// The system's answer to the last try.
        source: io::Error,
    },
    /// This side cannot be reached.
    #[error("cannot listen on {uri}")]
    Listen {
        /// Where.
        uri: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The handshake failed.
    #[error("no TLS with {peer}: {fault}")]
    Tls {
        /// The other side.
        peer: String,
        /// Why.
        fault: TlsError,
    },
    /// The files of `--tls-dir` cannot be used.
    #[error("cannot use {} for TLS: {reason}", .path.display())]
    TlsFiles {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A peer speaks TLS, and this side does not.
    #[error("{peer} speaks TLS, and this side was not told to")]
    PeerSpeaksTls {
        /// The other side.
        peer: String,
    },
    /// A peer connected and said nothing, or hung up.
    #[error("{peer} connected and {what}")]
    NoIntroduction {
        /// The other side.
        peer: String,
        /// What it did.
        what: &'static str,
    },
    /// No byte moved for too long.
    #[error("no byte moved for {seconds} s: the other side hangs or is unreachable")]
    Idle {
        /// The limit.
        seconds: u64,
    },
    /// Nobody came in time.
    #[error("no usable connection came to {uri} within {seconds} s")]
    NobodyCame {
        /// Where.
        uri: String,
        /// The limit.
        seconds: u64,
    },
    /// This side ended the connection.
    #[error("the connection was ended by this side")]
    HungUp,
    /// The listener is closed.
    #[error("{uri} is closed")]
    Closed {
        /// Where.
        uri: String,
    },
    /// A transport that carries one connection was asked for another.
    #[error("{uri} carries one connection, and it has been used")]
    OnlyOnce {
        /// The transport.
        uri: String,
    },
    /// A descriptor is not what it should be.
    #[error("descriptor {number} {reason}")]
    Descriptor {
        /// Its number.
        number: i32,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A stream that only goes in the other direction.
    #[error("nothing can be written to {uri}: it is only read")]
    OneWay {
        /// The transport.
        uri: String,
    },
    /// A file cannot be used.
    #[error("cannot {action} {}", .path.display())]
    File {
        /// "open", "create".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A stream would take the place of something else.
    #[error("{} exists, and is no migration stream that may be replaced", .path.display())]
    Holds {
        /// The file.
        path: PathBuf,
    },
    /// A command cannot be run.
    #[error("cannot run {command:?}")]
    Run {
        /// The command.
        command: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A command failed.
    #[error("{command:?} {}", .end)]
    Ended {
        /// The command.
        command: String,
        /// How.
        end: End,
    },
    /// A command prints without end.
    #[error("{command:?} prints more than {limit} bytes")]
    TooMuch {
        /// The command.
        command: String,
        /// What is read of it, in bytes.
        limit: u64,
    },
    /// What comes from another host does not begin as `bitferry` does.
    #[error("{command:?}: what it prints does not come from bitferry")]
    Banner {
        /// The command.
        command: String,
    },
    /// The system refused something that it never should.
    #[error("cannot {action}")]
    System {
        /// What.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// How a command ended that should not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum End {
    /// By itself, unsuccessfully.
    #[error("ended with {0}")]
    Status(ExitStatus),
    /// Not at all, though its pipes were closed.
    #[error("does not end")]
    Never,
}

impl Error {
    /// The error of this module inside an [`io::Error`], if one is.
    pub fn find(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }

    /// The exit status of a command that failed, where that is what it is about.
    pub fn exit_code(&self) -> Option<u8> {
        match self {
            Self::Ended { end: End::Status(status), .. } => {
                status.code().and_then(|code| u8::try_from(code).ok())
            }
            _ => None,
        }
    }

    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Uri(_)
            | Self::Location(_)
            | Self::Usage { .. }
            | Self::ExecNotAllowed { .. }
            | Self::OnlyOnce { .. }
            | Self::OneWay { .. }
            | Self::Descriptor { .. } => Blame::Caller,
            Self::File { .. }
            | Self::Holds { .. }
            | Self::TlsFiles { .. }
            | Self::System { .. } => Blame::Device,
            Self::Resolve { .. }
            | Self::Connect { .. }
            | Self::Listen { .. }
            | Self::NoIntroduction { .. }
            | Self::Idle { .. }
            | Self::NobodyCame { .. }
            | Self::HungUp
            | Self::Closed { .. }
            | Self::Run { .. }
            | Self::Ended { .. } => Blame::Transport,
            Self::TooMuch { .. } | Self::Banner { .. } => Blame::PeerBehaviour,
            Self::Tls { .. } | Self::PeerSpeaksTls { .. } => Blame::PeerFeatures,
        }
    }

    /// What can be done about it, as one sentence, where it is known.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::ExecNotAllowed { .. } => "if you trust this command, use --allow-exec",
            Self::Resolve { .. } => "check the name, or use an address",
            Self::Connect { .. } => {
                "check that somebody listens there (`bitferry receive`, a QEMU with -incoming) \
                 and is not blocked"
            }
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                "choose another place, or port 0 for any free one"
            }
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrNotAvailable => {
                "name an address of this host"
            }
            Self::Tls { fault, .. } => return fault.hint(),
            Self::TlsFiles { .. } => {
                "--tls-dir holds ca-cert.pem, and server-cert.pem with server-key.pem to receive, \
                 client-cert.pem with client-key.pem to send"
            }
            Self::PeerSpeaksTls { .. } => "give --tls-dir on both sides, or on none",
            Self::NoIntroduction { .. } => "only a migration source may connect here",
            Self::Idle { .. } => "look at the other side, then give the same command again",
            Self::NobodyCame { .. } => "check the source, its URI and what is between",
            Self::Ended { end: End::Status(status), .. } => return command_hint(*status),
            Self::Holds { .. } => "remove it if it is not needed, or choose another name",
            Self::TooMuch { .. } | Self::Banner { .. } => {
                "something there writes before bitferry does: `ssh HOST true` must print nothing, \
                 and a start file of the shell there may greet at a terminal alone"
            }
            Self::Run { .. } => "check that it is installed",
            _ => return None,
        };
        Some(text.to_owned())
    }

    fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Idle { .. } | Self::NobodyCame { .. } => io::ErrorKind::TimedOut,
            Self::HungUp | Self::Closed { .. } => io::ErrorKind::ConnectionAborted,
            Self::Ended { .. } => io::ErrorKind::BrokenPipe,
            Self::Tls { .. } | Self::PeerSpeaksTls { .. } => io::ErrorKind::InvalidData,
            Self::Uri(_) | Self::Usage { .. } | Self::OneWay { .. } => io::ErrorKind::InvalidInput,
            Self::Resolve { source, .. }
            | Self::Connect { source, .. }
            | Self::Listen { source, .. }
            | Self::File { source, .. }
            | Self::Run { source, .. }
            | Self::System { source, .. } => source.kind(),
            _ => io::ErrorKind::Other,
        }
    }
}

/// What the numbers of the shell and of ssh mean.
fn command_hint(status: ExitStatus) -> Option<String> {
    let text = match status.code()? {
        126 => "the command is there and may not be run",
        127 => {
            "the command was not found at that end; BITFERRY_REMOTE names bitferry at the other end"
        }
        255 => "ssh itself failed: `ssh HOST true` must work without a question",
        _ => "what the command said above is the reason",
    };
    Some(text.to_owned())
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error)
    }
}
