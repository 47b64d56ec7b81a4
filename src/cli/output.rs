//! stdout: lines for people, documents and events for programs.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::args::{Common, When};
use super::failure::{Failure, one_line};
use super::interrupt;
use super::watch::Summary;

/// Where results go and in which form. A reader that went away is not an error: what is still to
/// be said is dropped, and the exit status stays that of the work.
#[derive(Debug)]
pub(crate) struct Output {
    /// Whether programs read us.
    pub(crate) is_json: bool,
    /// Whether nothing is said to people.
    pub(crate) is_quiet: bool,
    /// Whether a bar is shown, if there is something to show.
    pub(crate) shows_progress: bool,
    is_coloured: bool,
    /// Whether standard output belongs to a stream, so that results go to stderr.
    uses_stderr: bool,
    is_closed: AtomicBool,
    /// Whether anything was written, a document or its beginning.
    has_spoken: AtomicBool,
}

/// Whether the user's environment allows colour (<https://no-color.org>).
pub(crate) fn may_colour() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
        && std::env::var_os("TERM").is_none_or(|v| v != "dumb")
}

fn is_terminal(is_stderr: bool) -> bool {
    if is_stderr { io::stderr().is_terminal() } else { io::stdout().is_terminal() }
}

impl Output {
    /// Decides the form from the flags and the terminal.
    pub(crate) fn new(common: &Common, uses_stderr: bool) -> Self {
        let shows_progress = match common.progress {
            When::Always => true,
            When::Never => false,
            When::Auto => !common.quiet && !common.json && io::stderr().is_terminal(),
        };
        Self {
            is_json: common.json,
            is_quiet: common.quiet,
            shows_progress,
            is_coloured: !common.json && is_terminal(uses_stderr) && may_colour(),
            uses_stderr,
            is_closed: AtomicBool::new(false),
            has_spoken: AtomicBool::new(false),
        }
    }

    /// For a program, where the flags could not be read.
    pub(crate) fn json(uses_stderr: bool) -> Self {
        Self {
            is_json: true,
            is_quiet: false,
            shows_progress: false,
            is_coloured: false,
            uses_stderr,
            is_closed: AtomicBool::new(false),
            has_spoken: AtomicBool::new(false),
        }
    }

    /// A line on stderr about what is shown. Not printed with `-q`.
    pub(crate) fn warn(&self, message: &str) {
        if !self.is_quiet {
            // Not `eprintln`, which panics where nobody reads.
            let _ = writeln!(io::stderr(), "warning: {}", one_line(message));
        }
    }

    /// The document of a failure, for a program that would read nothing otherwise. Who writes
    /// events ends them with a summary, and a document that has begun ends by itself.
    pub(crate) fn failure(&self, error: &bitferry::Error) {
        if self.is_json && !self.has_spoken.load(Ordering::Relaxed) {
            // The exit status is that of the failure, whether it can be told here or not.
            let _ = self.event(&Failure::new(error));
        }
    }

    /// Text for people, which ends its own lines. Not printed with `--json` or `-q`.
    pub(crate) fn text(&self, text: impl Display) -> bitferry::Result<()> {
        if self.is_json || self.is_quiet {
            return Ok(());
        }
        self.write(text.to_string().as_bytes())
    }

    /// The answer of a verb whose answer is its output: a document with `--json`, else text. `-q`
    /// leaves only the exit status.
    pub(crate) fn answer(
        &self,
        document: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> bitferry::Result<()> {
        if self.is_json { self.event(document) } else { self.text(text()) }
    }

    /// One line of JSON.
    pub(crate) fn event(&self, event: &impl Serialize) -> bitferry::Result<()> {
        let mut line = serde_json::to_vec(event).map_err(|e| stdout_error(e.into()))?;
        line.push(b'\n');
        self.write(&line)
    }

    /// The last event of a long operation, unless another thread has said by now how it ended.
    pub(crate) fn summary(&self, report: &bitferry::Report) -> bitferry::Result<()> {
        match interrupt::claim_last_word() {
            true => self.event(&Summary::new("summary", report)),
            false => Ok(()),
        }
    }

    /// The same output for a thread of its own.
    pub(crate) fn twin(&self) -> Self {
        Self {
            is_closed: AtomicBool::new(self.is_closed.load(Ordering::Relaxed)),
            has_spoken: AtomicBool::new(true),
            ..*self
        }
    }

    /// A long answer, written piece by piece. Not printed with `-q`.
    pub(crate) fn stream(
        &self,
        write: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
    ) -> bitferry::Result<()> {
        if self.is_quiet && !self.is_json {
            return Ok(());
        }
        self.has_spoken.store(true, Ordering::Relaxed);
        let mut out = io::BufWriter::new(self.out());
        self.judge(write(&mut out).and_then(|()| out.flush()))
    }

    /// Bytes as they are, asked for by name: a script, a page.
    pub(crate) fn write(&self, bytes: &[u8]) -> bitferry::Result<()> {
        if self.is_closed.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.has_spoken.store(true, Ordering::Relaxed);
        let mut out = self.out();
        self.judge(out.write_all(bytes).and_then(|()| out.flush()))
    }

    fn out(&self) -> Box<dyn io::Write> {
        if self.uses_stderr { Box::new(io::stderr()) } else { Box::new(io::stdout().lock()) }
    }

    fn judge(&self, written: io::Result<()>) -> bitferry::Result<()> {
        match written {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                self.is_closed.store(true, Ordering::Relaxed);
                Ok(())
            }
            result => result.map_err(stdout_error),
        }
    }

    /// A heading or a verdict.
    pub(crate) fn strong(&self, text: &str) -> String {
        self.paint("1", text)
    }

    /// Good news.
    pub(crate) fn good(&self, text: &str) -> String {
        self.paint("32", text)
    }

    /// Bad news.
    pub(crate) fn bad(&self, text: &str) -> String {
        self.paint("1;31", text)
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.is_coloured { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

fn stdout_error(source: io::Error) -> bitferry::Error {
    bitferry::Error::File { action: "write", path: Path::new("standard output").into(), source }
}
