//! `inspect`: a captured migration stream, record by record.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use bitferry::Error;
use bitferry::inspect::{self, Form, Kind, Stop};

use super::{Outcome, Output};

const EXAMPLES: &str = "\
Examples:
  bitferry inspect stream
      the stream, one line per record, runs of alike ones counted
  bitferry inspect --json stream
      the same as one document, with every record
  bitferry inspect --as preempt channel2
      a capture whose first bytes do not tell what it is";

/// Show a captured migration stream, record by record
///
/// QEMU's streams and ours: the main connection, multifd channels, the postcopy-preempt channel,
/// the return path. Contents are not printed, only their lengths. A stream that is damaged is shown
/// up to where it is, with the offset and the field (exit status 5).
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct InspectArgs {
    /// File with the stream; - reads standard input
    pub(crate) stream: PathBuf,
    /// What the stream is: main, channel, preempt or return-path; told by its first bytes unless
    /// given
    #[arg(long = "as", value_name = "KIND")]
    pub(crate) kind: Option<Kind>,
}

pub(crate) fn run(args: &InspectArgs, output: &Output) -> Outcome {
    let failed = |action, source| Error::File { action, path: args.stream.clone(), source };
    let input: Box<dyn Read> = if args.stream.as_os_str() == "-" {
        Box::new(io::stdin().lock())
    } else {
        Box::new(File::open(&args.stream).map_err(|source| failed("open", source))?)
    };
    let form = if output.is_json { Form::Json } else { Form::Text };
    let mut found = None;
    output.stream(|out| {
        found = Some(inspect::run(input, args.kind, form, out)?);
        Ok(())
    })?;
    match found.and_then(|inspection| inspection.stopped) {
        None => Ok(0),
        Some(Stop::Malformed(error)) => Err(Error::Capture { path: args.stream.clone(), error }),
        Some(Stop::Input(source)) => Err(failed("read", source)),
    }
}
