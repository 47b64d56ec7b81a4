//! The command line: raw flags, a validated plan, one library call, its output, an exit status.
//!
//! Every verb is a file of this module and ends in a call to the `bitferry` library; nothing is
//! decided here that another caller of the library would have to decide again.

mod args;
mod bitmap;
mod compare;
mod completions;
mod control;
mod copy;
mod demo;
mod dialect;
mod failure;
mod hash;
mod info;
mod inspect;
mod interrupt;
mod man;
mod outcome;
mod output;
mod progress;
mod receive;
mod remote;
mod send;
mod size;
mod state_dir;
mod supervise;
mod table;
mod target_options;
mod transport;
mod usage;
mod watch;

use std::process::ExitCode;

use clap::Parser as _;

use self::args::{Args, Verb};
use self::output::Output;

/// How a verb ended: the exit status of CLI.md, or the error that has one.
type Outcome = bitferry::Result<u8>;

/// It is finished and published, and something that was asked for is not there.
const NOT_PRESERVED: u8 = 6;
/// Nothing was written because something would have been lost.
const WOULD_LOSE: u8 = 7;
/// Nobody knows; the same command asks again.
const UNKNOWN: u8 = 8;

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let words: Vec<_> = std::env::args_os().skip(1).collect();
            return usage::answer(&error, &words);
        }
    };
    start_log(args.common.verbose);
    let output = Output::new(&args.common, args.verb.streams_to_stdout());
    match interrupt::outlive_file_size_limit().and_then(|()| run(args.verb, &output)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            output.failure(&error);
            failure::print(&error);
            ExitCode::from(error.exit_status())
        }
    }
}

fn run(verb: Verb, output: &Output) -> Outcome {
    match verb {
        Verb::Demo(args) => demo::run(&args, output),
        Verb::Copy(args) => copy::run(args, output),
        Verb::Send(args) => send::run(args, output),
        Verb::Receive(args) => receive::run(args, output),
        Verb::Info(args) => info::run(args, output),
        Verb::Inspect(args) => inspect::run(&args, output),
        Verb::Compare(args) => compare::run(args, output),
        Verb::Hash(args) => hash::run(args, output),
        Verb::Bitmap(args) => bitmap::run(args, output),
        Verb::Control(args) => control::run(&args, output),
        Verb::Meet(args) => Ok(bitferry::connect::meet(&args.name).map(|()| 0)?),
        Verb::Completions(args) => completions::run(&args, output),
        Verb::Man(args) => man::run(&args, output),
    }
}

/// `-v`: what the libraries log, on stderr.
fn start_log(verbose: u8) {
    use tracing_subscriber::filter::LevelFilter;
    let level = match verbose {
        0 => return,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
}
