//! Our destination under a test: listening on a socket, or fed from bytes.

use std::io::{Cursor, Read};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bitferry::options::DiskOption;
use bitferry::qemu::incoming::{self, IncomingOptions};
use bitferry::{Observer, Report};
use mig_core::transport::{Connection, HangUp};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::qmp::Qemu;
use crate::scratch::Scratch;

/// How long a silent source is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the destination answered, and what it warned of.
#[derive(Debug)]
pub struct Received {
    /// The report, or why there is none.
    pub result: bitferry::Result<Report>,
    /// What the user was told.
    pub warnings: Vec<String>,
}

/// A destination that waits for a source.
#[derive(Debug)]
pub struct Receiver {
    socket: PathBuf,
    thread: JoinHandle<Received>,
    _dir: Scratch,
}

/// Remembers what the user would be told.
#[derive(Debug, Default)]
struct Told(Mutex<Vec<String>>);

impl Observer for Told {
    fn warning(&self, message: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(message.to_owned());
    }
}

/// Options for these disks, by name and image.
pub fn places(disks: &[(&str, &Path)]) -> IncomingOptions {
    let place = |(id, path): &(&str, &Path)| DiskOption {
        id: (*id).to_owned(),
        path: (*path).to_owned(),
        format: None,
        is_readonly: false,
    };
    IncomingOptions { disks: disks.iter().map(place).collect(), ..IncomingOptions::default() }
}

impl Receiver {
    /// Listens on a socket and receives one migration.
    pub fn listen(options: IncomingOptions) -> Self {
        Self::recording(options, Arc::default())
    }

    /// The same; what is read of the connection is added to `stream` as well.
    pub fn recording(options: IncomingOptions, stream: Arc<Mutex<Vec<u8>>>) -> Self {
        let dir = Scratch::new();
        let socket = dir.path("mig");
        let listener = UnixListener::bind(&socket).expect("socket");
        let thread = std::thread::spawn(move || {
            let limit = Timespec::try_from(PATIENCE).expect("a short time");
            let ready = poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&limit));
            assert!(ready.expect("poll") > 0, "no source connected");
            let (socket, _) = listener.accept().expect("accept");
            let connection = connection(socket);
            let reader = Box::new(Recorder { reader: connection.reader, stream });
            run(Connection { reader, ..connection }, &options)
        });
        Self { socket, thread, _dir: dir }
    }

    /// Where a source connects, as QEMU writes it.
    pub fn uri(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    /// A connection to it, for scripted sources.
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream
    }

    /// Waits for the end.
    pub fn wait(self) -> Received {
        let end = Instant::now() + 2 * PATIENCE;
        while !self.thread.is_finished() {
            assert!(Instant::now() < end, "the destination does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Receives from bytes, as from a file.
pub fn replay(bytes: &[u8], options: &IncomingOptions) -> Received {
    let connection = Connection {
        reader: Box::new(Cursor::new(bytes.to_vec())),
        writer: Box::new(NoWay),
        line: Arc::new(Nothing),
        peer: "bytes".to_owned(),
    };
    run(connection, &IncomingOptions { is_one_way: true, ..options.clone() })
}

fn run(connection: Connection, options: &IncomingOptions) -> Received {
    let told = Told::default();
    let result = incoming::run(connection, options, &told);
    Received { result, warnings: told.0.into_inner().unwrap_or_else(PoisonError::into_inner) }
}

/// A connected socket as the library takes it.
pub fn connection(stream: UnixStream) -> Connection {
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    let twin = || stream.try_clone().expect("clone");
    Connection {
        reader: Box::new(twin()),
        writer: Box::new(twin()),
        line: Arc::new(Line(twin())),
        peer: "a test".to_owned(),
    }
}

/// Keeps what is read.
struct Recorder {
    reader: Box<dyn Read + Send>,
    stream: Arc<Mutex<Vec<u8>>>,
}

impl Read for Recorder {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = self.reader.read(buf)?;
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.extend_from_slice(buf.get(..len).unwrap_or_default());
        Ok(len)
    }
}

struct Line(UnixStream);

impl HangUp for Line {
    fn hang_up(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }

    fn fault(&self) -> Option<std::io::Error> {
        self.0.take_error().ok().flatten()
    }
}

struct Nothing;

impl HangUp for Nothing {
    fn hang_up(&self) {}
}

struct NoWay;

impl std::io::Write for NoWay {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Reads until the other side closes, or is silent for too long.
pub fn drain(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset is an end, too.
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

impl Received {
    /// The report; panics with the error where there is none.
    #[track_caller]
    pub fn report(&self) -> &Report {
        self.result.as_ref().unwrap_or_else(|error| {
            panic!("{}", bitferry::report::error_chain(error));
        })
    }

    /// The error with its causes; panics where there is none.
    #[track_caller]
    pub fn error(&self) -> (u8, String) {
        match &self.result {
            Ok(report) => panic!("no error, but {report:?}"),
            Err(error) => (error.exit_status(), bitferry::report::error_chain(error)),
        }
    }
}

impl Qemu {
    /// Sets migration capabilities.
    #[track_caller]
    pub fn capabilities(&mut self, names: &[&str]) {
        let one = |name: &&str| serde_json::json!({ "capability": name, "state": true });
        let list: Vec<_> = names.iter().map(one).collect();
        self.ok("migrate-set-capabilities", serde_json::json!({ "capabilities": list }));
    }

    /// Waits until the migration has one of these states, and answers which. Panics when it has
    /// ended otherwise, or takes too long.
    #[track_caller]
    pub fn migration_reaches(&mut self, states: &[&str]) -> String {
        let end = Instant::now() + 2 * PATIENCE;
        loop {
            let answer = self.ok("query-migrate", serde_json::json!({}));
            let state = answer["status"].as_str().unwrap_or("none").to_owned();
            if states.contains(&state.as_str()) {
                return state;
            }
            let is_over = ["completed", "failed", "cancelled"].contains(&state.as_str());
            assert!(!is_over && Instant::now() < end, "wanted {states:?}, have {answer}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
