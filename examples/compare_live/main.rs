//! How long does the guest stand still? A disk that is written to all the time is moved meanwhile,
//! by `bitferry` and by two generations of QEMU with the means that each has: version 10 mirrors it
//! over NBD and migrates the bitmaps, version 7.2 migrates it with `blk` and without them.
//!
//! ```text
//! BITFERRY_QEMU_10=PROGRAM BITFERRY_QEMU_72=PROGRAM \
//!     cargo run --release --example compare_live -- [--dir DIR] [--mib N] [--rounds N]
//! ```
//!
//! All write 64 KiB, 256 times a second, wherever a generator says that all share. The pause is
//! what each source says about itself: `downtime` of `query-migrate`, and the time from our call to
//! pause the guest until the destination has answered that it took over. The limit is 300 ms for
//! all. QEMUs wait with `pause-before-switchover`, as management software has them do, so that no
//! write meets a disk that was handed over; their pause includes one answer of their monitor more
//! than ours. What arrived is compared with the source each time.

#[path = "../common/image.rs"]
mod image;
#[path = "../common/machine.rs"]
mod machine;
mod ours;
mod theirs;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use machine::Program;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What the guest writes at a time.
const WRITE_BYTES: u64 = 64 << 10;
/// Time from one write to the next.
const INTERVAL: Duration = Duration::from_micros(1_000_000 / 256);

/// What a move took.
struct Taken {
    pause: Duration,
    total: Duration,
    writes: u64,
}

/// Where the guest writes, the same for everybody.
struct Places {
    state: u64,
    size: u64,
}

impl Places {
    fn new(mib: u64) -> Self {
        Self { state: 0x9e37_79b9_7f4a_7c15, size: mib << 20 }
    }

    fn next(&mut self) -> u64 {
        // xorshift64*
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let slot = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 20;
        slot % (self.size / WRITE_BYTES) * WRITE_BYTES
    }
}

struct Options {
    dir: PathBuf,
    mib: u64,
    rounds: usize,
}

fn options(arguments: &[String]) -> Result<Options> {
    let mut options = Options { dir: "/dev/shm".into(), mib: 512, rounds: 5 };
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or(format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--dir" => options.dir = value.into(),
            "--mib" => options.mib = value.parse()?,
            "--rounds" => options.rounds = value.parse()?,
            _ => return Err(format!("{argument} is not known").into()),
        }
    }
    Ok(options)
}

/// Moves the disk at the first path to the second, while it is written to.
type Move = Box<dyn Fn(&Path, &Path, u64) -> Result<Taken>>;

type Theirs = fn(&Program, &Path, &Path, u64) -> Result<Taken>;

fn contenders() -> Vec<(&'static str, Move)> {
    let mut all: Vec<(_, Move)> = vec![("bitferry", Box::new(ours::run))];
    let peers: [(_, _, Theirs); 2] = [
        ("BITFERRY_QEMU_10", "QEMU 10: mirror over NBD, then dirty-bitmaps", theirs::mirror),
        ("BITFERRY_QEMU_72", "QEMU 7.2: migrate -b", theirs::blk),
    ];
    for (variable, name, run) in peers {
        match Program::named_by(variable) {
            Some(program) => all.push((name, Box::new(move |s, d, mib| run(&program, s, d, mib)))),
            None => println!("{variable} is not set: left out"),
        }
    }
    all
}

fn run(options: &Options) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("compare_live-").tempdir_in(&options.dir)?;
    let (source, target) = (scratch.path().join("source"), scratch.path().join("target"));
    println!(
        "{} MiB in a qcow2 image with three bitmaps over TCP, 64 KiB written 256 times a second, \
         {} rounds\n",
        options.mib, options.rounds
    );
    println!("{:48} {:>10} {:>10} {:>10} {:>8}", "", "pause ms", "longest", "total ms", "writes");
    for (name, work) in contenders() {
        let mut taken = Vec::new();
        for _ in 0..options.rounds {
            image::make(&source, options.mib << 20, options.mib, image::Noise::Pure)?;
            taken.push(work(&source, &target, options.mib).map_err(|e| format!("{name}: {e}"))?);
            compare(&source, &target).map_err(|e| format!("{name}: {e}"))?;
            std::fs::remove_file(&target)?;
            std::fs::remove_file(&source)?;
        }
        let pauses = sorted(taken.iter().map(|t| t.pause));
        println!(
            "{name:48} {:>10.1} {:>10.1} {:>10.0} {:>8}",
            median(&pauses),
            pauses.last().copied().unwrap_or(f64::NAN),
            median(&sorted(taken.iter().map(|t| t.total))),
            taken.iter().map(|t| t.writes).sum::<u64>()
        );
    }
    Ok(())
}

fn compare(source: &Path, target: &Path) -> Result<()> {
    let formats = ["compare", "-f", "qcow2", "-F", "qcow2"];
    let output = Command::new("qemu-img").args(formats).args([source, target]).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("they differ: {}", String::from_utf8_lossy(&output.stdout).trim()).into())
}

fn sorted(times: impl Iterator<Item = Duration>) -> Vec<f64> {
    let mut times: Vec<f64> = times.map(|t| t.as_secs_f64() * 1e3).collect();
    times.sort_by(f64::total_cmp);
    times
}

fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Sleeps until a write is due. A guest that was held up does not catch up.
fn wait_for_turn(due: &mut Instant) {
    std::thread::sleep(due.saturating_duration_since(Instant::now()));
    *due = (*due + INTERVAL).max(Instant::now());
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if std::env::var_os("TRACE").is_some() {
        let to_stderr = tracing_subscriber::fmt().with_writer(std::io::stderr);
        to_stderr.with_max_level(tracing::Level::DEBUG).init();
    }
    let result = match arguments.as_slice() {
        [part, target] if part == "receive" => ours::be_destination(target.as_ref()),
        _ => options(&arguments).and_then(|options| run(&options)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare_live: {error}");
            ExitCode::FAILURE
        }
    }
}
