//! `control`: one command to a running migration.

use std::path::PathBuf;

use clap::Args as Group;
use serde_json::Map;

use bitferry::{Error, control};

use super::{Outcome, Output};

const EXAMPLES: &str = "\
Examples:
  bitferry control /run/vm.control query-migrate
      how the migration stands
  bitferry control /run/vm.control migrate-set-parameters downtime-limit=100 max-bandwidth=0
      milliseconds; bytes per second, 0 for no limit
  bitferry control /run/vm.control migrate-cancel
      call it off; the guest goes on at the source
  bitferry control /run/vm.control query-commands
      what else can be asked for";

/// Talk to a running migration
///
/// SOCKET is what the migration was given as --control unix:SOCKET. Commands and arguments have the
/// names of QEMU's monitor. The answer is JSON; what the other side refuses is exit status 4.
#[derive(Debug, Group)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct ControlArgs {
    /// Socket of the migration, with or without unix: before it
    socket: PathBuf,
    /// Command, as query-migrate
    command: String,
    /// Arguments; a value is JSON where it is JSON, else a string
    #[arg(value_name = "ARG=VALUE")]
    arguments: Vec<String>,
}

pub(crate) fn run(args: &ControlArgs, output: &Output) -> Outcome {
    let mut arguments = Map::new();
    for argument in &args.arguments {
        let Some((name, value)) = argument.split_once('=').filter(|(name, _)| !name.is_empty())
        else {
            let reason = format!("{argument:?} is not of the form ARG=VALUE");
            return Err(Error::Usage { reason });
        };
        if arguments.insert(name.to_owned(), control::value_of(value)).is_some() {
            return Err(Error::Usage { reason: format!("{name} is given twice") });
        }
    }
    let socket = args.socket.to_str().and_then(|text| text.strip_prefix("unix:"));
    let socket = socket.map_or_else(|| args.socket.clone(), PathBuf::from);
    let answer = control::ask(&socket, &args.command, arguments)?;
    output.answer(&answer, || format!("{answer:#}\n"))?;
    Ok(0)
}
