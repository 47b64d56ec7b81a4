//! `bitferry` at another host, started with ssh: no daemon, no port.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use mig_core::transport::{Connection, Dial, Listen, Nature};

use super::child::{Pipes, Running};
use super::error::Error;
use super::held::Held;

/// Names the program to start instead of `ssh`.
pub const SSH: &str = "BITFERRY_SSH";
/// Names `bitferry` at the other host, where the remote shell does not find it by that name.
pub const REMOTE: &str = "BITFERRY_REMOTE";

/// `bitferry` with some arguments at another host. It is started for the first connection; those
/// that are made while it lives join it ([`meeting`](super::meeting)). When it was lost, it is
/// started again.
pub(super) struct Ssh {
    destination: String,
    args: Vec<OsString>,
    /// Connections in all.
    channels: u16,
    running: Running,
    idle: Duration,
    is_closed: AtomicBool,
    latest: Mutex<Latest>,
}

/// The latest start.
#[derive(Default)]
struct Latest {
    /// Lives as long as the first connection.
    first: Weak<()>,
    /// Where the others go.
    meeting: String,
    connections: u16,
}

impl Ssh {
    pub(super) fn new(
        destination: &str,
        (args, channels): (Vec<OsString>, u16),
        (running, idle): (&Running, Duration),
    ) -> Self {
        let (destination, running) = (destination.to_owned(), running.clone());
        let (is_closed, latest) = (AtomicBool::new(false), Mutex::default());
        Self { destination, args, channels, running, idle, is_closed, latest }
    }

    /// One more connection; `None` when there are all.
    fn connect(&self) -> io::Result<Option<Connection>> {
        if self.is_closed.load(Ordering::Acquire) {
            return Err(Error::Closed { uri: name(&self.destination) }.into());
        }
        let latest = &mut *self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if latest.first.strong_count() == 0 {
            return self.start(latest).map(Some);
        }
        if latest.connections >= self.channels {
            return Ok(None);
        }
        latest.connections = latest.connections.saturating_add(1);
        let args = ["meet".into(), latest.meeting.clone().into()];
        let (command, name) = (command(&self.destination, &args), name(&self.destination));
        Ok(Some(self.running.start_another(command, name, Pipes::Both, self.idle)?))
    }

    fn start(&self, latest: &mut Latest) -> io::Result<Connection> {
        let mut args = self.args.clone();
        latest.connections = 1;
        if self.channels > 1 {
            let id = crate::random_id()?;
            latest.meeting = id.iter().fold("bitferry-".to_owned(), |s, b| format!("{s}{b:02x}"));
            args.extend(["--meet".into(), latest.meeting.clone().into()]);
        }
        let (command, name) = (command(&self.destination, &args), name(&self.destination));
        let mut first = self.running.start(command, name, Pipes::Both, self.idle)?;
        let life = Arc::new(());
        latest.first = Arc::downgrade(&life);
        first.reader = Box::new(Held { end: first.reader, _with: life });
        Ok(first)
    }
}

/// What a command at `destination` is called.
pub(super) fn name(destination: &str) -> String {
    format!("ssh {destination}")
}

impl Dial for Ssh {
    fn nature(&self) -> Nature {
        Nature { is_one_way: false, max_connections: self.channels.max(1) }
    }

    fn dial(&self) -> io::Result<Connection> {
        let none = || Error::OnlyOnce { uri: name(&self.destination) };
        self.connect()?.ok_or_else(|| none().into())
    }
}

impl Listen for Ssh {
    fn nature(&self) -> Nature {
        Dial::nature(self)
    }

    fn has_strangers(&self) -> bool {
        false
    }

    fn accept(&self, limit: Option<Duration>) -> io::Result<Connection> {
        if let Some(connection) = self.connect()? {
            return Ok(connection);
        }
        // Nobody comes who was not asked.
        let limit = limit.unwrap_or(self.idle);
        std::thread::sleep(limit);
        let seconds = limit.as_secs();
        Err(Error::NobodyCame { uri: name(&self.destination), seconds }.into())
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
    }
}

/// The command that runs `bitferry` with `args` at `destination`, which is `[USER@]HOST` as
/// [`Remote`](super::Remote) has it.
pub(super) fn command(destination: &str, args: &[OsString]) -> Command {
    let named = |variable, default: &str| {
        std::env::var_os(variable).filter(|v| !v.is_empty()).unwrap_or_else(|| default.into())
    };
    let mut command = Command::new(named(SSH, "ssh"));
    // Compressing ciphertext or what is compressed already only costs; no terminal is wanted there.
    command.args(["-T", "-o", "Compression=no", "--", destination]);
    command.arg(remote_line(&named(REMOTE, "bitferry"), args));
    command
}

/// One line for the remote shell, in which each word stays what it is.
fn remote_line(program: &OsStr, args: &[OsString]) -> OsString {
    let mut line = quote(program.as_bytes());
    for arg in args {
        line.push(b' ');
        line.extend(quote(arg.as_bytes()));
    }
    OsString::from_vec(line)
}

/// A word for a POSIX shell, whatever bytes it holds.
fn quote(word: &[u8]) -> Vec<u8> {
    let is_plain = |b: &u8| b.is_ascii_alphanumeric() || b"-_=./,:+@%".contains(b);
    if !word.is_empty() && word.iter().all(is_plain) {
        return word.to_vec();
    }
    let mut quoted = vec![b'\''];
    for byte in word {
        match byte {
            b'\'' => quoted.extend_from_slice(b"'\\''"),
            byte => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Stdio;

    /// What a shell makes of a line.
    fn words(line: &OsStr) -> Vec<Vec<u8>> {
        let mut script = OsString::from("for w in ");
        script.push(line);
        script.push("; do printf '%s\\0' \"$w\"; done");
        let shell = Command::new("sh").arg("-c").arg(script).stdin(Stdio::null()).output().unwrap();
        assert!(shell.status.success());
        shell.stdout.split_inclusive(|b| *b == 0).map(|w| w[..w.len() - 1].to_vec()).collect()
    }

    #[test]
    fn nothing_is_expanded_at_the_other_end() {
        let args: Vec<OsString> =
            ["a b", "", "it's", "$HOME", "`id`", "*", "~", "-x", "a\nb", "\\", "\"", "é", "!!"]
                .map(OsString::from)
                .into();
        let mut expected: Vec<Vec<u8>> = vec![b"bit ferry".to_vec()];
        expected.extend(args.iter().map(|a| a.as_bytes().to_vec()));
        assert_eq!(words(&remote_line(OsStr::new("bit ferry"), &args)), expected);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn each_word_arrives_as_it_is(words_in in prop::collection::vec(
            prop::collection::vec(1u8..=255, 0..12), 1..5)
        ) {
            let args: Vec<_> = words_in.iter().cloned().map(OsString::from_vec).collect();
            let mut expected = vec![b"x".to_vec()];
            expected.extend(words_in);
            prop_assert_eq!(words(&remote_line(OsStr::new("x"), &args)), expected);
        }
    }
}
