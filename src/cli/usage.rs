//! Wrong usage, which the argument parser finds before there is a verb to answer for it: the same
//! lines as of any other error, and with `--json` the same last word.

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use clap::error::ErrorKind;

use bitferry::{Error, Report};

use super::failure::{self, Failure};
use super::output::Output;
use super::watch::Summary;

/// Exit status of wrong usage.
const USAGE: u8 = 2;

/// Answers for the parser: help and version are success, the rest is usage.
pub(crate) fn answer(error: &clap::Error, words: &[OsString]) -> ExitCode {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // Nobody is left to be told where the standard streams are gone.
        let _ = error.print();
        return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
    }
    let said = Said::new(&error.render().to_string());
    let raw = Raw::new(words);
    if raw.is_json {
        let error = Error::Usage { reason: said.error.clone() };
        let output = Output::json(raw.streams_to_stdout());
        let _ = match raw.verb.as_deref() {
            Some("copy" | "send" | "receive" | "demo") => {
                output.event(&Summary::new("summary", &Report::failure(&error, 0)))
            }
            _ => output.event(&Failure::new(&error)),
        };
    }
    failure::print_lines(&said.error, &said.hint(raw.verb.as_deref()));
    if let Some(usage) = &said.usage {
        // A reader that went away is no reason to panic.
        let _ = writeln!(std::io::stderr(), "\n{usage}");
    }
    ExitCode::from(USAGE)
}

/// What the parser has to say, in its parts.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    /// What is wrong, without `error:`.
    error: String,
    /// What it would try.
    tips: Vec<String>,
    /// `Usage: …`
    usage: Option<String>,
}

impl Said {
    /// Takes apart what is made for people to read: paragraphs, of which the first is the error.
    fn new(text: &str) -> Self {
        let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut paragraphs = text.trim().split("\n\n").map(str::trim);
        let error = one_line(paragraphs.next().unwrap_or_default());
        // It would name the verbs that are hidden too; the help names the others.
        let error = error.split(" [subcommands: ").next().unwrap_or_default();
        let error = error.strip_prefix("error: ").unwrap_or(error).to_owned();
        let mut said = Self { error, tips: Vec::new(), usage: None };
        for paragraph in paragraphs {
            if paragraph.starts_with("Usage:") {
                said.usage = Some(paragraph.to_owned());
            }
            let tips = paragraph.lines().filter_map(|line| line.trim().strip_prefix("tip: "));
            said.tips.extend(tips.map(one_line));
        }
        said
    }

    fn hint(&self, verb: Option<&str>) -> String {
        let verb = verb.map(|verb| format!("{verb} ")).unwrap_or_default();
        let help = format!("`bitferry {verb}--help` shows what can be asked for");
        self.tips.iter().cloned().chain([help]).collect::<Vec<_>>().join("; ")
    }
}

/// As much as can be told of words that make no sense as a whole.
#[derive(Debug, PartialEq, Eq)]
struct Raw {
    is_json: bool,
    verb: Option<String>,
    /// Whether one of the words is a URI that stands for the standard streams.
    has_dash: bool,
}

impl Raw {
    /// `words`: without the program's own name.
    fn new(words: &[OsString]) -> Self {
        let options = words.iter().take_while(|word| *word != "--");
        let mut raw = Self { is_json: false, verb: None, has_dash: false };
        let mut is_value = false;
        for word in options {
            raw.is_json |= word == "--json";
            raw.has_dash |= word == "-";
            let is_option = word.as_encoded_bytes().starts_with(b"-");
            if raw.verb.is_none() && !is_option && !is_value {
                raw.verb = word.to_str().filter(|word| is_verb(word)).map(str::to_owned);
            }
            // The one option before the verb that takes a word of its own.
            is_value = word == "-p" || word == "--progress";
        }
        raw
    }

    fn streams_to_stdout(&self) -> bool {
        self.has_dash && matches!(self.verb.as_deref(), Some("send" | "receive"))
    }
}

fn is_verb(word: &str) -> bool {
    use clap::CommandFactory as _;
    super::args::Args::command().find_subcommand(word).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(line: &str) -> Raw {
        Raw::new(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn the_parsers_words_become_an_error_and_a_hint() {
        let said = Said::new(
            "error: the following were not provided:\n  <A>\n  <B>\n\n  tip: a similar \
             argument exists: '--bandwidth'\n\nUsage: bitferry copy <A> <B>\n\nFor more \
             information, try '--help'.\n",
        );
        assert_eq!(said.error, "the following were not provided: <A> <B>");
        assert_eq!(said.usage.as_deref(), Some("Usage: bitferry copy <A> <B>"));
        assert_eq!(
            said.hint(Some("copy")),
            "a similar argument exists: '--bandwidth'; `bitferry copy --help` shows what can be \
             asked for"
        );
    }

    #[test]
    fn the_verb_is_found_among_options() {
        let copy = |is_json, has_dash| Raw { is_json, verb: Some("copy".into()), has_dash };
        assert_eq!(raw("copy --json a"), copy(true, false));
        assert_eq!(raw("-p always --json -v copy"), copy(true, false));
        assert_eq!(raw("copy - -- --json"), copy(false, true));
        assert_eq!(raw("--json frob").verb, None);
        assert!(raw("send --disk -").streams_to_stdout());
        assert!(!raw("inspect -").streams_to_stdout());
    }
}
