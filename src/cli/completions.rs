//! `completions`: a script for the user's shell, from the same description as the parser.

use clap::CommandFactory as _;

use super::args::{Args, CompletionsArgs};
use super::{Outcome, Output};

pub(crate) fn run(args: &CompletionsArgs, output: &Output) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "bitferry", &mut script);
    output.write(&script)?;
    Ok(0)
}
