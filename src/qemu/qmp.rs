//! A small QMP client: one command at a time over a Unix socket, every answer bounded in time and
//! size.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use format_spec::Blame;
use serde_json::{Value, json};

/// How long QEMU may take for one command. A monitor whose main loop loads a migration answers
/// late.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Longest line. A description of a thousand block nodes takes about one MiB.
pub const MAX_LINE: usize = 32 << 20;
/// What is read at once.
const READ_BYTES: usize = 64 << 10;

/// How long it may take once its user wants to stop.
const HURRIED: Duration = Duration::from_secs(1);
/// How often that is looked for.
const LOOK: Duration = Duration::from_millis(100);

/// Set by whoever wants to stop: what is waited for then has to come at once. It stays set.
pub type Hurry = Arc<AtomicBool>;

/// Result of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why QEMU's monitor could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no monitor to talk to.
    #[error("cannot connect to the QMP socket {}", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The connection failed or ended, or an answer took too long.
    #[error("QMP {command}: no answer")]
    Silent {
        /// The command.
        command: String,
        /// The system's answer.
        source: io::Error,
    },
    /// What came is not QMP.
    #[error("QMP {command}: the answer {problem}")]
    Malformed {
        /// The command.
        command: String,
        /// What is wrong with it, as a phrase.
        problem: String,
    },
    /// QEMU refused the command.
    #[error("QMP {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// `GenericError`, `CommandNotFound`, …
        class: String,
        /// QEMU's own words.
        description: String,
    },
}

impl Error {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Connect { .. } | Self::Silent { .. } => Blame::Transport,
            Self::Malformed { .. } | Self::Refused { .. } => Blame::PeerBehaviour,
        }
    }
}

/// A monitor that has greeted. Events are thrown away.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    received: Vec<u8>,
    patience: Duration,
    hurry: Hurry,
    /// Whether it was silent once; it is not waited for again.
    is_lost: bool,
    next_id: u64,
    version: (u64, u64, u64),
}

impl Client {
    /// Connects to a monitor in control mode and takes its greeting. Each later command may take
    /// as long as `patience`, and so may this. A monitor serves one client at a time: another one
    /// waits.
    pub fn connect(path: &Path, patience: Duration, hurry: Hurry) -> Result<Self> {
        let failed = |source| Error::Connect { path: path.to_owned(), source };
        let stream = UnixStream::connect(path).map_err(failed)?;
        Self::greet(stream, patience, hurry)
    }

    fn greet(stream: UnixStream, patience: Duration, hurry: Hurry) -> Result<Self> {
        let (version, received) = ((0, 0, 0), Vec::new());
        let mut client =
            Self { stream, received, patience, hurry, is_lost: false, next_id: 1, version };
        const GREETING: &str = "greeting";
        let greeting = client.line(GREETING, Instant::now() + patience)?;
        let number = |key: &str| greeting["QMP"]["version"]["qemu"][key].as_u64();
        let (Some(major), Some(minor)) = (number("major"), number("minor")) else {
            return Err(malformed(GREETING, "is not QMP's: is this a monitor in control mode?"));
        };
        client.version = (major, minor, number("micro").unwrap_or(0));
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// QEMU's version: major, minor, micro.
    pub fn version(&self) -> (u64, u64, u64) {
        self.version
    }

    /// What ends its waiting from another thread.
    pub fn hurry(&self) -> Hurry {
        self.hurry.clone()
    }

    /// Runs a command and answers what it returns. After [`Error::Silent`] and
    /// [`Error::Malformed`] the connection is of no more use.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let id = self.next_id;
        self.next_id = id.saturating_add(1);
        let end = Instant::now() + self.patience;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        let silent = |source| Error::Silent { command: command.to_owned(), source };
        if self.is_lost {
            return Err(silent(io::ErrorKind::TimedOut.into()));
        }
        self.stream.set_write_timeout(Some(self.patience)).map_err(silent)?;
        self.stream.write_all(line.as_bytes()).map_err(silent)?;
        loop {
            let mut answer = self.line(command, end)?;
            if answer.get("event").is_some() || answer["id"] != id {
                continue;
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            let error = &answer["error"];
            let text = |key: &str| error[key].as_str().map(str::to_owned);
            return Err(match (text("class"), text("desc")) {
                (Some(class), Some(description)) => {
                    Error::Refused { command: command.to_owned(), class, description }
                }
                _ => malformed(command, "says neither what it returns nor what is wrong"),
            });
        }
    }

    /// The next line, as a JSON object.
    fn line(&mut self, command: &str, end: Instant) -> Result<Value> {
        let mut searched = 0;
        loop {
            let fresh = self.received.get(searched..).unwrap_or_default();
            if let Some(at) = fresh.iter().position(|b| *b == b'\n') {
                let rest = self.received.split_off(searched.saturating_add(at).saturating_add(1));
                let line = std::mem::replace(&mut self.received, rest);
                return match serde_json::from_slice(&line) {
                    Ok(value @ Value::Object(_)) => Ok(value),
                    _ => Err(malformed(command, "is not a JSON object")),
                };
            }
            searched = self.received.len();
            if searched > MAX_LINE {
                return Err(malformed(command, "is longer than any"));
            }
            self.read_some(end).map_err(|source| {
                self.is_lost = true;
                Error::Silent { command: command.to_owned(), source }
            })?;
        }
    }

    fn read_some(&mut self, end: Instant) -> io::Result<()> {
        let mut piece = [0; READ_BYTES];
        let mut end = end;
        let mut is_hurried = false;
        loop {
            if !is_hurried && self.hurry.load(Ordering::Acquire) {
                is_hurried = true;
                end = end.min(Instant::now() + HURRIED);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left.min(LOOK)))?;
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => {
                    self.received.extend_from_slice(piece.get(..len).unwrap_or_default());
                    return Ok(());
                }
                // A read that times out says that it would block.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

fn malformed(command: &str, problem: &str) -> Error {
    Error::Malformed { command: command.to_owned(), problem: problem.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    const GREETING: &str =
        r#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7}},"capabilities":[]}}"#;

    /// A monitor that greets with `greeting` and answers each command with the next of `answers`.
    fn monitor(greeting: &str, answers: &[&str]) -> Result<Client> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let answers: Vec<_> = answers.iter().map(|a| (*a).to_owned()).collect();
        let greeting = greeting.to_owned();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(theirs.try_clone().unwrap());
            let mut out = theirs;
            out.write_all(greeting.as_bytes()).unwrap();
            for answer in answers {
                let mut line = String::new();
                if lines.read_line(&mut line).unwrap_or(0) == 0 {
                    return;
                }
                let _ = out.write_all(answer.as_bytes());
            }
        });
        Client::greet(ours, Duration::from_millis(500), Hurry::default())
    }

    fn greeting() -> String {
        format!("{GREETING}\r\n")
    }

    #[test]
    fn answers_find_their_command_and_events_do_not_disturb() {
        let ready = "{\"return\":{},\"id\":1}\n";
        let answer = concat!(
            "{\"event\":\"STOP\"}\n",
            "{\"return\":{\"old\":1},\"id\":1}\n",
            "{\"return\":{\"n\":5},\"id\":2}\n"
        );
        let refusal =
            "{\"id\":3,\"error\":{\"class\":\"GenericError\",\"desc\":\"no such node\"}}\n";
        let mut client = monitor(&greeting(), &[ready, answer, refusal]).unwrap();
        assert_eq!(client.version(), (7, 2, 22));
        assert_eq!(client.execute("query-x", json!({})).unwrap()["n"], 5);
        let error = client.execute("query-y", json!({})).unwrap_err();
        assert!(matches!(&error, Error::Refused { class, .. } if class == "GenericError"));
        assert_eq!(error.to_string(), "QMP query-y: no such node");
    }

    #[test]
    fn what_is_no_monitor_is_said_to_be_none() {
        for bad in ["", "QEMU 7.2 monitor\n", "[]\n", "{}\n", "{\"QMP\":{}}\n", "\n"] {
            let error = monitor(bad, &[]).unwrap_err();
            let is_silent = matches!(error, Error::Silent { .. });
            assert!(is_silent || matches!(error, Error::Malformed { .. }), "{bad:?}: {error}");
            assert_eq!(is_silent, bad.is_empty());
        }
        let error =
            Client::connect(Path::new("/nowhere/qmp"), PATIENCE, Hurry::default()).unwrap_err();
        assert!(matches!(error, Error::Connect { .. }));
    }

    #[test]
    fn silence_and_endless_lines_end() {
        let ready = "{\"return\":{},\"id\":1}\n";
        let begun = Instant::now();
        let mut client = monitor(&greeting(), &[ready, "{\"event\":\"A\"}\n"]).unwrap();
        assert!(matches!(client.execute("a", json!({})), Err(Error::Silent { .. })));
        // It is not waited for again.
        let once = begun.elapsed();
        assert!(matches!(client.execute("a", json!({})), Err(Error::Silent { .. })));
        assert!(begun.elapsed() < once + Duration::from_millis(400));

        let begun = Instant::now();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let hurry = Hurry::default();
        std::thread::spawn({
            let hurry = hurry.clone();
            move || hurry.store(true, Ordering::Release)
        });
        let error = Client::greet(ours, Duration::from_secs(60), hurry).unwrap_err();
        assert!(matches!(error, Error::Silent { .. }), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(20));

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || while theirs.write_all(&[b' '; 1 << 20]).is_ok() {});
        let error = Client::greet(ours, Duration::from_secs(60), Hurry::default()).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }
}
