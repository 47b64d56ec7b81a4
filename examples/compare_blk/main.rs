//! How fast do disk contents get into a stock QEMU 7.2? Holds `bitferry`'s stream against QEMU's
//! own block migration (`migrate -b`), each into a fresh QEMU over TCP.
//!
//! ```text
//! BITFERRY_QEMU_72=PROGRAM cargo run --release --example compare_blk -- [DIR [MIB [ROUNDS]]]
//! ```
//!
//! DIR should be a tmpfs with room for twice the data. Both run in each round, in turn, and what is
//! printed are medians over the rounds, of times and of the ratios within a round. What arrived is
//! compared byte by byte, outside the clock: QEMU 7.2 is known to call a migration complete that
//! left most of a disk behind.

#[path = "../common/machine.rs"]
mod machine;

use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bitferry::connect::{self, Dial as _};
use bitferry::qemu::Version;
use bitferry::qemu::outgoing::{self, Options, SourceDisk};
use bitferry::{Silent, copy::Format};
use serde_json::json;

use machine::{Machine, Program};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare_blk: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let argument = |n: usize, default: &str| arguments.get(n).cloned().unwrap_or(default.into());
    let (mib, rounds): (u64, usize) = (argument(1, "1024").parse()?, argument(2, "5").parse()?);
    let scratch =
        tempfile::Builder::new().prefix("compare_blk-").tempdir_in(argument(0, "/dev/shm"))?;
    let (source, target) = (scratch.path().join("source.raw"), scratch.path().join("target.raw"));
    noise(&source, mib)?;
    println!("{mib} MiB of noise into QEMU 7.2, {rounds} rounds, warm\n");
    let mut times: [Vec<f64>; 2] = Default::default();
    for round in 0..=rounds {
        for turn in 0..2 {
            let who = (turn + round) % 2;
            std::fs::File::create(&target)?.set_len(mib << 20)?;
            let taken = if who == 0 { ours(&source, &target)? } else { theirs(&source, &target)? };
            let is_whole = same(&source, &target)?;
            let name = ["bitferry", "QEMU 7.2 migrate -b"][who];
            if !is_whole {
                println!("{name}: completed, and the disk is not whole");
            }
            // The first round warms memory and caches.
            if round > 0 {
                times[who].push(taken.as_secs_f64());
            }
        }
    }
    let rate = |times: &[f64]| mib as f64 / median(times);
    println!("bitferry             {:6.0} MiB/s", rate(&times[0]));
    println!("QEMU 7.2 migrate -b  {:6.0} MiB/s", rate(&times[1]));
    let ratios: Vec<f64> = times[0].iter().zip(&times[1]).map(|(a, b)| a / b).collect();
    println!("time, ours / theirs: {:.2}", median(&ratios));
    Ok(())
}

fn qemu() -> Result<Program> {
    let program = Program::named_by("BITFERRY_QEMU_72");
    Ok(program.ok_or("BITFERRY_QEMU_72 must name a qemu-system-x86_64 of version 7.2")?)
}

/// From a connection to the state `completed` at the destination.
fn ours(source: &Path, target: &Path) -> Result<Duration> {
    let mut destination = Machine::start(&qemu()?, target, "raw", true)?;
    let disk = SourceDisk { id: "disk0".into(), path: source.into(), format: Some(Format::Raw) };
    let version = Version::new(7, 2);
    let options = Options { disks: vec![disk], blocks: true, version, ..Options::default() };
    let prepared = outgoing::prepare(&options, &Silent)?;
    let dialer = connect::dial(&destination.listen()?.parse()?, &connect::Options::default())?;
    let begun = Instant::now();
    let report = prepared.send(dialer.dial()?, &Silent)?;
    destination.completes()?;
    let taken = begun.elapsed();
    if bitferry::exit_status(&report) != 0 {
        return Err(format!("{report:?}").into());
    }
    destination.quit()?;
    Ok(taken)
}

fn theirs(source: &Path, target: &Path) -> Result<Duration> {
    let mut destination = Machine::start(&qemu()?, target, "raw", true)?;
    let mut machine = Machine::start(&qemu()?, source, "raw", false)?;
    let uri = destination.listen()?;
    // The product of both is what it may leave for the end.
    machine.ask(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 16_000_000_000u64, "downtime-limit": 1 }),
    )?;
    let begun = Instant::now();
    machine.ask("migrate", json!({ "uri": uri, "blk": true }))?;
    machine.completes()?;
    destination.completes()?;
    let taken = begun.elapsed();
    destination.quit()?;
    machine.quit()?;
    Ok(taken)
}

/// Content that has no zeroes.
fn noise(path: &Path, mib: u64) -> Result<()> {
    let mut file = std::fs::File::create(path)?;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..mib {
        for word in buffer.chunks_exact_mut(8) {
            // xorshift64*
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            word.copy_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
        file.write_all(&buffer)?;
    }
    Ok(())
}

fn same(one: &Path, other: &Path) -> Result<bool> {
    let (mut one, mut other) = (std::fs::File::open(one)?, std::fs::File::open(other)?);
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let len = one.read(&mut a)?;
        if len == 0 {
            return Ok(true);
        }
        let (Some(a), Some(b)) = (a.get(..len), b.get_mut(..len)) else { return Ok(false) };
        other.read_exact(b)?;
        if a != b {
            return Ok(false);
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
