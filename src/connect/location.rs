//! `[USER@]HOST:PATH`, read as scp does. Pure.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

/// Where an image stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// Here.
    Local(PathBuf),
    /// At another host, reached with ssh.
    Remote(Remote),
}

/// An image at another host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// `[USER@]HOST`, as ssh takes it: no brackets, never empty, never beginning with `-`.
    pub destination: String,
    /// The path there; a relative one starts at the user's home.
    pub path: PathBuf,
}

/// Why a text names no place at another host, though a colon stands before its first slash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} {fault}; write ./{} for a local file of that name", .text.display(), .text.display())]
pub struct LocationError {
    /// What was given.
    pub text: PathBuf,
    /// What is wrong with it.
    pub fault: LocationFault,
}

/// What is wrong with `[USER@]HOST:PATH`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LocationFault {
    /// ssh would take it for an option.
    #[error("names a host that begins with a dash")]
    Dash,
    /// Nothing stands there, or something that no host name holds.
    #[error("names no host before the colon")]
    Host,
    /// Nothing stands behind the colon.
    #[error("names a host and no path behind the colon")]
    NoPath,
}

impl Location {
    /// Reads an operand: a colon before the first slash makes it remote, unless it is the first
    /// letter; an IPv6 address stands in brackets.
    pub fn parse(text: &OsStr) -> Result<Self, LocationError> {
        let bytes = text.as_bytes();
        let Some(colon) = colon(bytes) else { return Ok(Self::Local(text.into())) };
        let error = |fault| LocationError { text: text.into(), fault };
        let (host, path) = bytes.split_at(colon);
        let path = path.get(1..).unwrap_or_default();
        let destination = destination(host).map_err(error)?;
        // The remote shell starts in the user's home, and its quotes would hide the tilde.
        let path = path.strip_prefix(b"~/").unwrap_or(path);
        if path.is_empty() {
            return Err(error(LocationFault::NoPath));
        }
        let path = Path::new(OsStr::from_bytes(path)).to_owned();
        Ok(Self::Remote(Remote { destination, path }))
    }
}

impl std::fmt::Display for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.destination, self.path.display())
    }
}

/// Where the host ends, if there is one.
fn colon(bytes: &[u8]) -> Option<usize> {
    if bytes.first() == Some(&b':') {
        return None;
    }
    let is_bracket = |at: Option<&u8>| at == Some(&b'[');
    let mut is_bracketed = is_bracket(bytes.first());
    for (at, byte) in bytes.iter().enumerate() {
        let next = bytes.get(at + 1);
        match byte {
            b'@' if is_bracket(next) => is_bracketed = true,
            b']' if is_bracketed && next == Some(&b':') => return Some(at + 1),
            b':' if !is_bracketed => return Some(at),
            b'/' => return None,
            _ => {}
        }
    }
    None
}

/// `[USER@]HOST` without brackets.
fn destination(bytes: &[u8]) -> Result<String, LocationFault> {
    let text = OsString::from_vec(bytes.to_vec()).into_string().map_err(|_| LocationFault::Host)?;
    let (user, host) = match text.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, text.as_str()),
    };
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if text.starts_with('-') || bare.starts_with('-') {
        return Err(LocationFault::Dash);
    }
    let is_bad = |c: char| c.is_control() || c.is_whitespace() || c == '/';
    if bare.is_empty() || user == Some("") || text.contains(is_bad) {
        return Err(LocationFault::Host);
    }
    Ok(match user {
        Some(user) => format!("{user}@{bare}"),
        None => bare.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Location, LocationFault> {
        Location::parse(OsStr::new(text)).map_err(|e| e.fault)
    }

    fn remote(destination: &str, path: &str) -> Result<Location, LocationFault> {
        Ok(Location::Remote(Remote { destination: destination.into(), path: path.into() }))
    }

    #[test]
    fn paths_are_local() {
        for text in ["a", "./a:b", "/a:b", "a/b:c", "../x:y", ":a", "[::1", "[a/b]:c", ""] {
            assert_eq!(parse(text), Ok(Location::Local(text.into())), "{text}");
        }
    }

    #[test]
    fn hosts_are_remote() {
        assert_eq!(parse("h:a"), remote("h", "a"));
        assert_eq!(parse("u@h:/a:b"), remote("u@h", "/a:b"));
        assert_eq!(parse("[::1]:/a"), remote("::1", "/a"));
        assert_eq!(parse("u@[fe80::1%e]:a"), remote("u@fe80::1%e", "a"));
        assert_eq!(parse("h:~/a"), remote("h", "a"));
        assert_eq!(parse("a@b@h:-x"), remote("a@b@h", "-x"));
    }

    #[test]
    fn what_ssh_must_not_see_is_refused() {
        for text in ["-oProxyCommand=x:a", "-l@h:a", "u@-oProxyCommand=x:a", "[-x]:a"] {
            assert_eq!(parse(text), Err(LocationFault::Dash), "{text}");
        }
        for text in ["u@:a", "@h:a", "h\n:a", "a b:c", "[]:a"] {
            assert_eq!(parse(text), Err(LocationFault::Host), "{text}");
        }
        for text in ["h:", "u@h:~/"] {
            assert_eq!(parse(text), Err(LocationFault::NoPath), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_leading_dot_or_slash_is_always_local(text in "(\\./|/|\\.\\./)[^\0]{0,20}") {
            prop_assert_eq!(parse(&text), Ok(Location::Local(text.into())));
        }

        #[test]
        fn no_destination_is_an_option(text in "[^\0/]{0,6}[@:\\[-]{0,3}[^\0]{0,6}:[^\0]{0,6}") {
            if let Ok(Location::Remote(remote)) = parse(&text) {
                let host = remote.destination.rsplit('@').next().unwrap_or_default();
                prop_assert!(!host.is_empty() && !host.starts_with('-'));
                prop_assert!(!remote.destination.starts_with('-'));
            }
        }
    }
}
