//! What a user reads when something went wrong: one `error:` line with the whole chain of causes,
//! one `hint:` line that says what to do.

use std::io::{IsTerminal as _, Write as _};

use bitferry::report::error_chain;
use bitferry::{Blame, Error};
use serde::Serialize;

/// The document of a verb that failed before it had another one to print.
#[derive(Debug, Serialize)]
pub(crate) struct Failure {
    /// As in a summary.
    error: String,
}

impl Failure {
    pub(crate) fn new(error: &Error) -> Self {
        Self { error: error_chain(error) }
    }
}

/// Prints an error and its hint on stderr.
pub(crate) fn print(error: &Error) {
    print_lines(&error_chain(error), &hint(error));
}

/// Prints what is wrong, and what to do.
pub(crate) fn print_lines(error: &str, hint: &str) {
    let stderr = std::io::stderr();
    let is_coloured = stderr.is_terminal() && super::output::may_colour();
    let (red, cyan, plain) =
        if is_coloured { ("\x1b[1;31m", "\x1b[36m", "\x1b[0m") } else { ("", "", "") };
    let mut stderr = stderr.lock();
    let _ = writeln!(stderr, "{red}error:{plain} {}", one_line(error));
    let _ = writeln!(stderr, "{cyan}hint:{plain} {}", one_line(hint));
}

/// Names found in images may hold anything: a line stays one line, and no terminal is driven by it.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The error's own hint, else what its blame suggests.
fn hint(error: &Error) -> String {
    if let Some(hint) = error.hint() {
        return hint;
    }
    match error {
        Error::Interrupted => {
            "the same command goes on where this one stopped; with a QEMU at the other end it \
             begins anew"
        }
        _ => match error.blame() {
            Blame::Caller => "`bitferry help` and `bitferry help VERB` show what can be asked for",
            Blame::Bytes => "the input is damaged; make a new one or take an older copy",
            Blame::PeerBehaviour => "the other side broke the protocol; look at its log",
            Blame::PeerFeatures => "convert it first with the program that made it",
            Blame::Device => "check that the path exists, that you may use it, and the free space",
            Blame::Transport => "check that the other side still runs, then try again",
            Blame::WouldLose => "`--dry-run` shows what would be lost",
            Blame::Mismatch => "check storage and memory, then try again",
        },
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_stays_on_its_line() {
        let error = Error::Usage { reason: "a\nb\x1b[31m".into() };
        assert_eq!(one_line(&error_chain(&error)), "a\u{fffd}b\u{fffd}[31m");
    }
}
