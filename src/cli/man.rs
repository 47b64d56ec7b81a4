//! `man`: manual pages from the same description as the parser.

use std::io::{self, Write as _};
use std::path::Path;

use clap::{Command, CommandFactory as _};

use super::args::{Args, EXIT_STATUS, ManArgs};
use super::{Outcome, Output};

pub(crate) fn run(args: &ManArgs, output: &Output) -> Outcome {
    let mut command = Args::command().disable_help_subcommand(true);
    command.build();
    match &args.directory {
        None => output.write(&page(&command, Path::new("standard output"))?)?,
        Some(directory) => {
            std::fs::create_dir_all(directory).map_err(|e| file_error("create", directory, e))?;
            write_pages(&command, directory, "bitferry")?;
        }
    }
    Ok(0)
}

/// One page for the command and one for each verb below it, as git does: `bitferry-copy.1`.
fn write_pages(command: &Command, directory: &Path, name: &str) -> bitferry::Result<()> {
    let path = directory.join(format!("{name}.1"));
    let text = page(command, &path)?;
    std::fs::write(&path, text).map_err(|e| file_error("write", &path, e))?;
    for verb in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        write_pages(verb, directory, &format!("{name}-{}", verb.get_name()))?;
    }
    Ok(())
}

/// The page of one verb: what the parser knows, and the exit statuses, which are the same for all.
fn page(command: &Command, path: &Path) -> bitferry::Result<Vec<u8>> {
    let source = concat!("bitferry ", env!("CARGO_PKG_VERSION"));
    let man = clap_mangen::Man::new(command.clone()).manual("bitferry").source(source);
    let mut text = Vec::new();
    render(&man, command, &mut text).map_err(|e| file_error("write", path, e))?;
    Ok(text)
}

fn render(man: &clap_mangen::Man, command: &Command, page: &mut Vec<u8>) -> io::Result<()> {
    man.render_title(page)?;
    man.render_name_section(page)?;
    man.render_synopsis_section(page)?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(page)?;
    }
    if let Some(examples) = command.get_after_long_help() {
        verbatim("EXAMPLES", &examples.to_string(), page)?;
    }
    verbatim("EXIT STATUS", EXIT_STATUS, page)
}

/// A section of lines that stay as they are; their own heading, the first line, is left out.
fn verbatim(heading: &str, text: &str, page: &mut Vec<u8>) -> io::Result<()> {
    writeln!(page, ".SH {heading}\n.nf")?;
    for line in text.lines().skip(1) {
        writeln!(page, "\\&{}", line.replace('\\', "\\e").replace('-', "\\-"))?;
    }
    writeln!(page, ".fi")
}

fn file_error(action: &'static str, path: &Path, source: io::Error) -> bitferry::Error {
    bitferry::Error::File { action, path: path.to_owned(), source }
}
