//! Where a stream goes to or comes from, in QEMU's words. Pure: nothing is looked up or opened.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::limits::MAX_SOCKET_PATH;

/// Where a stream goes to or comes from. Prints as it is parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uri {
    /// `tcp:HOST:PORT`; an IPv6 address stands in brackets.
    Tcp {
        /// A name or an address, without brackets. Empty: every address, to listen on.
        host: String,
        /// 0: any free one, to listen on.
        port: u16,
    },
    /// `unix:PATH`: a Unix socket.
    Unix(PathBuf),
    /// `fd:N`: a descriptor that this process was started with.
    Fd(i32),
    /// `file:PATH[,offset=N]`.
    File {
        /// The file.
        path: PathBuf,
        /// Where the stream begins in it, in bytes.
        offset: u64,
    },
    /// `exec:COMMAND`, run by `sh -c`.
    Exec(String),
    /// `-`: standard input and output.
    Stdio,
}

/// Why a text is no URI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{uri:?} {fault}")]
pub struct UriError {
    /// What was given.
    pub uri: String,
    /// What is wrong with it.
    pub fault: UriFault,
}

/// What is wrong with a URI, and what would be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UriFault {
    /// It starts with no known word.
    #[error(
        "names no transport: use tcp:HOST:PORT, unix:PATH, fd:N, file:PATH[,offset=N], \
         exec:COMMAND or -"
    )]
    Scheme,
    /// There is no port.
    #[error("has no port: use tcp:HOST:PORT")]
    NoPort,
    /// The port is no number from 0 to 65535.
    #[error("has a port that is no number from 0 to 65535")]
    Port,
    /// The host holds what no host name does.
    #[error("has no host name or address before the port; write an IPv6 address as tcp:[::1]:PORT")]
    Host,
    /// The path is empty.
    #[error("has no path")]
    NoPath,
    /// The path does not fit into a socket address.
    #[error("has a path of more than {MAX_SOCKET_PATH} bytes, which no Unix socket can have")]
    LongPath,
    /// There is a NUL.
    #[error("holds a NUL character")]
    Nul,
    /// What follows `fd:` is no number.
    #[error("has no descriptor number: use fd:N")]
    Descriptor,
    /// Descriptors 0 to 2 are `-`.
    #[error("is a standard stream: use - for standard input and output")]
    Standard,
    /// The offset is no size.
    #[error("has an offset that is no number of bytes")]
    Offset,
    /// There is no command.
    #[error("has no command: use exec:COMMAND")]
    NoCommand,
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        parse(text).map_err(|fault| UriError { uri: text.to_owned(), fault })
    }
}

fn parse(text: &str) -> Result<Uri, UriFault> {
    if text.contains('\0') {
        return Err(UriFault::Nul);
    }
    if text == "-" {
        return Ok(Uri::Stdio);
    }
    match text.split_once(':').ok_or(UriFault::Scheme)? {
        ("tcp", rest) => tcp(rest),
        ("unix", "") => Err(UriFault::NoPath),
        ("unix", path) if path.len() > MAX_SOCKET_PATH => Err(UriFault::LongPath),
        ("unix", path) => Ok(Uri::Unix(path.into())),
        ("fd", number) => descriptor(number),
        ("file", rest) => file(rest),
        ("exec", command) if command.trim().is_empty() => Err(UriFault::NoCommand),
        ("exec", command) => Ok(Uri::Exec(command.to_owned())),
        _ => Err(UriFault::Scheme),
    }
}

fn tcp(rest: &str) -> Result<Uri, UriFault> {
    let (host, port) = match rest.strip_prefix('[') {
        Some(bracketed) => {
            let (host, rest) = bracketed.split_once(']').ok_or(UriFault::Host)?;
            if host.parse::<std::net::Ipv6Addr>().is_err() && !is_scoped(host) {
                return Err(UriFault::Host);
            }
            (host, rest.strip_prefix(':').ok_or(UriFault::NoPort)?)
        }
        None => {
            let (host, port) = rest.rsplit_once(':').ok_or(UriFault::NoPort)?;
            if !host.chars().all(is_of_a_host) {
                return Err(UriFault::Host);
            }
            (host, port)
        }
    };
    Ok(Uri::Tcp { host: host.to_owned(), port: digits(port).ok_or(UriFault::Port)? })
}

/// `fe80::1%eth0`.
fn is_scoped(host: &str) -> bool {
    let is_zone = |z: &str| !z.is_empty() && z.chars().all(is_of_a_host);
    host.split_once('%').is_some_and(|(address, zone)| {
        address.parse::<std::net::Ipv6Addr>().is_ok() && is_zone(zone)
    })
}

/// Names beyond ASCII are the resolver's business; what separates or drives a terminal is not a
/// name.
fn is_of_a_host(c: char) -> bool {
    !(c.is_control() || c.is_whitespace() || ":/[]%,@".contains(c))
}

fn descriptor(number: &str) -> Result<Uri, UriFault> {
    match digits::<u32>(number).and_then(|n| i32::try_from(n).ok()) {
        None => Err(UriFault::Descriptor),
        Some(0..=2) => Err(UriFault::Standard),
        Some(number) => Ok(Uri::Fd(number)),
    }
}

fn file(rest: &str) -> Result<Uri, UriFault> {
    let (path, offset) = match rest.rsplit_once(OFFSET) {
        Some((path, offset)) => (path, digits(offset).ok_or(UriFault::Offset)?),
        None => (rest, 0),
    };
    if path.is_empty() {
        return Err(UriFault::NoPath);
    }
    Ok(Uri::File { path: path.into(), offset })
}

const OFFSET: &str = ",offset=";

/// A number without the sign that `parse` would take.
fn digits<N: FromStr>(text: &str) -> Option<N> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Fd(number) => write!(f, "fd:{number}"),
            Self::File { path, offset } => {
                write!(f, "file:{}", path.display())?;
                // A name that looks like an offset needs one behind it.
                if *offset != 0 || path.to_string_lossy().contains(OFFSET) {
                    write!(f, "{OFFSET}{offset}")?;
                }
                Ok(())
            }
            Self::Exec(command) => write!(f, "exec:{command}"),
            Self::Stdio => f.write_str("-"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    fn fault(text: &str) -> UriFault {
        text.parse::<Uri>().expect_err(text).fault
    }

    #[test]
    fn each_form_is_understood() {
        let tcp = |host: &str, port| Uri::Tcp { host: host.into(), port };
        let file = |path: &str, offset| Uri::File { path: path.into(), offset };
        assert_eq!(uri("tcp:host.example:4444"), tcp("host.example", 4444));
        assert_eq!(uri("tcp:127.0.0.1:0"), tcp("127.0.0.1", 0));
        assert_eq!(uri("tcp:[::1]:5"), tcp("::1", 5));
        assert_eq!(uri("tcp:[fe80::1%eth0]:5"), tcp("fe80::1%eth0", 5));
        assert_eq!(uri("tcp::65535"), tcp("", 65535));
        assert_eq!(uri("unix:/run/a b:c"), Uri::Unix("/run/a b:c".into()));
        assert_eq!(uri("fd:17"), Uri::Fd(17));
        assert_eq!(uri("file:a,b"), file("a,b", 0));
        assert_eq!(uri("file:a,offset=5,offset=4096"), file("a,offset=5", 4096));
        assert_eq!(uri("exec:gzip -c > x:y"), Uri::Exec("gzip -c > x:y".into()));
        assert_eq!(uri("-"), Uri::Stdio);
    }

    #[test]
    fn each_fault_has_its_word() {
        use UriFault as F;
        for (text, expected) in [
            ("", F::Scheme),
            ("host:1", F::Scheme),
            ("TCP:h:1", F::Scheme),
            ("nbd:h:1", F::Scheme),
            ("tcp:h", F::NoPort),
            ("tcp:[::1]", F::NoPort),
            ("tcp:[::1]5", F::NoPort),
            ("tcp:h:", F::Port),
            ("tcp:h:+5", F::Port),
            ("tcp:h:65536", F::Port),
            ("tcp:h:5,to=9", F::Port),
            ("tcp:::1:5", F::Host),
            ("tcp:[h]:5", F::Host),
            ("tcp:[::1:5", F::Host),
            ("tcp:a b:5", F::Host),
            ("unix:", F::NoPath),
            ("file:", F::NoPath),
            ("file:,offset=1", F::NoPath),
            ("file:a,offset=", F::Offset),
            ("file:a,offset=-1", F::Offset),
            ("file:a,offset=18446744073709551616", F::Offset),
            ("fd:", F::Descriptor),
            ("fd:x", F::Descriptor),
            ("fd:2147483648", F::Descriptor),
            ("fd:1", F::Standard),
            ("exec:", F::NoCommand),
            ("exec: ", F::NoCommand),
            ("unix:a\0b", F::Nul),
        ] {
            assert_eq!(fault(text), expected, "{text:?}");
        }
        assert_eq!(fault(&format!("unix:{}", "x".repeat(108))), F::LongPath);
        let longest = "x".repeat(107);
        assert_eq!(uri(&format!("unix:{longest}")), Uri::Unix(longest.into()));
    }

    fn any_uri() -> impl Strategy<Value = Uri> {
        prop_oneof![
            ("[a-z0-9.-]{0,20}", any::<u16>()).prop_map(|(host, port)| Uri::Tcp { host, port }),
            (any::<u128>(), any::<u16>()).prop_map(|(bits, port)| Uri::Tcp {
                host: std::net::Ipv6Addr::from(bits).to_string(),
                port
            }),
            "[^\0]{1,26}".prop_map(|path| Uri::Unix(path.into())),
            (3..i32::MAX).prop_map(Uri::Fd),
            ("([^\0]{1,20}|a,offset=[0-9]{0,3})", any::<u64>())
                .prop_map(|(path, offset)| Uri::File { path: path.into(), offset }),
            ("a,offset=[0-9]{0,3}").prop_map(|p| Uri::File { path: p.into(), offset: 0 }),
            "[^\0]{0,20}x".prop_map(Uri::Exec),
            Just(Uri::Stdio),
        ]
    }

    proptest! {
        #[test]
        fn what_is_printed_is_parsed_again(uri in any_uri()) {
            prop_assert_eq!(uri.to_string().parse::<Uri>(), Ok(uri));
        }

        #[test]
        fn what_is_parsed_is_printed_and_parsed_again(
            text in "(tcp|unix|fd|file|exec|)[:]?[\\[]?[a-z0-9:,=.-]{0,12}[\\]]?:?[0-9]{0,6}"
        ) {
            if let Ok(uri) = text.parse::<Uri>() {
                prop_assert_eq!(uri.to_string().parse::<Uri>(), Ok(uri));
            }
        }
    }
}
