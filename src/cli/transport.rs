//! What `send` and `receive` have in common: where the stream goes, and how.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args as Group;

use bitferry::connect::{Options, Tls, Uri};
use bitferry::control::MAX_DOWNTIME_MS;
use mig_core::stream::{Compression, Method};

use super::supervise::ControlArgs;

/// Options of whatever has a URI.
#[derive(Debug, Clone, Group)]
pub(crate) struct TransportArgs {
    /// tcp:HOST:PORT, unix:PATH, fd:N, file:PATH[,offset=N], exec:COMMAND, or - for standard input
    /// and output
    #[arg(value_name = "URI")]
    pub(crate) uri: Uri,
    /// Run the command of exec:COMMAND
    #[arg(long, help_heading = "Transport")]
    pub(crate) allow_exec: bool,
    /// Where the further connections of a copy over ssh come to.
    #[arg(long, value_name = "NAME", hide = true)]
    pub(crate) meet: Option<String>,
    /// Encrypt with TLS 1.3 and demand a certificate of the other side: DIR holds ca-cert.pem, and
    /// server-cert.pem and server-key.pem to receive, client-cert.pem and client-key.pem to send
    #[arg(long, value_name = "DIR", help_heading = "Transport")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Name that the other side's certificate must have, where it is not the HOST of the URI
    #[arg(long, value_name = "NAME", requires = "tls_dir", help_heading = "Transport")]
    pub(crate) tls_peer: Option<String>,
    /// How long a cut is waited for before giving up; 0, the default: not at all. A connection on
    /// which no byte moves for 180 seconds counts as cut
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Transport")]
    #[arg(allow_negative_numbers = true)]
    pub(crate) reconnect: Option<Duration>,
    #[command(flatten)]
    pub(crate) control: ControlArgs,
}

/// Longest time that a cut is waited for: 30 days. What is more is milliseconds, or a slip.
const MAX_RECONNECT_SECONDS: u64 = 30 * 24 * 3600;

/// A whole number of seconds.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|n| *n <= MAX_RECONNECT_SECONDS);
    seconds.map(Duration::from_secs).ok_or_else(|| {
        format!("it is a whole number of seconds, {MAX_RECONNECT_SECONDS} (30 days) at most")
    })
}

/// Milliseconds of a pause, as many as QEMU allows.
pub(super) fn pause(text: &str) -> Result<u64, String> {
    let milliseconds = text.parse().ok().filter(|ms| *ms <= MAX_DOWNTIME_MS);
    milliseconds.ok_or_else(|| format!("{text} is not in 0..={MAX_DOWNTIME_MS}"))
}

impl TransportArgs {
    /// How long a cut is waited for. What carries one connection cannot be connected again.
    pub(crate) fn reconnect(&self) -> bitferry::Result<Duration> {
        let limit = self.reconnect.unwrap_or_default();
        if limit.is_zero() || matches!(self.uri, Uri::Tcp { .. } | Uri::Unix(_)) {
            return Ok(limit);
        }
        let reason = format!("--reconnect is for tcp: and unix:, and {} is used up once", self.uri);
        Err(bitferry::Error::Usage { reason })
    }

    /// How to connect or listen.
    pub(crate) fn options(&self) -> Options {
        let tls = self.tls_dir.as_ref().map(|dir| Tls::new(dir, self.tls_peer.clone()));
        let meeting = self.meet.clone();
        Options { tls, allows_exec: self.allow_exec, meeting, ..Options::default() }
    }

    /// Whether the stream needs standard output for itself.
    pub(crate) fn uses_stdout(&self) -> bool {
        self.uri == Uri::Stdio
    }
}

/// Highest levels of both methods.
const MAX_LEVELS: [(&str, Method, i32); 2] =
    [("zlib", Method::Zlib, 9), ("zstd", Method::Zstd, 22)];

/// What `--compress` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Compress(pub(crate) Option<Compression>);

impl std::str::FromStr for Compress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        let (name, level) = match text.split_once(':') {
            Some((name, level)) => (name, Some(level)),
            None => (text, None),
        };
        let known = MAX_LEVELS.iter().find(|(known, ..)| *known == name);
        let (_, method, max) = known.ok_or("it is none, zlib, zlib:LEVEL, zstd or zstd:LEVEL")?;
        let in_range = |level: &str| level.parse().ok().filter(|level| (1..=*max).contains(level));
        let level = match level {
            None => None,
            Some(level) => {
                let level = in_range(level);
                Some(level.ok_or_else(|| format!("the level of {name} is 1 to {max}"))?)
            }
        };
        Ok(Self(Some(Compression { method: *method, level })))
    }
}

impl std::fmt::Display for Compress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(Compression { method, level }) = self.0 else { return f.write_str("none") };
        let known = MAX_LEVELS.iter().find(|(_, known, _)| *known == method);
        f.write_str(known.map_or("none", |(name, ..)| name))?;
        level.map_or(Ok(()), |level| write!(f, ":{level}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_has_a_method_and_perhaps_a_level() {
        let parse = |text: &str| text.parse::<Compress>().map(|c| c.0);
        assert_eq!(parse("none"), Ok(None));
        assert_eq!(parse("zlib"), Ok(Some(Compression { method: Method::Zlib, level: None })));
        assert_eq!(
            parse("zstd:19"),
            Ok(Some(Compression { method: Method::Zstd, level: Some(19) }))
        );
        for text in ["", "lz4", "zlib:", "zlib:0", "zlib:10", "zstd:23", "zstd:x", "none:1"] {
            assert!(parse(text).is_err(), "{text}");
        }
        for text in ["none", "zlib", "zstd:19"] {
            assert_eq!(text.parse::<Compress>().unwrap().to_string(), text);
        }
    }
}
