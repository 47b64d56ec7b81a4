//! How fast and how small is it? Holds `bitferry copy` against `qemu-img convert` and `cp`, `send`
//! and `receive` over TCP, in the clear and with TLS, against `nbdcopy` between two `qemu-nbd`, the
//! mirror of QEMU 10 and `migrate -b` of QEMU 7.2, everything against the bare loop of the machine,
//! and shows the memory that huge disks take.
//!
//! ```text
//! cargo run --release --example compare_copy -- [--dir DIR] [--mib N] [--rounds N]
//!     [--no-copy] [--no-move] [--no-huge]
//! ```
//!
//! DIR is a tmpfs, /dev/shm unless said, with room for three times the data; on a disk each
//! contender is also timed by the disk, and only those that sync have made their copy durable.
//! Every contender runs in each round, the order turning, and what is printed are medians over the
//! rounds, of times and of the ratios within a round. `BITFERRY_QEMU_10` and `BITFERRY_QEMU_72`
//! name the two QEMUs (`tests/peers` installs them). Peers that are not installed are left out, and
//! said to be.

mod bare;
#[path = "../common/certificates.rs"]
mod certificates;
#[path = "../common/cipher.rs"]
mod cipher;
mod contest;
mod copies;
mod huge;
#[path = "../common/image.rs"]
mod image;
#[path = "../common/machine.rs"]
mod machine;
mod moves;
mod peak;
mod qemus;

use std::path::PathBuf;
use std::process::ExitCode;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What was asked for.
struct Options {
    dir: PathBuf,
    mib: u64,
    rounds: usize,
    copies: bool,
    moves: bool,
    huge: bool,
}

impl Default for Options {
    fn default() -> Self {
        let dir = "/dev/shm".into();
        Self { dir, mib: 2048, rounds: 7, copies: true, moves: true, huge: true }
    }
}

fn options(arguments: &[String]) -> Result<Options> {
    let mut options = Options::default();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--dir" => options.dir = value()?.into(),
            "--mib" => options.mib = value()?.parse()?,
            "--rounds" => options.rounds = value()?.parse()?,
            "--no-copy" => options.copies = false,
            "--no-move" => options.moves = false,
            "--no-huge" => options.huge = false,
            _ => return Err(format!("{argument} is not known").into()),
        }
    }
    Ok(options)
}

fn run(arguments: &[String]) -> Result<()> {
    // Contenders of ours run as processes, as the others do.
    match arguments {
        [child, kind, source, destination] if child == "child" => {
            return copies::child(kind, source.as_ref(), destination.as_ref());
        }
        [child, kind, place, moved @ ..] if child == "move" => {
            return moves::child(kind, place.as_ref(), moved);
        }
        [child, kind, directory] if child == "child" => {
            return huge::child(kind, directory.as_ref());
        }
        _ => {}
    }
    let options = options(arguments)?;
    let scratch = tempfile::Builder::new().prefix("compare_copy-").tempdir_in(&options.dir)?;
    if options.copies {
        copies::run(scratch.path(), options.mib, options.rounds)?;
    }
    if options.moves {
        moves::run(scratch.path(), options.mib, options.rounds)?;
    }
    if options.huge {
        huge::run(scratch.path())?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare_copy: {error}");
            ExitCode::FAILURE
        }
    }
}
