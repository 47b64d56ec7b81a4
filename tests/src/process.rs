//! Child processes with a time limit, captured output and, where asked, resource limits.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// How long a child may run unless a test says otherwise. Generous: the machine may be busy, and a
/// hang is what is looked for, not slowness.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A command to run, with limits.
#[derive(Debug, Clone)]
pub struct Run {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    dir: Option<PathBuf>,
    stdin: Vec<u8>,
    patience: Duration,
    memory: Option<u64>,
    file_size: Option<u64>,
}

/// What a child left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: Vec<u8>,
    /// What it printed as diagnostics.
    pub stderr: Vec<u8>,
    /// Whether it was killed because its time was up.
    pub timed_out: bool,
    /// How long it ran.
    pub elapsed: Duration,
}

impl Run {
    /// A command without arguments, with the default time limit.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            dir: None,
            stdin: Vec::new(),
            patience: PATIENCE,
            memory: None,
            file_size: None,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Adds the words of `line`, split at spaces. For options without spaces only.
    pub fn words(self, line: &str) -> Self {
        self.args(line.split_whitespace())
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory.
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = Some(dir.as_ref().to_owned());
        self
    }

    /// Gives the child this input; without it, none.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Sets the time limit.
    pub fn patience(mut self, limit: Duration) -> Self {
        self.patience = limit;
        self
    }

    /// Limits the child's address space, in bytes.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = Some(bytes);
        self
    }

    /// Limits the size of files the child may write, in bytes (a multiple of 512): a write beyond
    /// sends SIGXFSZ, of which the child dies unless it has other plans, and fails with `EFBIG`.
    pub fn file_size(mut self, bytes: u64) -> Self {
        self.file_size = Some(bytes);
        self
    }

    /// The command as one would type it.
    pub fn line(&self) -> String {
        let words = std::iter::once(&self.program).chain(&self.args);
        words.map(|w| quote(&w.to_string_lossy())).collect::<Vec<_>>().join(" ")
    }

    /// Starts the child in a process group of its own and goes on.
    pub fn spawn(&self) -> Running {
        let mut command = self.command();
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command.envs(self.env.iter().map(|(n, v)| (n, v))).process_group(0);
        command.stdin(if self.stdin.is_empty() { Stdio::null() } else { Stdio::piped() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{}: {e}", self.line()));
        if let Some(mut pipe) = child.stdin.take() {
            let bytes = self.stdin.clone();
            // A child that does not read its input is its own business.
            std::thread::spawn(move || pipe.write_all(&bytes));
        }
        let stdout = drain(child.stdout.take().expect("piped"));
        let stderr = drain(child.stderr.take().expect("piped"));
        let begun = Instant::now();
        let patience = self.patience;
        Running { command: self.line(), child, stdout, stderr, begun, patience, is_reaped: false }
    }

    /// Runs to the end or the time limit.
    pub fn output(&self) -> Output {
        self.spawn().wait()
    }

    /// Runs to the end and answers standard output; panics unless it succeeded.
    pub fn ok(&self) -> String {
        let output = self.output();
        assert!(output.status.success(), "{output}");
        output.text()
    }

    /// Runs to the end and answers whether it succeeded.
    pub fn works(&self) -> bool {
        self.output().status.success()
    }

    /// Limits are set by a shell that becomes the program, so that they hold from its first
    /// instruction and this crate needs no unsafe code.
    fn command(&self) -> Command {
        let mut limits = String::new();
        if let Some(bytes) = self.memory {
            limits += &format!("ulimit -v {} || exit 125; ", bytes / 1024);
        }
        if let Some(bytes) = self.file_size {
            limits += &format!("ulimit -f {} || exit 125; ", bytes / 512);
        }
        if limits.is_empty() {
            let mut command = Command::new(&self.program);
            command.args(&self.args);
            return command;
        }
        let mut command = Command::new("sh");
        command.arg("-c").arg(limits + "exec \"$@\"").arg("sh").arg(&self.program);
        command.args(&self.args);
        command
    }
}

/// A child that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    command: String,
    child: Child,
    stdout: Drain,
    stderr: Drain,
    begun: Instant,
    patience: Duration,
    is_reaped: bool,
}

impl Running {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends or `limit` is over; answers whether it ended.
    pub fn ends_within(&self, limit: Duration) -> bool {
        ends_within(&self.child, limit)
    }

    /// Waits for a line on standard output, or with `is_stderr` among the diagnostics, that `find`
    /// finds something in. Panics when the child ends without, or takes too long.
    #[track_caller]
    pub fn wait_for<T>(&self, is_stderr: bool, find: impl Fn(&str) -> Option<T>) -> T {
        let drain = if is_stderr { &self.stderr } else { &self.stdout };
        loop {
            // Asked before looking, so that a last word is not missed.
            let has_ended = self.ends_within(Duration::from_millis(5))
                && drain.thread.as_ref().is_none_or(JoinHandle::is_finished);
            let text = String::from_utf8_lossy(&drain.so_far()).into_owned();
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            if let Some(found) = whole.lines().find_map(&find) {
                return found;
            }
            let is_over = self.begun.elapsed() > self.patience;
            assert!(!has_ended && !is_over, "{} said only: {text}", self.command);
        }
    }

    /// Sends a signal to the child and what it started.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        // It may have ended by itself; it is not reaped yet, so that the id is still its own.
        let _ = kill_process_group(pid, signal);
    }

    /// Kills it as `kill -9` does and answers what it left.
    pub fn kill(self) -> Output {
        self.signal(Signal::KILL);
        self.collect(false)
    }

    /// Waits for its end, or kills it when its time is up.
    pub fn wait(self) -> Output {
        let left = self.patience.saturating_sub(self.begun.elapsed());
        let timed_out = !self.ends_within(left);
        if timed_out {
            self.signal(Signal::KILL);
        }
        self.collect(timed_out)
    }

    fn collect(mut self, timed_out: bool) -> Output {
        let status = self.child.wait().expect("own child");
        self.is_reaped = true;
        let elapsed = self.begun.elapsed();
        Output {
            command: std::mem::take(&mut self.command),
            status,
            stdout: self.stdout.finish(),
            stderr: self.stderr.finish(),
            timed_out,
            elapsed,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_reaped {
            self.signal(Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

impl Output {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Diagnostics as text.
    pub fn complaint(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The exit status; `None` when a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = match (self.timed_out, self.status.code(), self.status.signal()) {
            (true, ..) => "did not end in time".to_owned(),
            (_, Some(code), _) => format!("exit status {code}"),
            (_, _, signal) => format!("killed by signal {signal:?}"),
        };
        writeln!(f, "$ {}\n{how} after {:?}", self.command, self.elapsed)?;
        write!(f, "{}{}", clip(&self.stdout), clip(&self.stderr))
    }
}

/// Output in a failure message: the first screen says it all.
fn clip(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.lines().take(40).flat_map(|l| ["  | ", l, "\n"]).collect()
}

fn quote(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// Reads a pipe to its end, so that the child is never held up.
#[derive(Debug)]
struct Drain {
    so_far: Arc<Mutex<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
}

fn drain(mut pipe: impl Read + Send + 'static) -> Drain {
    let so_far = Arc::new(Mutex::new(Vec::new()));
    let bytes = Arc::clone(&so_far);
    let thread = std::thread::spawn(move || {
        let mut buf = [0; 1 << 16];
        while let Ok(len @ 1..) = pipe.read(&mut buf) {
            bytes.lock().expect("reader").extend_from_slice(&buf[..len]);
        }
    });
    Drain { so_far, thread: Some(thread) }
}

impl Drain {
    fn so_far(&self) -> Vec<u8> {
        self.so_far.lock().expect("reader").clone()
    }

    fn finish(&mut self) -> Vec<u8> {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("reader");
        }
        self.so_far()
    }
}

fn ends_within(child: &Child, limit: Duration) -> bool {
    let fd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).expect("pidfd of own child");
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = rustix::event::Timespec::try_from(left).expect("a short time");
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Ok(n) => return n > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => panic!("poll: {e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_hangs_is_killed_with_its_children() {
        let run = Run::new("sh").args(["-c", "sleep 100 & echo here; wait"]);
        let output = run.patience(Duration::from_millis(300)).output();
        assert!(output.timed_out && output.text() == "here\n", "{output}");
        assert!(output.elapsed < Duration::from_secs(50));
    }

    #[test]
    fn limits_hold() {
        let scratch = crate::Scratch::new();
        let file = scratch.path("f");
        let run = Run::new("dd").words("if=/dev/zero bs=4096 count=4").file_size(8192);
        let output = run.arg(format!("of={}", file.display())).output();
        assert_eq!(output.status.signal(), Some(Signal::XFSZ.as_raw()), "{output}");
        assert_eq!(file.metadata().unwrap().len(), 8192);
        let run = Run::new("sh").args(["-c", "ulimit -v"]).memory(1 << 30);
        assert_eq!(run.ok().trim(), "1048576");
    }
}
